from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.reader import read_flat, read_tensor
from tests.support.quantised import write

STEM = "model.layers.0.mlp.experts.gate_up_proj"


def experts(count: int = 3, outputs: int = 24, groups: int = 2) -> dict[str, Tensor]:
    """Every code, and powers of two that make numbers up to the ends of bfloat16."""
    blocks = torch.randint(0, 256, (count, outputs, groups, 16), dtype=torch.uint8)
    scales = torch.randint(0, 250, (count, outputs, groups), dtype=torch.uint8)
    return {f"{STEM}_blocks": blocks, f"{STEM}_scales": scales, f"{STEM}_bias": torch.randn(count, outputs).bfloat16()}


def source(folder: Path, tensors: dict[str, Tensor]) -> CheckpointIndex:
    return read_index(write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": []}))


def test_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = experts()
    expected = convert_moe_packed_tensors(tensors[f"{STEM}_blocks"], tensors[f"{STEM}_scales"])
    index = source(tmp_path, tensors)
    info = index.tensors[STEM]
    assert sorted(index.tensors) == [STEM, f"{STEM}_bias"]
    assert info.shape == (3, 64, 24)
    assert torch.equal(read_tensor(info), expected)
    for first, last in ((0, 1), (5, 39), (60, 70), (63, 192)):
        rows = read_flat(info, first * 24, last * 24)
        assert torch.equal(rows, expected.reshape(-1)[first * 24 : last * 24]), (first, last)
    assert torch.equal(read_flat(info, 7, 100), expected.reshape(-1)[7:100])


def test_every_code_at_every_power(tmp_path: Path) -> None:
    """Against the table of the OCP specification: sign, two bits of exponent, one of mantissa."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 1, 16)
    scales = torch.arange(100, 116, dtype=torch.uint8).reshape(1, 16, 1)
    found = read_tensor(source(tmp_path, {f"{STEM}_blocks": codes, f"{STEM}_scales": scales}).tensors[STEM])[0]
    for output in range(16):
        for number in range(32):
            code = int(codes[0, output, 0, number // 2]) >> 4 * (number % 2) & 15
            sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
            size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
            assert float(found[number, output]) == (-1) ** sign * size * 2.0 ** (int(scales[0, output, 0]) - 127)


def test_scales_that_are_missing_do_not_fit_or_are_nan(tmp_path: Path) -> None:
    tensors = experts()
    scales = tensors.pop(f"{STEM}_scales")
    with pytest.raises(CheckpointError, match=r"has no scales; expected .*_scales"):
        source(tmp_path / "missing", tensors)
    with pytest.raises(CheckpointError, match=r"\[3, 24, 1\]; expected U8 \[3, 24, 2\]"):
        source(tmp_path / "shape", tensors | {f"{STEM}_scales": scales[..., :1].contiguous()})
    scales[1, 3, 1] = 255
    info = source(tmp_path / "nan", tensors | {f"{STEM}_scales": scales}).tensors[STEM]
    read_flat(info, 0, 64 * 24)
    with pytest.raises(CheckpointError, match="NaN scales"):
        read_tensor(info)
