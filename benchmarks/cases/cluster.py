"""compress on a cluster of Ray whose nodes are processes of this machine: two nodes of one core over one.

Ray is started before, and every node has encoded something, so that what is timed is the work. The bytes are compared
with those of one process first. Rates of one core are of its processor time in that process, whoever else is busy here.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import Inputs, Row, require
from benchmarks.cases.engine import generate
from benchmarks.language_model import Size, write_model
from benchmarks.scale import Rates, on_paper
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.errors import BackendError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import EngineName, Run

SPEEDUP = 1.6
ROUNDS = 3
FULL, QUICK = 60, 4  # matrices of 34 MB
_WEIGHTS = 16 << 20  # of each
_WARM = Size(64, 64, 4, 1024)
_STORE = 200_000_000  # bytes of the object store of a node
_OPTIONS = CompressOptions(Target("bits", 4.0))


@dataclass(frozen=True)
class Taken:
    """What one compression took.

    Attributes:
        seconds: all of it, by the clock.
        encode: of the processor of this process, from the beginning to the last part.
        join: of the same, from there to the end.
        part: of the same, for each part after the first.
    """

    seconds: float
    encode: float
    join: float
    part: float


def run(inputs: Inputs) -> list[Row]:
    """Time one node and two in turn, and compute from the rates what a large model takes."""
    if find_spec("ray") is None:
        raise BackendError('bench ray: expected Ray, got none. Run pip install "spectral-surgery[ray]".')
    matrices, rounds = (QUICK, 1) if inputs.quick else (FULL, ROUNDS)
    with tempfile.TemporaryDirectory(dir=inputs.scratch) as name:
        scratch = Path(name)
        source, warm = generate(scratch / "source", 2 * _WEIGHTS * matrices), write_model(scratch / "warm", _WARM)
        _timed(warm, scratch / "out", "local")  # what is compiled and cached, once
        alone = _timed(source, scratch / "local", "local")
        together: dict[int, list[Taken]] = {1: [], 2: []}
        with _cluster() as cluster:
            for _ in range(rounds):
                for nodes, all_of in together.items():
                    with _nodes(cluster, nodes):
                        _timed(warm, scratch / "out", "ray")
                        all_of.append(_timed(source, scratch / "out", "ray", scratch / "local"))
        size = sum(file.stat().st_size for file in (scratch / "local").iterdir())
    return rows(alone, together, matrices, size)


def rows(alone: Taken, together: Mapping[int, Sequence[Taken]], matrices: int, size: int) -> list[Row]:
    """The figures.

    Args:
        alone: what one process took, with one thread.
        together: what one node took, and two.
        matrices: of the source.
        size: bytes of the result.
    """
    ratio = median(one.seconds / two.seconds for one, two in zip(together[1], together[2], strict=True))
    ask = median(one.part for all_of in together.values() for one in all_of)
    rates = Rates(matrices * _WEIGHTS / alone.encode, size / alone.join, ask)
    found = [
        ("seconds, one node of one core", median(one.seconds for one in together[1])),
        ("seconds, two nodes", median(two.seconds for two in together[2])),
        ("M weights a second of a core", rates.encode / 1e6),
        ("MB of the result a second of a core, joined", rates.join / 1e6),
        ("ms of the driver's core, a part", rates.ask * 1e3),
    ]
    shown: list[Row] = [{"what": what, "found": round(value, 2), "target": "", "met": ""} for what, value in found]
    speedup: Row = {"what": "one node over two", "found": round(ratio, 2), "target": f">= {SPEEDUP}"}
    return [*shown, speedup | {"met": ratio >= SPEEDUP}, *on_paper(rates)]


def _timed(source: Path, out: Path, engine: EngineName, expected: Path | None = None) -> Taken:
    """Compress; on the cluster that we are connected to, or here by one thread."""
    shutil.rmtree(out, ignore_errors=True)
    marks = [time.process_time()]

    def mark(done: int, total: int, what: str) -> None:  # noqa: ARG001 - as progress is told
        marks.append(time.process_time())

    started = time.perf_counter()
    compress(source, out, _OPTIONS, run=Run(engine=engine, progress=mark))
    seconds, ended = time.perf_counter() - started, time.process_time()
    if expected is not None:
        same = all((out / file.name).read_bytes() == file.read_bytes() for file in expected.iterdir())
        require(same, "the cluster wrote other bytes than one process")
    started_at, first, *_, last = marks
    return Taken(seconds, last - started_at, ended - last, (last - first) / (len(marks) - 2))


@contextmanager
def _cluster() -> Iterator[Any]:
    """A head that does no work."""
    import ray
    from ray.cluster_utils import Cluster

    config = {"worker_niceness": 0}  # by default whoever else is busy comes first
    head = {"num_cpus": 0, "object_store_memory": _STORE, "include_dashboard": False, "_system_config": config}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def _nodes(cluster: Any, count: int) -> Iterator[None]:
    """So many nodes of one core."""
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=_STORE) for _ in range(count)]
    try:
        yield
    finally:
        for node in nodes:
            cluster.remove_node(node)
