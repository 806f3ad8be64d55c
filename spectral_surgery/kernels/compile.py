"""How kernels are compiled: once for each processor, kept on disk, without the interpreter lock while they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """A function of numbers and numpy arrays, compiled when it is first called with each set of types.

    Indices are not checked. Where no folder can be written to, every process compiles for itself.
    """
    import numba

    options = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # numba's word for a package that lies in a folder without a cache, and no home to put it in
        return cast(Function, numba.njit(**options)(function))


def inlined(function: Function) -> Function:
    """A part of kernels, put into each before it is compiled: LLVM then sees that its arrays do not overlap."""
    import numba

    return cast(Function, numba.njit(inline="always", error_model="numpy")(function))
