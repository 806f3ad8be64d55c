"""compress --calibrate --allocation slope: the whole rate is met, layers that matter more get more, work resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import CompressReport, compress, plan_compression
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run

pytest.importorskip("transformers")

from spectral_surgery.commands.compress.spread_bits import measure_shares
from spectral_surgery.text.settings import TextData
from tests.commands.test_calibrate import save_model

QUERY = "encoder.layer.1.attention.self.query.weight"
OUTPUT = "encoder.layer.1.output.dense.weight"


def rates(report: CompressReport, kind: str) -> dict[str, float]:
    records = report.manifest.tensors
    return {name: float(getattr(record.report, kind)) for name, record in records.items()}


@pytest.mark.parametrize(("kind", "value", "measured"), [("bits", 3.0, "bits_per_weight"), ("density", 0.2, "density")])
def test_the_whole_rate_is_met(tmp_path: Path, bert: Path, text: Path, kind: str, value: float, measured: str) -> None:
    target = Target("bits" if kind == "bits" else "density", value)
    options = CompressOptions(target, include=("*encoder*",), allocation="slope")
    report = compress(bert, tmp_path / "out", options, calibrate=TextData(text, 64, 16))
    assert float(getattr(report.manifest.report, measured)) == pytest.approx(value, rel=0.01)
    found = rates(report, measured)
    assert found[OUTPUT] > 1.1 * found[QUERY]  # what is added to the residual stream matters most
    assert not list((tmp_path / "out").glob("**/rates.json"))


def test_a_layer_whose_outputs_count_more_costs_more(tmp_path: Path, bert: Path, text: Path) -> None:
    louder = tmp_path / "louder"
    louder.mkdir()
    for file in bert.iterdir():
        (louder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bert / "model.safetensors")
    tensors[OUTPUT] = tensors[OUTPUT] * 3  # what the layer is given from the one before then counts thrice as much
    save_file(tensors, louder / "model.safetensors", {"format": "pt"})
    costs = []
    for folder in (bert, louder):
        index, plan = plan_compression(folder, CompressOptions(Target("bits", 3.0), include=("*encoder*",)))
        shares = measure_shares(folder, index, plan, TextData(text, 64, 16))
        assert shares.keys() == {own.info.name for own in plan.tensors}
        costs.append(shares["encoder.layer.1.intermediate.dense.weight"].cost)
    assert 4 < costs[1] / costs[0] < 10


def test_slopes_need_text(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ConfigError, match="allocation: expected even without text, got slope"):
        compress(bert, tmp_path / "out", CompressOptions(Target("bits", 3.0), allocation="slope"))


def test_rates_are_remembered(tmp_path: Path, bert: Path, text: Path) -> None:
    options, data = CompressOptions(Target("bits", 3.0), allocation="slope"), TextData(text, 32, 16)
    compress(bert, tmp_path / "whole", options, calibrate=data)

    def stop(done: int, total: int, what: str) -> None:  # noqa: ARG001 - a progress callback
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(bert, tmp_path / "parts", options, calibrate=data, run=Run(progress=stop))
    (file,) = tmp_path.glob("parts.partial/**/rates.json")
    assert len(json.loads(file.read_text())["rates"]) == 13  # two blocks of six layers, and the table of positions
    compress(bert, tmp_path / "parts", options, calibrate=data, run=Run(resume=True))
    for name in ("model.safetensors", "spectral_surgery.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_without_blocks_keeps_even_rates(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model("llama", tmp_path / "model")
    monkeypatch.setattr("spectral_surgery.live.stacks.main_list", lambda *_: None)
    index, plan = plan_compression(source, CompressOptions(Target("bits", 3.0)))
    assert measure_shares(source, index, plan, TextData(text, 8, 16)) == {}


def test_the_command(tmp_path: Path, text: Path) -> None:
    source = save_model("gpt2", tmp_path / "model")
    arguments = ["compress", str(source), str(tmp_path / "out"), "--bits", "3", "--calibrate", str(text)]
    arguments += ["--samples", "16", "--seq-length", "16", "--json", "-q"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["bits_per_weight"] == pytest.approx(3.0, rel=0.02)
    assert len({round(own["bits_per_weight"], 1) for own in body["tensors"] if ".h." in own["name"]}) > 2
    manifest = json.loads((tmp_path / "out" / "spectral_surgery.json").read_text())
    assert manifest["options"]["allocation"] == "slope"
    assert "--allocation slope" in (tmp_path / "out" / "README.md").read_text()
    arguments[2], arguments[3:5] = str(tmp_path / "sparse"), ["--sparsity", "0.3"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    manifest = json.loads((tmp_path / "sparse" / "spectral_surgery.json").read_text())
    assert manifest["options"]["allocation"] == "even"
