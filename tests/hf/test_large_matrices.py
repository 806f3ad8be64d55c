"""Matrices that files cut into parts are one form each in memory, whatever becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import spectral_surgery
from spectral_surgery.codec import encoded as codec
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.files.compressed import plan as plan_module
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.layers import SpectralWeight
from tests.support.compressed import TEXT, dense_model, output
from tests.support.spectra import relative

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TILE = 8  # of which all sides are multiples


def qkv_in_one() -> Any:
    """A model whose files have q, k and v below each other, 56 rows each: parts of 16 rows go across."""
    config = transformers.AutoConfig.for_model("nomic_bert", **TEXT | {"hidden_size": 56, "num_attention_heads": 4})
    torch.manual_seed(0)
    return transformers.AutoModelForMaskedLM.from_config(config)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A compressed model of a family, in parts of few rows, with a step each."""

    @cache
    def compressed(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        model = qkv_in_one() if family == "nomic_bert" else dense_model(family)
        model.save_pretrained(folder / "source")
        options = CompressOptions(Target("bits", 3.0), min_weights=1000, tile=TILE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codec, "FRAME_SIZE", TILE)
            patch.setattr(plan_module, "PART_WEIGHTS", 2 * TILE * 64)
            compress(folder / "source", folder / "cut", options)
        return folder / "cut"

    return compressed


@pytest.mark.parametrize("resident", ["int8", "int4", "coded", "streamed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "nomic_bert"])
def test_one_form_a_matrix(cut: Callable[[str], Path], family: str, resident: str, tmp_path: Path) -> None:
    folder = cut(family)
    records = open_compressed(folder).manifest.tensors.values()
    assert sum(len(record.parts) > 1 for record in records) > len(records) / 2
    model = spectral_surgery.load_compressed(folder, resident)
    weights = [module for module in model.modules() if isinstance(module, SpectralWeight)]
    assert {len(weight.parts) for weight in weights} == {1}
    assert any(len(weight.forms[0].row_scale) for weight in weights) or (family, resident) == ("gpt2", "int8")
    model.save_pretrained(tmp_path / "again")
    again = spectral_surgery.load_compressed(tmp_path / "again", resident)
    logits = output(model)
    assert torch.equal(output(again), logits)
    assert relative(logits, output(again.dequantize())) < 1e-5


def test_a_part_is_read_at_a_time(cut: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a matrix is loaded, no more of what is stored is in memory than one of its parts."""
    from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint

    alive, most, part = 0, 0, CompressedCheckpoint.part

    class Counted(tuple[Any, ...]):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def counted(self: CompressedCheckpoint, name: str, number: int) -> Any:
        nonlocal alive, most
        found = part(self, name, number)
        object.__setattr__(found, "frames", Counted(found.frames))
        alive += 1
        most = max(most, alive)
        return found

    monkeypatch.setattr(CompressedCheckpoint, "part", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spectral_surgery.load_compressed(cut("llama"))
    finally:
        torch.set_num_threads(before)
    assert 0 < most <= 2  # the one before goes when the next one is there
