"""Work of this package on the nodes of a cluster of Ray: reaching it, calling functions there, and what goes wrong."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from spectral_surgery.engines.base import Calls
from spectral_surgery.engines.part import installed
from spectral_surgery.engines.parts import Parts
from spectral_surgery.errors import BackendError, CheckpointError, SpectralSurgeryError
from spectral_surgery.run import Run

TRIES = 8  # times that something is begun again: its node is lost, or its bytes cannot be read for now
PROCESS_BYTES = 700_000_000  # of a process with torch and the kernels, before it has a part
PATIENCE = 10.0  # seconds without a result before we look whether any node can take what is asked for


@contextmanager
def reached(run: Run) -> Iterator[None]:
    """Be connected to the cluster; one that this process is connected to already is used, and stays so.

    Raises:
        BackendError: when Ray is not installed, or the cluster does not answer.
        SpectralSurgeryError: when parts cannot be left where they are asked for.
    """
    if find_spec("ray") is None:
        raise BackendError('--engine ray: expected Ray, got none. Run pip install "spectral-surgery[ray]".')
    import ray

    if run.parts:
        Parts(run.parts).check()
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
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()  # Ray would try for minutes
        more = {} if address else {"include_dashboard": False}
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **more)
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # ConnectionError is an OSError
        reason = " ".join(str(error).split())[:200]
        raise BackendError(f"{what} one that does not answer ({reason}). Start it there with ray start.") from None
    except SystemExit:  # what Ray ends with when somebody else answers
        raise BackendError(f"{what} something that is not Ray. Start it there with ray start.") from None


def calling() -> Callable[[str, bytes], Any]:
    """What a worker does: calls what it is sent, a pickled function without arguments.

    It is sent as it is, and imports nothing of this package before it has compared versions; a worker with another one
    raises ImportError.
    """

    def call(version: str, work: bytes) -> Any:
        from platform import node

        from ray import cloudpickle

        try:
            from spectral_surgery.engines.part import installed

            found = installed()
        except ImportError as error:
            found = f"another one ({error})"
        if found != version:
            raise ImportError(
                f"--engine ray: expected spectral-surgery {version} on every node, got {found} on {node()}. Install"
                " the same one there."
            )
        return cloudpickle.loads(work)()

    return call


def places(threads: int) -> int:
    """How many processes with that many threads each the nodes have processors for, now: nodes come and go."""
    import ray

    return sum(int(node["Resources"].get("CPU", 0)) // threads for node in ray.nodes() if node["Alive"])


@dataclass
class Room:
    """Whether there is a node for what is waited for.

    Attributes:
        run: how the work is carried out.
        told: whether it was said that there is none.
    """

    run: Run
    told: bool = False

    def look(self, memory: int) -> None:
        """Say once when no node, were it free, has the processors and so many bytes: it may come, or never."""
        import ray

        there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        threads = self.run.threads
        if self.told or any(node.get("CPU", 0) >= threads and node.get("memory", 0) >= memory for node in there):
            return
        self.told = True
        self.run.note(
            f"warning: --engine ray: expected a node with {threads} processors and {memory / 1e9:.1f} GB, got none of"
            f" {len(there)}. Waiting for one; fewer --threads need fewer processors."
        )


def each_on_ray(run: Run, calls: Calls, memory: int) -> Iterator[tuple[int, Any]]:
    """Call each in a task of its own; see `Engine`."""
    import ray
    from ray import cloudpickle

    task, room = ray.remote(calling()).options(num_cpus=run.threads, memory=memory, max_retries=TRIES), Room(run)
    waiting = {task.remote(installed(), cloudpickle.dumps(call)): number for number, call in enumerate(calls)}
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=PATIENCE)
            if not ready:
                room.look(memory)
            for reference in ready:
                number = waiting.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    result = explained(error, f"task {number + 1} of {len(calls)}")
                    if not isinstance(result, SpectralSurgeryError):
                        raise
                yield number, result
    finally:
        for reference in waiting:
            ray.cancel(reference)


def explained(error: Exception, where: str) -> Exception:
    """What went wrong with something that was asked for, in one line; a fault of ours stays as it is."""
    from ray import exceptions

    cause = getattr(error, "cause", None)
    if isinstance(cause, SpectralSurgeryError):
        return cause
    if isinstance(cause, ImportError):
        return BackendError(str(cause))
    kept = "Finished parts are kept: run again with --resume."
    if isinstance(cause, OSError):
        return CheckpointError(f"{where}: {cause} {kept}")
    if cause is not None:
        return error
    lost = f"its process or node was lost {TRIES + 1} times; expected one that stays"
    reasons = {
        exceptions.OutOfMemoryError: "its process was stopped for memory; expected more of it",
        exceptions.ObjectStoreFullError: "the object store is full; expected room for a part",
        exceptions.OutOfDiskError: "the disk of the object store is full; expected room for a part",
        exceptions.TaskCancelledError: "it was cancelled; expected that nobody does",
        exceptions.WorkerCrashedError: lost,
        exceptions.NodeDiedError: lost,
        exceptions.RayActorError: lost,
    }
    told = " ".join(str(error).split())[:200]
    reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), f"Ray failed ({told})")
    return BackendError(f"--engine ray: {where}: {reason}. {kept}")
