"""One part of a compression on another machine: what it is told, and what it does."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import spectral_surgery
from spectral_surgery.engines.parts import Parts
from spectral_surgery.errors import CheckpointError, SpectralSurgeryError
from spectral_surgery.files.compressed.plan import Unit
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.compressed.units import UnitStore, read_unit, run_unit
from spectral_surgery.hub.failures import UnansweredError
from spectral_surgery.memory import keep_freed_memory

_PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN, errno.ECONNRESET})


@dataclass(frozen=True)
class Order:
    """A part to be encoded.

    Attributes:
        store: where its file goes, if this machine has that folder.
        unit: the part.
        options: of the compression.
        threads: to encode it with.
        token: name of a file in the folder, which holds its name; no other folder at that path has it.
        sizes: bytes of the files that the part is read from, of those on a disk.
        parts: where to leave it where this machine does not have that folder; None to give it back.
    """

    store: UnitStore
    unit: Unit
    options: CompressOptions
    threads: int
    token: str
    sizes: Mapping[Path, int]
    parts: Parts | None = None


@cache
def installed() -> str:
    """The version of this package, and a digest of its source."""
    folder = Path(spectral_surgery.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"{spectral_surgery.__version__} ({digest.hexdigest()[:8]})"


def carry_out(order: Order) -> bytes | None:
    """Encode a part.

    Returns:
        None when its file is in its folder now, or where parts are left; else the bytes of the file.

    Raises:
        OSError: when something went wrong that may go well another time.
        SpectralSurgeryError: when it would go wrong again.
    """
    keep_freed_memory()
    check_source(order.sizes)
    try:
        if _is_here(order):
            _encode(order)
            return None
        with tempfile.TemporaryDirectory(prefix="spectral-surgery-") as folder:
            there = replace(order, store=replace(order.store, folder=Path(folder)))
            _encode(there)
            if order.parts is not None:
                order.parts.leave(there.store, order.unit)
                return None
            return there.store.path(order.unit).read_bytes()
    except SpectralSurgeryError as error:
        cause = error.__cause__
        if isinstance(error, UnansweredError) or (isinstance(cause, OSError) and cause.errno in _PASSING):
            raise OSError(str(error)) from None
        raise


def _is_here(order: Order) -> bool:
    folder = order.store.folder
    try:
        return (folder / order.token).read_text(encoding="ascii") == order.token and os.access(folder, os.W_OK)
    except (OSError, UnicodeDecodeError):
        return False


def _encode(order: Order) -> None:
    run_unit(order.store, read_unit(order.store, order.unit), order.options, order.threads)


def check_source(sizes: Mapping[Path, int]) -> None:
    """Refuse files that are not here, or not those of the driver by their bytes."""
    for file, size in sizes.items():
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise CheckpointError(
                f"node {platform.node()}: {file}: expected the file of {size} bytes that the driver has, got"
                f" {'none' if found is None else f'one of {found}'}. Use a path that all nodes share, or a model on the"
                " Hub."
            )
