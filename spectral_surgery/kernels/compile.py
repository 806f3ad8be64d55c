"""How kernels are compiled: once for each processor, kept on disk, without the interpreter lock while they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

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


def c_function(function: Callable[[Any], None]) -> int:
    """A kernel of one pointer that others than Python can call, compiled now or read from disk. Returns its address."""
    import numba

    options = {"nopython": True, "error_model": "numpy"}
    try:
        return int(numba.cfunc("void(voidptr)", cache=True, **options)(function).address)
    except RuntimeError:  # as for `kernel`
        return int(numba.cfunc("void(voidptr)", **options)(function).address)


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of kernels that writes LLVM's instructions itself.

    What is kept on disk is compiled anew when the file of a kernel changes, not when one of its operations does.
    """
    from numba.extending import intrinsic as numba_intrinsic

    return cast(Callable[..., Any], numba_intrinsic(function))
