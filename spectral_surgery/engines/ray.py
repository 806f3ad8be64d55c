"""A cluster of Ray: one task for each part, which reads its weights and leaves its file, or gives it to us to be left.

A part is the same bytes wherever and however often it is encoded, so a task whose node is lost is done again elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from spectral_surgery.engines.base import Engine, Work
from spectral_surgery.engines.cluster import (
    PATIENCE,
    PROCESS_BYTES,
    TRIES,
    Room,
    calling,
    each_on_ray,
    explained,
    places,
    reached,
)
from spectral_surgery.engines.part import Order, carry_out, installed
from spectral_surgery.engines.parts import Parts
from spectral_surgery.engines.shares import shares_on_ray
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.atomic import replace_file, writing_to
from spectral_surgery.files.compressed.plan import Unit
from spectral_surgery.files.compressed.units import is_done
from spectral_surgery.files.storage import size_of

_PER_PROCESSOR = 2  # tasks that are asked for at once, so that no processor waits for the next one
_FEWEST = 4


def encode_on_ray(work: Work) -> bool:
    """Encode all parts by tasks of the cluster.

    Raises:
        BackendError: when a node has another version of this package, or the cluster fails.
        SpectralSurgeryError: what went wrong with a part, as in one process.
    """
    import ray

    units = work.units()
    with _token(work.store.folder) as token:
        tasks = _Tasks(work, ray.remote(calling()), sum(unit.weights for unit in units), token, Room(work.run))
        tasks.all(units)
    return True


@contextmanager
def _token(folder: Path) -> Iterator[str]:
    """The name of a file by which a task knows the folder; it is there as long as tasks are."""
    name = f"{uuid4().hex}.token"
    replace_file(folder / name, name.encode())
    try:
        yield name
    finally:
        with writing_to(folder):
            (folder / name).unlink(missing_ok=True)


@dataclass
class _Tasks:
    """The tasks of a work.

    Attributes:
        work: all of it.
        task: remote function of what a worker does.
        total: weights of all parts.
        token: name of the file by which it knows the folder.
        pending: parts by the reference to their result.
        done: weights of finished parts.
        room: for a part.
    """

    work: Work
    task: Any
    total: int
    token: str
    room: Room
    pending: dict[Any, Unit] = field(default_factory=dict)
    done: int = 0

    def all(self, units: list[Unit]) -> None:
        """Ask for one part after the other, a few ahead of the processors, and take what is finished."""
        import ray

        try:
            for unit in units:
                if is_done(self.work.store, unit) or self._fetched(unit):
                    self._finish(unit)
                    continue
                while len(self.pending) >= self._window():
                    self._take()
                self._ask(unit)
            while self.pending:
                self._take()
            if self.parts is not None:
                self.parts.remove(self.work.store)
        finally:
            for reference in self.pending:  # none, unless we were interrupted or something went wrong
                ray.cancel(reference)

    def _window(self) -> int:
        return max(_FEWEST, _PER_PROCESSOR * places(self.work.run.threads))

    def _ask(self, unit: Unit) -> None:
        from ray import cloudpickle

        infos = [info for info in (unit.tensor.info, unit.tensor.base) if info is not None]
        sizes = {info.file: size_of(info.file) for info in infos if isinstance(info.file, Path)}
        store, run = self.work.store, self.work.run
        order = Order(store, unit, self.work.plan.options, run.threads, self.token, sizes, self.parts)
        task = self.task.options(
            name=f"{unit.tensor.info.name} {unit.part} {store.key[:12]}",
            num_cpus=run.threads,
            memory=_memory(unit),
            max_retries=TRIES,
            retry_exceptions=[OSError],
        )
        self.pending[task.remote(installed(), cloudpickle.dumps(partial(carry_out, order)))] = unit

    def _take(self) -> None:
        """Wait for a part, and leave its file if its node could not."""
        import ray

        ready, _ = ray.wait(list(self.pending), timeout=PATIENCE)
        if not ready:
            self.room.look(_memory(next(iter(self.pending.values()))))
        for reference in ready:
            unit = self.pending[reference]
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                raise explained(error, f"{unit.tensor.info.name}, part {unit.part}") from None
            if result is not None:
                replace_file(self.work.store.path(unit), result, durable=False)
            elif not self.work.store.path(unit).exists() and not self._fetched(unit):
                raise CheckpointError(
                    f"{unit.tensor.info.name}, part {unit.part}: expected its file, got none. Run again with --resume."
                )
            del self.pending[reference]
            self._finish(unit)

    def _fetched(self, unit: Unit) -> bool:
        """Whether a part was where nodes leave parts, and is here now."""
        data = self.parts.fetch(self.work.store, unit) if self.parts is not None else None
        if data is not None:
            replace_file(self.work.store.path(unit), data, durable=False)
        return data is not None and is_done(self.work.store, unit)

    @cached_property
    def parts(self) -> Parts | None:
        """Where nodes leave parts."""
        return Parts(self.work.run.parts) if self.work.run.parts else None

    def _finish(self, unit: Unit) -> None:
        self.done += unit.weights
        self.work.run.progress(self.done, self.total, unit.tensor.info.name)


def _memory(unit: Unit) -> int:
    """Bytes of the process that encodes a part."""
    return PROCESS_BYTES + unit.memory


_HELP = "tasks on a cluster of Ray; needs the extra ray"
RAY = Engine("ray", _HELP, encode_on_ray, reached, each_on_ray, shares_on_ray)
