"""The client of the loopback Hub, with variables of the environment as keywords."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hub_server import client
from tests.hub_server.client import Done

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Client:
    """Runs commands, one at a time, each with its own variables."""

    inner: client.Client

    def __call__(self, *arguments: object, **environment: str | None) -> Done:
        return self.inner.run(*arguments, environment=environment)

    def result(self, *arguments: object, **environment: str | None) -> dict[str, Any]:
        return self(*arguments, "--json", "--quiet", **environment).json()

    @property
    def said(self) -> Path:
        return self.inner.said

    @property
    def home(self) -> Path:
        return self.inner.home

    @property
    def pid(self) -> int:
        return self.inner.process.pid


@contextmanager
def running(folder: Path, endpoint: str, **environment: str) -> Iterator[Client]:
    with client.running(folder, endpoint, environment) as inner:
        yield Client(inner)
