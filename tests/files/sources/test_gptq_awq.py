"""GPTQ and AWQ: read as the numbers they stand for, packed here bit by bit as their papers' code does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.reader import read_flat, read_tensor
from tests.support.quantised import write

STEM = "model.layers.0.mlp.up_proj"
INPUTS, OUTPUTS, GROUP = 64, 48, 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, Tensor]


def packed(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[n, m] numbers, words along the first dimension: [n * bits / 32, m] int32, number by number."""
    each = 32 // bits
    words = np.zeros((len(numbers) // each, numbers.shape[1]), np.uint32)
    for row in range(len(words)):
        for place in range(each):
            source = row * each + (order[place] if order else place)
            words[row] |= (numbers[source].numpy().astype(np.uint32) & ((1 << bits) - 1)) << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32))


def matrix(bits: int, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers [I, O], zeros and scales [G, O], and the weight [O, I] that they stand for, one by one."""
    codes = torch.randint(0, 1 << bits, (INPUTS, OUTPUTS))
    zeros = torch.randint(1, 1 << bits, (INPUTS // GROUP, OUTPUTS))
    scales = (torch.rand(INPUTS // GROUP, OUTPUTS) + 0.1).half()
    weight = torch.empty(OUTPUTS, INPUTS)
    for i in range(INPUTS):
        for o in range(OUTPUTS):
            weight[o, i] = scales[group[i], o].float() * float(codes[i, o] - zeros[group[i], o])
    return codes, zeros, scales, weight.bfloat16()


def gptq(bits: int = 4, *, shuffled: bool = False, first_format: bool = True) -> tuple[Parts, Tensor]:
    group = torch.arange(INPUTS) // GROUP
    group = group[torch.randperm(INPUTS)] if shuffled else group
    codes, zeros, scales, weight = matrix(bits, group)
    parts = {"qweight": packed(codes, bits), "qzeros": packed((zeros - int(first_format)).T, bits).T, "scales": scales}
    parts |= {"g_idx": group.int()} if shuffled else {}
    return {f"{STEM}.{name}": part for name, part in parts.items()}, weight


def awq() -> tuple[Parts, Tensor]:
    codes, zeros, scales, weight = matrix(4, torch.arange(INPUTS) // GROUP)
    parts = {"qweight": packed(codes.T, 4, AWQ_ORDER).T, "qzeros": packed(zeros.T, 4, AWQ_ORDER).T, "scales": scales}
    return {f"{STEM}.{name}": part for name, part in parts.items()}, weight


def source(folder: Path, parts: Parts, method: str, **settings: object) -> CheckpointIndex:
    return read_index(write(folder, parts, {"quant_method": method, "bits": 4, **settings}))


def assert_stands_for(index: CheckpointIndex, weight: Tensor, parts: Parts) -> None:
    info = index.tensors[f"{STEM}.weight"]
    assert (info.dtype, info.shape) == ("BF16", (OUTPUTS, INPUTS))
    assert torch.equal(read_tensor(info), weight)
    for start, stop in ((0, 1), (3, 20), (OUTPUTS - 5, OUTPUTS)):
        part = read_flat(info, start * INPUTS, stop * INPUTS).reshape(-1, INPUTS)
        assert torch.equal(part, weight[start:stop])
    assert info.stored_bytes == sum(part.nbytes for part in parts.values())
    assert index.config == {"model_type": "llama"}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq(bits: int, shuffled: bool, form: str, tmp_path: Path) -> None:
    parts, weight = gptq(bits, shuffled=shuffled, first_format=form == "gptq")
    more = {f"{STEM}.bias": torch.randn(OUTPUTS).half(), "model.norm.weight": torch.randn(4)}
    index = source(tmp_path, parts | more, "gptq", checkpoint_format=form)
    assert_stands_for(index, weight, parts)
    assert sorted(index.tensors) == sorted([f"{STEM}.weight", *more])


def test_a_zero_of_zero_is_borrowed_from_the_next_one(tmp_path: Path) -> None:
    """GPTQModel takes one off each integer of a word at once: zeros of 0 and 5 are stored as 15 and 3."""
    parts, _ = gptq()
    zeros = torch.tensor([0, 5, *range(1, 7)]).repeat(OUTPUTS // 8).expand(INPUTS // GROUP, -1)
    parts[f"{STEM}.qzeros"] = packed(zeros.T, 4).T - 0x11111111
    parts[f"{STEM}.qweight"], parts[f"{STEM}.scales"] = torch.zeros(8, OUTPUTS).int(), torch.ones(4, OUTPUTS).half()
    weight = read_tensor(source(tmp_path, parts, "gptq").tensors[f"{STEM}.weight"])
    assert torch.equal(weight[:, 0].int(), -zeros[0].int())


def test_awq(tmp_path: Path) -> None:
    parts, weight = awq()
    assert_stands_for(source(tmp_path, parts, "awq", version="GEMM"), weight, parts)


def test_faults(tmp_path: Path) -> None:
    def without(name: str) -> Parts:
        return {key: part for key, part in gptq(shuffled=True)[0].items() if key != f"{STEM}.{name}"}

    def changed(name: str, part: Tensor) -> Parts:
        return gptq(shuffled=True)[0] | {f"{STEM}.{name}": part}

    cases: list[tuple[str, Parts, dict[str, object], str]] = [
        ("gptq", without("scales"), {}, r"qweight' is quantised; expected .*scales' beside it"),
        ("gptq", without("qzeros"), {}, "qzeros' beside it"),
        ("gptq", without("qweight"), {}, "belongs to a weight that is missing; expected its qweight"),
        ("gptq", changed("scales", torch.ones(4, 40).half()), {}, "which do not fit"),
        ("gptq", changed("qweight", torch.ones(8, 8)), {}, "expected I32 matrices"),
        ("gptq", changed("qzeros", torch.zeros(4, 3).int()), {}, "integers of 2 bits|which do not fit"),
        ("gptq", changed("g_idx", torch.zeros(7).int()), {}, "which do not fit"),
        ("gptq", changed("g_idx", torch.full((INPUTS,), 4).int()), {}, "groups beyond the 4"),
        ("gptq", changed("scales", torch.full((4, OUTPUTS), torch.nan).half()), {}, "NaN or infinite scales"),
        ("gptq", gptq()[0], {"checkpoint_format": "marlin"}, "the checkpoint_format gptq or gptq_v2, got marlin"),
        ("awq", awq()[0], {"version": "gemv"}, "the version gemm, got gemv"),
        ("awq", gptq(8)[0], {}, "integers of 8 bits; expected 4"),
    ]
    for number, (method, parts, settings, message) in enumerate(cases):
        with pytest.raises(CheckpointError, match=message) as caught:
            read_tensor(source(tmp_path / str(number), parts, method, **settings).tensors[f"{STEM}.weight"])
        assert "\n" not in str(caught.value)
