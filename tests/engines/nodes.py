"""Nodes of a cluster of Ray, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spectral_surgery.run import Run

NODE = {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": 80 << 20}


@contextmanager
def another_node(cluster: Any, **more: object) -> Iterator[Any]:
    node = cluster.add_node(**NODE | more)
    try:
        yield node
    finally:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


def on(cluster: Any, **more: Any) -> Run:
    return Run(engine="ray", ray_address=cluster.address, **more)
