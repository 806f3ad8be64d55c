"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.lock import NO_WORK

_PIECE = 1 << 17  # bytes
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an OSError while writing ``path``, a full disk above all, into a CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(
                f"{path}: expected room for the output, got a full disk. Free some space or choose another output."
            ) from error
        raise CheckpointError(
            f"{path}: expected a writable place, got an error ({error}). Check permissions or choose another output."
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_pieces(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write data in small pieces: a large one makes Linux look for large pages, which takes up to five times longer."""
    view = memoryview(data).cast("B")
    for start in range(0, view.nbytes, _PIECE):
        file.write(view[start : start + _PIECE])


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a small file so that at any time either its old content is there or all of the new.

    Args:
        durable: wait until it is on the disk. Without, a power failure may leave a file that is cut short or has holes,
            which whoever reads it has to find out; it takes a tenth of the time.

    Raises:
        CheckpointError: when it cannot be written.
    """
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with writing_to(path):
        try:
            with fresh.open("wb") as file:
                write_pieces(file, data)
            if durable:
                sync(fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
        if durable:
            sync(path.parent)


def partial_folder(out: Path, *, overwrite: bool) -> Path:
    """Where unfinished output of ``out`` is kept; nothing is created.

    Returns:
        ``<out>.partial``; of a link, beside the folder it leads to.

    Raises:
        CheckpointError: when ``out`` is a file, or a folder that may not or could not be replaced.
    """
    with writing_to(out):
        final = out.resolve()
        partial = final.with_name(f"{final.name}.partial")
        for folder in (final, partial):
            if folder.exists() and not folder.is_dir():
                raise CheckpointError(f"{folder}: expected a folder, got a file. Choose another output.")
        if final.is_mount():
            raise CheckpointError(f"{out}: expected a folder below it, got a mount point, which cannot be replaced.")
        if not final.is_dir() or not any(final.iterdir()):
            return partial
        if not overwrite:
            raise CheckpointError(
                f"{out}: expected a new or empty folder, got one with content. Use --overwrite to replace it."
            )
        home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home raises where there is none
        if any(kept.resolve().is_relative_to(final) for kept in (Path.cwd(), home)):
            raise CheckpointError(
                f"{out}: expected any other folder, got one that holds the current or the home folder, which"
                " --overwrite does not replace."
            )
    return partial


@contextmanager
def publishing(out: Path, *, overwrite: bool, keep_partial: bool = False) -> Iterator[Path]:
    """Build a folder aside, and put it in place when the block ends without an exception.

    Args:
        out: the folder to publish; missing parents are created.
        overwrite: replace a folder with content. It stays until the new one is complete and on
            the disk, and comes back if that cannot be put in place.
        keep_partial: go on from what an earlier attempt left in ``<out>.partial``, and leave it
            there again on an exception; otherwise it is removed in both cases.

    Raises:
        CheckpointError: as `partial_folder`, and when writing or publishing fails. What was
            complete and could not be put in place is kept.
    """
    partial = partial_folder(out, overwrite=overwrite)
    done = False
    try:
        with writing_to(out):
            if partial.exists() and not keep_partial:
                shutil.rmtree(partial)
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
        done = True
    finally:
        if not (done or keep_partial):
            shutil.rmtree(partial, ignore_errors=True)
    _publish(partial, out.resolve(), overwrite=overwrite)


def discard_unfinished(partial: Path, *, overwrite: bool) -> None:
    """Clear unfinished work away, if there is any; a run that failed before its first result has left none.

    Args:
        partial: from `partial_folder`.

    Raises:
        CheckpointError: when it is not.
    """
    if not any(path.is_file() and path.name not in NO_WORK for path in partial.rglob("*")):
        return
    if not overwrite:
        raise CheckpointError(
            f"{partial.name}: expected an empty folder, got unfinished work. Use --resume to go on with it, or "
            "--overwrite to discard it."
        )
    shutil.rmtree(partial)


def clear_folder(folder: Path, *, keep: Collection[str]) -> None:
    """Remove what an attempt that was killed while writing has left; the lock stays."""
    for path in folder.iterdir():
        if path.name not in (*keep, *NO_WORK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _publish(partial: Path, out: Path, *, overwrite: bool) -> None:
    try:
        if overwrite and out.exists():
            _exchange(partial, out)
        else:
            partial.rename(out)  # replaces an empty folder, refuses any other
        sync(out.parent)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be put in place ({error}); the finished output is kept in {partial}. Rename that yourself."
        ) from error


def _exchange(partial: Path, out: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f"{out.name}.replaced-", dir=out.parent))
    old = aside / out.name
    try:
        out.rename(old)
        partial.rename(out)
    finally:
        if not out.exists():
            old.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
