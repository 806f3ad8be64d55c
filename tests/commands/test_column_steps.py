"""Codes with a step for every column, from calibration to every way of running and healing them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectral_surgery.codec import feedback_rate
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.settings import CompressOptions

pytest.importorskip("transformers")

from spectral_surgery.commands.heal import heal
from spectral_surgery.hf.quantizer.load_compressed import load_compressed
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings
from tests.commands.test_calibrate import hidden, save_model, write_text


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_they_are_stored_run_and_healed(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_rate, "COLUMN_STEP_BITS", 0)  # always worth it: matrices are small here
    source, text = save_model(kind, tmp_path / "model"), write_text(tmp_path / "text.txt")
    options = CompressOptions(Target("bits", 3.0), include=("*layers*",) if kind == "llama" else ("*.h.*",))
    compress(source, tmp_path / "out", options, calibrate=TextData(text, 64, 16))
    stored = open_compressed(tmp_path / "out")
    steps = {name: own for name, own in stored.index.tensors.items() if name.endswith("spectral_step")}
    if kind == "llama":
        assert all((own.dtype, own.shape[1] > 2) == ("BF16", True) for own in steps.values())
    else:  # its weights are stored the other way round
        assert all((own.dtype, own.shape[1]) == ("F32", 2) for own in steps.values())
    decompress(tmp_path / "out", tmp_path / "dense", verify=True)
    wanted = hidden(tmp_path / "dense")
    ids = torch.randint(2, 12, (20, 8), generator=torch.Generator().manual_seed(9))
    for resident in ("int8", "coded"):
        model = load_compressed(tmp_path / "out", resident, dtype=torch.float32).base_model
        with torch.inference_mode():
            torch.testing.assert_close(model(input_ids=ids).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
    few = DistillSettings(steps=4, eval_every=2, warmup_steps=1)
    report = heal(tmp_path / "out", source, tmp_path / "healed", TextData(text, 0, 16, 16), few)
    again = heal(
        tmp_path / "healed",
        source,
        tmp_path / "again",
        TextData(text, 0, 16, 16),
        DistillSettings(steps=1),
    )
    assert again.curve.held_out[0][1] == pytest.approx(report.curve.best, rel=1e-5)
    changed = open_compressed(tmp_path / "healed").index.tensors
    assert {name: changed[name].dtype for name in steps} == {name: own.dtype for name, own in steps.items()}
