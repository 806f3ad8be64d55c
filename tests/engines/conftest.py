"""A cluster of Ray whose nodes are processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.nodes import NODE


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that does no work, and two nodes of one processor."""
    import ray
    from ray.cluster_utils import Cluster

    # on a busy machine nobody waits for everybody else, is taken for dead too soon, or stopped for memory of others
    config = {"worker_niceness": 0, "memory_monitor_refresh_ms": 0, "health_check_failure_threshold": 10}
    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False, "_system_config": config}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node(**NODE)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def connected(cluster: Any) -> Any:
    """The same, that this process is connected to: workers that have imported torch stay."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    return cluster
