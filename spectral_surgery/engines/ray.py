"""A cluster of Ray: one task for each part, which reads its weights and leaves its file, or gives it to us to be left.

A part is the same bytes wherever and however often it is encoded, so a task whose node is lost is done again elsewhere.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from spectral_surgery.engines.base import Engine, Work
from spectral_surgery.engines.part import Order, installed
from spectral_surgery.errors import BackendError, CheckpointError, SpectralSurgeryError
from spectral_surgery.files.atomic import replace_file, writing_to
from spectral_surgery.files.compressed.plan import Unit
from spectral_surgery.files.compressed.units import is_done
from spectral_surgery.files.storage import size_of
from spectral_surgery.run import Run

_TRIES = 8  # times that a part is begun again: its node is lost, or its bytes cannot be read for now
_PER_PROCESSOR = 2  # tasks that are asked for at once, so that no processor waits for the next one
_FEWEST = 4
PROCESS_BYTES = 700_000_000  # of a process with torch and the kernels, before it has a part
_PATIENCE = 10.0  # seconds without a result before we look whether any node can take a part
_KEPT = "Finished parts are kept: run again with --resume."

Task = Callable[[str, bytes], bytes | str | None]


@contextmanager
def reached(run: Run) -> Iterator[None]:
    """Be connected to the cluster; one that this process is connected to already is used, and stays so.

    Raises:
        BackendError: when Ray is not installed, or the cluster does not answer.
    """
    if find_spec("ray") is None:
        raise BackendError('--engine ray: expected Ray, got none. Run pip install "spectral-surgery[ray]".')
    import ray

    if ray.is_initialized():
        yield
        return
    _connect(run.ray_address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    what = f"--ray-address {address}: expected the address of a cluster such as 10.0.0.1:6379, got"
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()  # Ray would try for minutes
        more = {} if address else {"include_dashboard": False}
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **more)
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # ConnectionError is an OSError
        reason = " ".join(str(error).split())[:200]
        raise BackendError(f"{what} one that does not answer ({reason}). Start it there with ray start.") from None
    except SystemExit:  # what Ray ends with when somebody else answers
        raise BackendError(f"{what} something that is not Ray. Start it there with ray start.") from None


def encode_on_ray(work: Work) -> bool:
    """Encode all parts by tasks of the cluster.

    Raises:
        BackendError: when a node has another version of this package, or the cluster fails.
        SpectralSurgeryError: what went wrong with a part, as in one process.
    """
    import ray

    units = work.units()
    with _token(work.store.folder) as token:
        _Tasks(work, ray.remote(_task()), sum(unit.weights for unit in units), token).all(units)
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


def _task() -> Task:
    """What a worker does. It is sent as it is, and imports nothing of this package before it has compared versions."""

    def encode_part(version: str, order: bytes) -> bytes | str | None:
        from platform import node

        from ray import cloudpickle

        try:
            from spectral_surgery.engines.part import carry_out, installed

            found = installed()
        except ImportError as error:
            found = f"another one ({error})"
        if found != version:
            return (
                f"--engine ray: expected spectral-surgery {version} on every node, got {found} on {node()}. Install"
                " the same one there."
            )
        return carry_out(cloudpickle.loads(order))

    return encode_part


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
        warned: whether it was said that no node can take a part.
    """

    work: Work
    task: Any
    total: int
    token: str
    pending: dict[Any, Unit] = field(default_factory=dict)
    done: int = 0
    warned: bool = False

    def all(self, units: list[Unit]) -> None:
        """Ask for one part after the other, a few ahead of the processors, and take what is finished."""
        import ray

        try:
            for unit in units:
                if is_done(self.work.store, unit):
                    self._finish(unit)
                    continue
                while len(self.pending) >= self._window():
                    self._take()
                self._ask(unit)
            while self.pending:
                self._take()
        finally:
            for reference in self.pending:  # none, unless we were interrupted or something went wrong
                ray.cancel(reference)

    def _window(self) -> int:
        import ray

        processors = int(ray.cluster_resources().get("CPU", 0))  # nodes come and go
        return max(_FEWEST, _PER_PROCESSOR * (processors // self.work.run.threads))

    def _ask(self, unit: Unit) -> None:
        from ray import cloudpickle

        infos = [info for info in (unit.tensor.info, unit.tensor.base) if info is not None]
        sizes = {info.file: size_of(info.file) for info in infos if isinstance(info.file, Path)}
        store, run = self.work.store, self.work.run
        order = Order(store, unit, self.work.plan.options, run.threads, self.token, sizes)
        task = self.task.options(
            name=f"{unit.tensor.info.name} {unit.part} {store.key[:12]}",
            num_cpus=run.threads,
            memory=_memory(unit),
            max_retries=_TRIES,
            retry_exceptions=[OSError],
        )
        self.pending[task.remote(installed(), cloudpickle.dumps(order))] = unit

    def _take(self) -> None:
        """Wait for a part, and leave its file if its node could not."""
        import ray

        ready, _ = ray.wait(list(self.pending), timeout=_PATIENCE)
        if not ready:
            self._look_for_room()
        for reference in ready:
            unit = self.pending[reference]
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                raise _explained(error, unit) from None
            if isinstance(result, str):
                raise BackendError(result)
            if result is not None:
                replace_file(self.work.store.path(unit), result, durable=False)
            del self.pending[reference]
            self._finish(unit)

    def _finish(self, unit: Unit) -> None:
        self.done += unit.weights
        self.work.run.progress(self.done, self.total, unit.tensor.info.name)

    def _look_for_room(self) -> None:
        """Say once when no node has what a part needs: it may come, or never."""
        import ray

        needed = {"CPU": self.work.run.threads, "memory": _memory(next(iter(self.pending.values())))}
        there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = any(all(node.get(kind, 0) >= amount for kind, amount in needed.items()) for node in there)
        if not fits and not self.warned:
            self.warned = True
            self.work.run.note(
                f"warning: --engine ray: expected a node with {needed['CPU']} processors and"
                f" {needed['memory'] / 1e9:.1f} GB, got none of {len(there)}. Waiting for one; fewer --threads need"
                " fewer processors."
            )


def _memory(unit: Unit) -> int:
    """Bytes of the process that encodes a part."""
    return PROCESS_BYTES + unit.memory


def _explained(error: Exception, unit: Unit) -> Exception:
    """What went wrong with a part, in one line; a fault of ours stays as it is."""
    from ray import exceptions

    cause = getattr(error, "cause", None)
    if isinstance(cause, SpectralSurgeryError):
        return cause
    where = f"{unit.tensor.info.name}, part {unit.part}"
    if isinstance(cause, OSError):
        return CheckpointError(f"{where}: {cause} {_KEPT}")
    if cause is not None:
        return error
    reasons = {
        exceptions.OutOfMemoryError: "its process was stopped for memory; expected more of it",
        exceptions.ObjectStoreFullError: "the object store is full; expected room for a part",
        exceptions.OutOfDiskError: "the disk of the object store is full; expected room for a part",
        exceptions.TaskCancelledError: "it was cancelled; expected that nobody does",
        exceptions.WorkerCrashedError: f"its process or node was lost {_TRIES + 1} times; expected one that stays",
        exceptions.NodeDiedError: f"its process or node was lost {_TRIES + 1} times; expected one that stays",
    }
    told = " ".join(str(error).split())[:200]
    reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), f"Ray failed ({told})")
    return BackendError(f"--engine ray: {where}: {reason}. {_KEPT}")


RAY = Engine("ray", "tasks on a cluster of Ray; needs the extra ray", encode_on_ray, reached)
