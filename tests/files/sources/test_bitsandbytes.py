"""What bitsandbytes has packed is read as that library unpacks it, whole and by rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_flat, read_tensor
from tests.support.quantised import write

functional = pytest.importorskip("bitsandbytes.functional")
NAME = "model.layers.0.mlp.up_proj.weight"
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def stored(kind: str, *, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    codes, state = functional.quantize_4bit(torch.randn(48, 128), quant_type=kind, compress_statistics=nested)
    parts = {f"{NAME}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {NAME: codes, **parts}, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind: str, nested: bool, tmp_path: Path) -> None:
    tensors, expected = stored(kind, nested=nested)
    index = read_index(write(tmp_path, tensors | {"model.norm.weight": torch.ones(4)}, SETTINGS))
    assert sorted(index.tensors) == [NAME, "model.norm.weight"]
    whole = read_tensor(index.tensors[NAME])
    assert torch.equal(whole, expected.bfloat16())
    for first, last in ((0, 1), (5, 23), (47, 48)):
        assert torch.equal(read_flat(index.tensors[NAME], first * 128, last * 128), whole[first:last].reshape(-1))


def test_eight_bits(tmp_path: Path) -> None:
    weight = torch.randn(48, 100)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = {NAME: codes, NAME.replace("weight", "SCB"): scales, f"{NAME}_format": torch.zeros(1, dtype=torch.uint8)}
    index = read_index(write(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}))
    assert list(index.tensors) == [NAME]
    expected = functional.int8_vectorwise_dequant(codes, scales)
    found = read_tensor(index.tensors[NAME])
    assert torch.allclose(found.float(), expected, rtol=2**-8)
    assert float((found.float() - weight).norm() / weight.norm()) < 0.01


def test_faults(tmp_path: Path) -> None:
    tensors, _ = stored("nf4", nested=True)
    state = next(name for name in tensors if "quant_state" in name)
    cases = {
        "lacks 'nested_absmax'": {name: t for name, t in tensors.items() if not name.endswith("nested_absmax")},
        "is no JSON": tensors | {state: torch.zeros(4, dtype=torch.uint8)},
        "does not hold": tensors | {NAME: tensors[NAME][:-1].clone()},
        "has no scales": {NAME: torch.zeros(4, 4, dtype=torch.int8)},
    }
    for number, (message, parts) in enumerate(cases.items()):
        with pytest.raises(CheckpointError, match=message) as caught:
            read_index(write(tmp_path / str(number), parts, SETTINGS))
        assert "\n" not in str(caught.value)
