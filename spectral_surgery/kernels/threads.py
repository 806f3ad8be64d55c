"""Kernels on several cores: by the very threads that torch computes with.

A pool beside torch's would fight with it for the cores, since idle threads of both keep spinning for the next task: a
model of compressed and other layers then waits at each of them. So a kernel is a C function of one pointer, and
OpenMP's runtime, as torch loaded it, calls it on torch's team. Where torch has another runtime, one thread computes.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from typing import Any

import torch
from numba import types

from spectral_surgery.kernels.compile import intrinsic

_Team = Any  # a function of ctypes


def run(body: int, job: ctypes.Structure, threads: int) -> None:
    """Call a kernel on several threads at once; they share the tasks by `next_task`.

    Args:
        body: address of a C function of one pointer, which returns when no task is left.
        job: what it points to.
        threads: 1 or more; torch.get_num_threads() is what torch would take.
    """
    pointer = ctypes.byref(job)
    team = _team() if threads > 1 else None
    if team is None:
        _function(body)(pointer)
    else:
        team(body, pointer, threads, 0)


@lru_cache(maxsize=32)
def _function(body: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)


@lru_cache(maxsize=1)
def _team() -> _Team | None:
    """``GOMP_parallel`` of the runtime that torch is linked with; LLVM's runtime has it too."""
    try:
        team = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    team.argtypes, team.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return team


@intrinsic
def next_task(_typing: Any, _counter: Any) -> Any:
    """Take a task: the int64 that a pointer points to, which is one more afterwards, whoever else does the same."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        kind = context.get_value_type(types.int64)
        pointer = builder.bitcast(arguments[0], kind.as_pointer())
        return builder.atomic_rmw("add", pointer, kind(1), "monotonic")

    return types.int64(types.voidptr), generate


@intrinsic
def pointer_to(_typing: Any, _address: Any) -> Any:
    """An address as what `numba.carray` takes."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


def _alone() -> None:
    """In a child process none of the team goes on, and OpenMP's runtime would wait for it."""
    globals()["_team"] = lambda: None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone)
