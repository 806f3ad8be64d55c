from __future__ import annotations

import copy
import gc
import mmap
from pathlib import Path

import pytest
import torch

from spectral_surgery.codec import hugepages as large
from spectral_surgery.files.reader import DTYPES


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (1, large.HUGE), (1025, 2049), (3, large.HUGE)])
def test_a_tensor_like_any_other(shape: tuple[int, int]) -> None:
    made = large.empty(shape, torch.int8)
    assert (made.shape, made.dtype, made.is_contiguous()) == (shape, torch.int8, True)
    made.copy_(torch.arange(-100, 100, dtype=torch.int8).repeat(1 + made.numel() // 200)[: made.numel()].view(shape))
    assert torch.equal(made, copy.deepcopy(made))
    assert int(made.sum(dtype=torch.int64)) == int(made.clone().sum(dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_that_files_have(dtype: torch.dtype) -> None:
    made = large.empty((3, large.HUGE), dtype)
    assert (made.shape, made.dtype) == ((3, large.HUGE), dtype)
    assert made.view(torch.uint8).fill_(1).eq(1).all()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells")
def test_memory_is_given_back() -> None:
    def pages() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])

    before = pages()
    made = large.empty((64, 1 << 20), torch.int8)
    assert pages() >= before + (64 << 20) // mmap.PAGESIZE
    del made
    gc.collect()
    assert pages() < before + (32 << 20) // mmap.PAGESIZE


def test_systems_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert large.empty((2, large.HUGE), torch.int8).fill_(3).eq(3).all()


def test_kernels_that_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 10_000, raising=False)  # no such advice
    assert large.empty((1, large.HUGE), torch.int8).fill_(3).eq(3).all()
