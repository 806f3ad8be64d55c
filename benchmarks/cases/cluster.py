"""compress on a cluster of Ray whose nodes are processes of this machine: two nodes of one core over one.

Ray is started before, and every node has encoded something, so that what is timed is the work. The bytes are compared
with those of one process first.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import Inputs, Row, require
from benchmarks.cases.engine import generate
from benchmarks.scale import Rates, on_paper
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.errors import BackendError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run

SPEEDUP = 1.6
ROUNDS = 3
_WEIGHTS = 16 << 20  # of each matrix
_STORE = 200_000_000  # bytes of the object store of a node
_OPTIONS = CompressOptions(Target("bits", 4.0))


@dataclass(frozen=True)
class Stages:
    """Seconds of one compression.

    Attributes:
        encode: from the beginning to the last part.
        join: from there to the end.
        driver: of the processor, in this process, during the first.
    """

    encode: float
    join: float
    driver: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.encode + self.join


def run(inputs: Inputs) -> list[Row]:
    """Time one node and two in turn, and compute from the rates what a large model takes."""
    if find_spec("ray") is None:
        raise BackendError('bench ray: expected Ray, got none. Run pip install "spectral-surgery[ray]".')
    nbytes = 250_000_000 if inputs.quick else 2_000_000_000
    with tempfile.TemporaryDirectory(dir=inputs.scratch) as name:
        scratch = Path(name)
        source, warm = generate(scratch / "source", nbytes), generate(scratch / "warm", 0)
        compress(source, scratch / "local", _OPTIONS)
        taken: dict[int, list[Stages]] = {1: [], 2: []}
        with _cluster() as cluster:
            for _ in range(ROUNDS):
                for nodes, stages in taken.items():
                    with _nodes(cluster, nodes):
                        _timed(warm, scratch / "out")
                        stages.append(_timed(source, scratch / "out", scratch / "local"))
        size = sum(file.stat().st_size for file in (scratch / "local").iterdir())
    matrices = nbytes // (2 * _WEIGHTS)
    return rows(taken, matrices * _WEIGHTS, size, 2 * matrices)


def rows(taken: dict[int, list[Stages]], weights: int, size: int, parts: int) -> list[Row]:
    """The figures, of a source of so many weights and parts, and a result of so many bytes."""
    ratio = median(one.total / two.total for one, two in zip(taken[1], taken[2], strict=True))
    found = [
        (f"seconds, {nodes} node{'s' * (nodes > 1)} of one core", median(one.total for one in stages))
        for nodes, stages in taken.items()
    ]
    rates = Rates(
        weights / median(one.encode for one in taken[1]),
        size / median(one.join for stages in taken.values() for one in stages),
        median(one.driver for stages in taken.values() for one in stages) / parts,
    )
    found += [
        ("M weights a second of a core", rates.encode / 1e6),
        ("MB of the result a second, joined", rates.join / 1e6),
        ("ms of the driver's processor a part", rates.ask * 1e3),
    ]
    shown: list[Row] = [{"what": what, "found": round(value, 2), "target": "", "met": ""} for what, value in found]
    speedup: Row = {"what": "one node over two", "found": round(ratio, 2), "target": f">= {SPEEDUP}"}
    return [*shown, speedup | {"met": ratio >= SPEEDUP}, *on_paper(rates)]


def _timed(source: Path, out: Path, expected: Path | None = None) -> Stages:
    """Compress, on the cluster that we are connected to, and compare."""
    marks = [(time.perf_counter(), time.process_time())]

    def mark(done: int, total: int, what: str) -> None:  # noqa: ARG001 - as progress is told
        marks.append((time.perf_counter(), time.process_time()))

    compress(source, out, _OPTIONS, run=Run(engine="ray", progress=mark))
    ended = time.perf_counter()
    if expected is not None:
        same = all((out / file.name).read_bytes() == file.read_bytes() for file in expected.iterdir())
        require(same, "the cluster wrote other bytes than one process")
    shutil.rmtree(out)
    (started, before), (encoded, after) = marks[0], marks[-1]
    return Stages(encoded - started, ended - encoded, after - before)


@contextmanager
def _cluster() -> Iterator[Any]:
    """A head that does no work."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": _STORE, "include_dashboard": False}
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
