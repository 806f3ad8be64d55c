"""One Hub and one client for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import TOKEN, LoopbackHub, serving
from tests.support.hub_client import Client, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with serving(tmp_path_factory.mktemp("hub") / "objects") as hub:
        yield hub


@pytest.fixture(scope="session")
def client(server: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running(tmp_path_factory.mktemp("client"), server.endpoint, HF_TOKEN=TOKEN) as client:
        yield client


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """The Hub, without faults, repositories and content of other tests."""
    server.reset()
    server.repos.clear()
    server.objects = tmp_path / "objects"
    server.objects.mkdir()
    return server
