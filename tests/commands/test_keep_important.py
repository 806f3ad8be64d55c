"""compress --sparsity --heal: the text decides what is kept, layer by layer and coefficient by coefficient."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import CompressReport, compress, plan_compression
from spectral_surgery.commands.compress.keep_important import measure_importance
from spectral_surgery.commands.settings import Healing
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings
from tests.commands.test_calibrate import KINDS, save_model
from tests.support.checkpoints import contents
from tests.support.command import run

SPARSE = CompressOptions(Target("density", 0.2), allocation="slope")
FEW = DistillSettings(steps=4, eval_every=4, warmup_steps=2)


def kept(source: Path, out: Path, options: CompressOptions, data: TextData) -> CompressReport:
    """Kept by importance, and hardly healed: positions do not change."""
    return compress(source, out, options, heal=Healing(data, DistillSettings(steps=1), "important"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fraction_is_kept_where_it_counts(tmp_path: Path, kind: str, text: Path) -> None:
    source, data = save_model(kind, tmp_path / "model"), TextData(text, 0, 16, 16)
    found = measure_importance(source, plan_compression(source, SPARSE)[1], data)
    report = kept(source, tmp_path / "out", SPARSE, data)
    assert report.manifest.report.density == pytest.approx(0.2, abs=3e-3)
    densities = {name: own.report.density for name, own in report.manifest.tensors.items()}
    assert found.keys() <= densities.keys()
    assert max(densities[name] for name in found) > 1.2 * min(densities[name] for name in found)
    for name in densities.keys() - found.keys():  # embeddings
        assert "emb" in name or "wte" in name or "wpe" in name or "head" in name
        assert densities[name] == pytest.approx(0.2, abs=2e-3)
    kept(source, tmp_path / "even", replace(SPARSE, allocation="even"), data)
    for name, own in open_compressed(tmp_path / "even").manifest.tensors.items():
        assert own.report.density == pytest.approx(0.2, abs=3e-3), name


def test_what_is_kept_costs_the_model_more_to_lose_than_what_is_largest(tmp_path: Path, bert: Path, text: Path) -> None:
    data = TextData(text, 0, 16, 16)
    found = measure_importance(bert, plan_compression(bert, SPARSE)[1], data)
    kept(bert, tmp_path / "own", SPARSE, data)
    compress(bert, tmp_path / "plain", replace(SPARSE, allocation="even"))
    energy = {}
    for name in ("own", "plain"):
        checkpoint = open_compressed(tmp_path / name)
        spectra = {tensor: checkpoint.part(tensor, 0).decode().coefficients() for tensor in found}
        energy[name] = sum(float(own.costs(spectra[tensor]).sum()) for tensor, own in found.items())
    assert energy["own"] > 1.02 * energy["plain"]


def test_the_command_keeps_by_importance_and_says_so(tmp_path: Path, bert: Path, text: Path) -> None:
    options = ("--sparsity", "0.2", "--heal", text, "--steps", "2", "--seq-length", "16", "--quiet")
    done = run("compress", bert, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    manifest = open_compressed(tmp_path / "out").manifest
    assert str(manifest.options["importance"]).startswith("sha256:")
    assert manifest.options["allocation"] == "slope"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "coefficients kept for their importance on" in card
    assert all(own in card for own in ("--sparsity 0.2", "--allocation slope", "--heal TEXT"))
    done = run("compress", bert, tmp_path / "even", *options, "--allocation", "even")
    assert done.returncode == 0, done.stderr
    assert open_compressed(tmp_path / "even").manifest.options["allocation"] == "even"
    card = (tmp_path / "even" / "README.md").read_text()
    assert all(own in card for own in ("--keep important", "--allocation even"))


def test_language_models_keep_what_calibration_chooses(tmp_path: Path, text: Path) -> None:
    source, data = save_model("llama", tmp_path / "model"), TextData(text, 0, 16, 16)
    plain = replace(SPARSE, allocation="even")
    report = compress(source, tmp_path / "out", plain, heal=Healing(data, FEW))
    assert report.manifest.options["importance"] is None
    assert str(report.manifest.options["calibration"]).startswith("128 x 16 tokens")
    report = compress(source, tmp_path / "largest", plain, heal=Healing(data, FEW, "largest"))
    assert report.manifest.options["calibration"] is None
    report = compress(source, tmp_path / "asked", plain, heal=Healing(data, FEW, "important"))
    assert report.manifest.options["importance"]
    with pytest.raises(ConfigError, match="allocation: expected even without text, got slope"):
        compress(source, tmp_path / "slope", SPARSE, heal=Healing(data, FEW, "largest"))


def test_what_is_kept_can_only_be_asked_for_where_something_is_dropped(tmp_path: Path, bert: Path, text: Path) -> None:
    options = ("compress", bert, tmp_path / "out", "--keep", "largest")
    done = run(*options, "--bits", "3", "--heal", text)
    assert done.returncode == 1
    assert "--keep largest: expected with --sparsity, got a target that drops nothing. Leave it out." in done.stderr
    for more in ((), ("--heal", text, "--calibrate", text)):
        done = run(*options, "--sparsity", "0.2", *more)
        assert done.returncode == 2
        assert "--keep: expected --heal, and no --calibrate" in done.stderr


@pytest.mark.parametrize("stop", ["importance of coefficients", "encoder", "loss"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, bert: Path, text: Path, stop: str) -> None:
    data = TextData(text, 0, 16, 16)

    def interrupt(done: int, _: int, what: str) -> None:
        if stop in what and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(bert, tmp_path / "out", SPARSE, heal=Healing(data, FEW), run=Run(progress=interrupt))
    assert not (tmp_path / "out").exists()
    compress(bert, tmp_path / "out", SPARSE, heal=Healing(data, FEW), run=Run(resume=True))
    compress(bert, tmp_path / "straight", SPARSE, heal=Healing(data, FEW))
    files = ("model.safetensors", "spectral_surgery.json")
    one, other = contents(tmp_path / "out"), contents(tmp_path / "straight")
    assert all(one[name] == other[name] for name in files)


def test_too_little_text_is_refused(tmp_path: Path, bert: Path) -> None:
    (tmp_path / "short.txt").write_text("one")
    with pytest.raises(ConfigError, match=r"short\.txt: expected text for two or more sequences"):
        kept(bert, tmp_path / "out", SPARSE, TextData(tmp_path / "short.txt"))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("encoder.layer.0.output.dense.weight", r"output\.dense\.weight: expected finite weights, got NaN"),
        ("encoder.layer.0.output.LayerNorm.bias", "squared gradients have a mean of nan; .* Look for NaN"),
    ],
)
def test_weights_that_are_not_finite(tmp_path: Path, bert: Path, text: Path, tensor: str, message: str) -> None:
    shutil.copytree(bert, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor].view(-1)[3] = math.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        kept(tmp_path / "model", tmp_path / "out", SPARSE, TextData(text, 0, 16, 16))
    assert not (tmp_path / "out").exists()
