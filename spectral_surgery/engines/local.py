"""The processes of one machine, which share a list of parts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path

from spectral_surgery.engines.base import Engine, Work
from spectral_surgery.files.compressed.plan import Plan, Unit
from spectral_surgery.files.compressed.units import read_unit, run_unit
from spectral_surgery.files.storage import AHEAD
from spectral_surgery.pool import Team, team


def encode_here(work: Work) -> bool:
    """Encode all parts."""
    encode_units(work, work.units())
    return True


def encode_units(work: Work, units: Sequence[Unit]) -> None:
    """Encode these parts, the largest first, in all processes of the machine; finished ones are left as they are."""
    run, progress = work.run, work.run.progress
    weights = list(accumulate(unit.weights for unit in units))
    task = partial(run_unit, work.store, options=work.plan.options, threads=run.threads)
    read, number = partial(read_unit, work.store), -1
    with _team(run.workers) as workers:
        for number in workers.share(task, units, prepare=read, depth=_depth(work.plan), last=work.last):
            progress(weights[number], weights[-1], units[number].tensor.info.name)  # others may be at earlier ones
    if number + 1 < len(units):
        progress(weights[-1], weights[-1], units[-1].tensor.info.name)


def _depth(plan: Plan) -> int:
    """How many parts are read ahead: none of files here, which the system reads ahead."""
    infos = (info for tensor in plan.tensors for info in (tensor.info, tensor.base) if info)
    return 0 if all(isinstance(info.file, Path) for info in infos) else AHEAD


def _team(workers: int | Team) -> AbstractContextManager[Team]:
    return team(workers) if isinstance(workers, int) else nullcontext(workers)


LOCAL = Engine("local", "processes of this machine", encode_here)
