"""compress --base: the difference to another checkpoint, and that checkpoint plus it, exactly as reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands import decompress as decompress_module
from spectral_surgery.commands.compress import compress, plan_compression
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.inspect import inspect
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.run import Run
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder

Q, DOWN, EMBED, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)
OPTIONS = CompressOptions(Target("max_error", 0.1))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(info) for name, info in read_index(folder).tensors.items()}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a model with one more matrix, one of another shape, and small differences."""
    base = llama_like(torch.float32) | {"old.weight": gaussian(70, 70)}
    tuned = {name: t + 0.01 * gaussian(*t.shape, seed=9) if t.is_floating_point() else t for name, t in base.items()}
    tuned |= {EMBED: base[EMBED], HEAD: base[HEAD], "old.weight": gaussian(80, 70), "new.weight": gaussian(70, 70)}
    return write_folder(tmp_path / "base", base), write_folder(tmp_path / "tuned", tuned, shards=2)


def test_the_difference_comes_back_within_the_reported_error(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    report = compress(tuned, tmp_path / "out", OPTIONS, base=base)
    assert report is not None
    back = decompress(tmp_path / "out", tmp_path / "plain", base=base, verify=True)
    assert back.failures == ()
    before, after, plain = tensors_of(base), tensors_of(tuned), tensors_of(tmp_path / "plain")
    assert plain.keys() == after.keys()
    rows = {row["name"]: row for row in report.to_json()["tensors"]}
    for name in (Q, DOWN):
        delta = (after[name] - before[name]).double()
        assert float((plain[name] - after[name]).double().norm() / delta.norm()) == pytest.approx(
            rows[name]["relative_error"], rel=1e-3
        )
        assert rows[name]["relative_error"] <= 0.1
    for name in ("old.weight", "new.weight"):  # no counterpart: compressed as they are
        assert float((plain[name] - after[name]).norm() / after[name].norm()) <= 0.1
    assert rows[EMBED]["bits_per_weight"] < 0.1  # nothing differs
    assert torch.equal(plain[EMBED], before[EMBED])
    assert torch.equal(plain[HEAD], before[EMBED])
    assert torch.equal(plain["model.steps"], after["model.steps"])


def test_a_difference_is_far_nearer_than_the_model_at_the_same_rate(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    options = CompressOptions(Target("bits", 2.0), include=(Q, DOWN))
    after = tensors_of(tuned)
    errors = []
    for name, before in (("alone", None), ("difference", base)):
        compress(tuned, tmp_path / name, options, base=before)
        decompress(tmp_path / name, tmp_path / f"{name}-plain", base=before)
        plain = tensors_of(tmp_path / f"{name}-plain")
        errors.append(float((plain[Q] - after[Q]).norm() / after[Q].norm()))
    assert errors[1] < errors[0] / 50


def test_narrow_weights_and_other_dtypes(tmp_path: Path) -> None:
    base = llama_like(torch.bfloat16)
    tuned = {
        n: (t.float() + 0.01 * gaussian(*t.shape, seed=9)).bfloat16() if t.dim() > 1 else t for n, t in base.items()
    }
    tuned[HEAD] = tuned[EMBED].clone()
    before, after = write_folder(tmp_path / "base", base), write_folder(tmp_path / "tuned", tuned)
    compress(after, tmp_path / "out", CompressOptions(Target("max_error", 0.01)), base=before, run=Run(workers=2))
    assert decompress(tmp_path / "out", tmp_path / "plain", base=before, verify=True).failures == ()
    wide = decompress(tmp_path / "out", tmp_path / "wide", base=before, dtype="float32", verify=True)
    assert wide.failures == ()
    plain = tensors_of(tmp_path / "plain")
    assert plain[Q].dtype == torch.bfloat16
    assert (plain[Q] == tuned[Q]).float().mean() > 0.9  # the error is below the rounding of the weights
    assert torch.equal(tensors_of(tmp_path / "wide")[Q].bfloat16(), plain[Q])
    assert torch.equal(plain[HEAD], plain[EMBED])


def test_the_same_bytes_at_every_call_and_a_card_that_names_the_base(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    base, tuned = folders
    compress(tuned, tmp_path / "a", OPTIONS, base=base)
    compress(tuned, tmp_path / "b", OPTIONS, base=base, run=Run(workers=2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "spectral-surgery compress SOURCE OUT --max-error 0.1 --base base" in card
    assert "decompress THIS_FOLDER ./plain --base base" in card


def test_nobody_takes_a_difference_for_a_model(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    compress(tuned, tmp_path / "out", OPTIONS, base=base)
    with pytest.raises(
        CheckpointError, match="out: expected a compressed model, got differences to base without weights"
    ):
        open_compressed(tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"out: expected base too, which it holds differences to, got no base.*Use --base"
    ):
        decompress(tmp_path / "out", tmp_path / "plain")
    with pytest.raises(
        CheckpointError, match=r"tuned: expected the base that out holds differences to, .* got another"
    ):
        decompress(tmp_path / "out", tmp_path / "plain", base=tuned)
    assert not (tmp_path / "plain").exists()
    assert inspect(tmp_path / "out").summary["differences_to"] == "base"
    compress(tuned, tmp_path / "whole", OPTIONS)
    with pytest.raises(ConfigError, match="whole: expected differences to go with a base, got whole weights"):
        decompress(tmp_path / "whole", tmp_path / "plain", base=base)


def test_bad_bases(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    marked = write_folder(tmp_path / "marked", llama_like(), config={"quantization_config": {"quant_method": "x"}})
    with pytest.raises(CheckpointError, match="marked: expected a plain checkpoint, got one quantised already"):
        compress(tuned, tmp_path / "out", OPTIONS, base=marked)
    with pytest.raises(CheckpointError, match="expected a folder apart from the source, got one that overlaps"):
        compress(tuned, base / "out", OPTIONS, base=base)
    broken = tensors_of(base)
    broken[Q][0, 0] = torch.inf
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight.*got NaN or infinite values"):
        compress(tuned, tmp_path / "out", OPTIONS, base=write_folder(tmp_path / "broken", broken))
    assert plan_compression(tuned, OPTIONS, compare=False, base=base)[1].options.base is None  # nothing is read


def test_verify_sees_a_sum_that_is_none(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = folders
    compress(tuned, tmp_path / "out", OPTIONS, base=base)
    write = decompress_module.write_checkpoint

    def damaging(folder: Path, entries: list, **named: str) -> list[Path]:
        files = write(folder, entries, **named)
        info = read_index(folder).tensors[Q]
        with info.file.open("r+b") as stream:
            stream.seek(info.start)
            stream.write(b"\0\0")
        return files

    monkeypatch.setattr(decompress_module, "write_checkpoint", damaging)
    found = decompress(tmp_path / "out", tmp_path / "plain", base=base, verify=True)
    assert found.failures == (f"{Q}: is not the sum of the base and the difference",)
    monkeypatch.undo()
    manifest = tmp_path / "out" / "spectral_surgery.json"
    body = json.loads(manifest.read_text())
    for part in body["tensors"][Q]["parts"]:
        part["report"]["stored_energy"] *= 2
    manifest.write_text(json.dumps(body))
    found = decompress(tmp_path / "out", tmp_path / "plain", base=base, verify=True)
    assert "of the difference where" in found.failures[0]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


def test_commands(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    out, plain = tmp_path / "out", tmp_path / "plain"
    options = ("--base", base, "--bits", 2, "-q")
    assert "Nothing was written" in invoke("compress", tuned, out, *options, "--dry-run").stdout
    assert json.loads(invoke("compress", tuned, out, *options, "--json").stdout)["finished"]
    assert "verified" in invoke("decompress", out, plain, "--base", base, "--verify", "-q").stdout
    assert "Use --base" in str(invoke("decompress", out, tmp_path / "no", "-q").exception)
    text = tmp_path / "text.txt"
    text.write_text("text")
    wrong = invoke("compress", tuned, tmp_path / "no", *options, "--calibrate", text)
    assert wrong.exit_code == 2
    assert "got --shard or --base" in wrong.output
