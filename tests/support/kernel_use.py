"""A process that uses every kernel: ``python -m tests.support.kernel_use HOW``, for tests/kernels/test_compile.py."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import torch

from tests.support.codes import integers, lattice_points


def use_kernels(seed: int) -> int:
    """Frames of integers and of points nearest to numbers are encoded and decoded; returns how many."""
    from spectral_surgery.codec.frame_bytes import decode_frame, encode_frame
    from spectral_surgery.kernels.nearest import nearest

    rng = np.random.default_rng(seed)
    points = np.empty((32, 50), np.int32)
    values = rng.standard_normal((32, 50)).astype(np.float32)
    nearest(values, np.full(50, 2, np.float32), np.zeros(4, np.float32), points)
    frames = [points, lattice_points(rng, (256, 512), 3, np.int8), integers(rng, (70, 30), 300, np.int16)]
    for codes in frames:
        assert np.array_equal(decode_frame(encode_frame(codes), codes.shape), codes)
    use_products(seed)
    return len(frames)


def use_products(seed: int) -> None:
    """A product of several threads with a matrix, and some of its rows."""
    from spectral_surgery.matmul import look_up
    from spectral_surgery.matmul.few_tokens import few_tokens
    from tests.support.spectra import form_of

    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-127, 128, (1024, 256), generator=generator, dtype=torch.int8)
    form, x = form_of(levels), torch.randn(3, 256, generator=generator)
    y, rows = few_tokens(x, form, None), look_up(form, torch.arange(7))
    assert y is not None
    assert torch.allclose(y, x @ levels.float().T, rtol=1e-4, atol=1e-2)
    assert rows is not None
    assert torch.equal(rows, levels[:7].float())


def once() -> None:
    assert use_kernels(0) == 3


def threads() -> None:
    """Four of them compile, or load, and run at once."""
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use_kernels, range(8))) == [3] * 8


def fork() -> None:
    """A child of a process that has used them, and one that finds them in use."""
    for _ in range(2):
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # as torch's workers do: its other threads are not there
            os._exit(0 if use_kernels(1) == 3 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        once()


def spawn() -> None:
    once()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(use_kernels, range(4))) == [3] * 4


WAYS = {way.__name__: way for way in (once, threads, fork, spawn)}

if __name__ == "__main__":
    WAYS[sys.argv[1]]()
    print("done")
