"""How kernels are compiled: once for each processor, kept on disk, without the interpreter lock while they run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, event
from numba.core.event import Event, Listener

Function = TypeVar("Function", bound=Callable[..., object])


@lru_cache(maxsize=1)
def _announce() -> None:
    logging.getLogger("spectral_surgery").warning(
        "spectral_surgery compiles its kernels, once for this processor. This takes up to 40 seconds."
    )


class _Announcement(Listener):  # type: ignore[misc]  # numba has no types
    """A line before the first kernel is compiled: the process would seem to hang."""

    def on_start(self, event: Event) -> None:
        """Called before each step of each function that numba compiles, whoever it is for."""
        if str(event.data["module"]).startswith(__package__ or ""):
            _announce()

    def on_end(self, event: Event) -> None:
        """Nothing to say."""


event.register("numba:run_pass", _Announcement())


@lru_cache(maxsize=1)
def _digest() -> str:
    """Of all kernels. numba looks at the time of a kernel's file alone, and some are made of parts in other files."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _kept_as(function: Function) -> Function:
    """The function, with a name that no other version of it has on disk."""
    function.__qualname__ += f"_{_digest()}"
    return function


def kernel(function: Function) -> Function:
    """A function of numbers and numpy arrays, compiled when it is first called with each set of types.

    Indices are not checked. Where no folder can be written to, every process compiles for itself.
    """
    function, options = _kept_as(function), {"nogil": True, "error_model": "numpy"}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # numba's word for a package that lies in a folder without a cache, and no home to put it in
        return cast(Function, numba.njit(**options)(function))


def inlined(function: Function) -> Function:
    """A part of kernels, put into each before it is compiled: LLVM then sees that its arrays do not overlap."""
    return cast(Function, numba.njit(inline="always", error_model="numpy")(function))


def c_function(function: Callable[[Any], None]) -> int:
    """A kernel of one pointer that others than Python can call, compiled now or read from disk. Returns its address."""
    function, options = _kept_as(function), {"nopython": True, "error_model": "numpy"}
    try:
        return int(numba.cfunc("void(voidptr)", cache=True, **options)(function).address)
    except RuntimeError:  # as for `kernel`
        return int(numba.cfunc("void(voidptr)", **options)(function).address)


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of kernels that writes LLVM's instructions itself."""
    return cast(Callable[..., Any], numba.extending.intrinsic(function))


def features(context: Any) -> list[str]:
    """What the processor has that numba's context compiles for."""
    names: str = context.codegen().magic_tuple()[2]
    return names.split(",")


def is_amd(context: Any) -> bool:
    """Whether numba's context compiles for an AMD processor of 2017 or later."""
    return str(context.codegen().magic_tuple()[1]).startswith("znver")


def prefetch(build: Any, address: Any) -> None:
    """Ask for the line of the cache at an address, which may be of no memory at all."""
    pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
    ask = cgutils.get_or_insert_function(build.module, kind, "llvm.prefetch.p0")
    build.call(ask, [build.inttoptr(address, pointer), word(0), word(3), word(1)])
