"""A place that all nodes of a cluster reach, where they leave parts: any URL that fsspec knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from spectral_surgery.errors import BackendError, CheckpointError, ConfigError
from spectral_surgery.files.compressed.plan import Unit
from spectral_surgery.files.compressed.units import UnitStore


@dataclass(frozen=True)
class Parts:
    """Part files at a URL. Their names carry the key of the work, so that works may share it."""

    url: str

    def check(self) -> None:
        """Write there, and remove it again.

        Raises:
            ConfigError: when it is no URL that is known.
            BackendError: when a package is missing.
            CheckpointError: when it cannot be written.
        """
        name = f"{uuid4().hex}.token"
        self._write(name, b"")
        with self._at(name) as (system, path):
            system.rm_file(path)

    def leave(self, store: UnitStore, unit: Unit) -> None:
        """Copy the file of a part there."""
        self._write(_name(store, unit), store.path(unit).read_bytes())

    def fetch(self, store: UnitStore, unit: Unit) -> bytes | None:
        """The file of a part; None when it is not there."""
        with self._at(_name(store, unit)) as (system, path):
            return bytes(system.cat_file(path)) if system.exists(path) else None

    def remove(self, store: UnitStore) -> None:
        """Remove all parts of a work."""
        with self._at("") as (system, path):
            for file in system.glob(f"{path.rstrip('/')}/{store.key[:16]}-*.unit"):
                system.rm_file(file)

    def _write(self, name: str, data: bytes) -> None:
        with self._at(name) as (system, path):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.pipe_file(path, data)

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[Any, str]]:
        from fsspec.core import url_to_fs

        where = f"--parts {self.url}: expected"
        try:
            yield url_to_fs(f"{self.url.rstrip('/')}/{name}")
        except ImportError as error:
            raise BackendError(f"{where} a package for it, got none ({error}).") from None
        except OSError as error:
            told = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{where} a place to write to, got an error ({told}).") from error
        except (ValueError, NotImplementedError) as error:
            kind = f"{where} a URL such as s3://bucket/folder or file:///shared/folder, got another one"
            raise ConfigError(f"{kind} ({error}).") from None


def _name(store: UnitStore, unit: Unit) -> str:
    return f"{store.key[:16]}-{unit.ordinal:06d}.unit"
