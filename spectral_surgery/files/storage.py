"""Where the bytes of a checkpoint are: on this machine, or elsewhere. Nothing above this module asks which.

Files are read and never mapped: mapped pages would count as resident memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from spectral_surgery.ahead import ahead
from spectral_surgery.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from spectral_surgery.files.header import TensorInfo

PIECE = 1 << 20  # bytes given at a time: what the cache holds
_LARGEST = 16 << 20  # bytes asked of a remote file at a time
_NONE: Mapping[Path, RemoteFile] = MappingProxyType({})


class RemoteFile(Protocol):
    """A file elsewhere, of which any range can be read. Such an object can be pickled, for other processes."""

    @property
    def name(self) -> str:
        """Without the folders it is in."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def version(self) -> str:
        """A text that changes when the content does."""

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill a view with the bytes from ``start`` on.

        Raises SpectralSurgeryError when that cannot be done, after some attempts; or when it is another file by now.
        """


File = Path | RemoteFile
AHEAD = 2  # parts of a remote file that are read ahead of the one that is worked on


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint whose weights are elsewhere.

    Attributes:
        path: the folder or weight file it would be, were it here. What else is read of it lies there already.
        weights: the weight files, by the path each would have.
        names: everything else that it holds, relative to the folder, whether it lies there or not.
        label: what the user calls it.
        version: of all of it, a text that changes with any of its files.
    """

    path: Path
    weights: Mapping[Path, RemoteFile]
    names: tuple[Path, ...]
    label: str
    version: str

    @property
    def name(self) -> str:
        """The last part of what the user calls it."""
        return PurePosixPath(self.label).name

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint in files of another kind than safetensors, whose tensors somebody has found.

    Attributes:
        path: the folder with its configuration and all else that is copied.
        tensors: by name, sorted.
        files: that hold them.
        notes: what the user has to know about it, in sentences.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    label: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of what the user calls it."""
        return Path(self.label).name

    def __str__(self) -> str:
        return self.label


Checkpoint = Path | RemoteCheckpoint | FoundCheckpoint


def path_of(source: Checkpoint) -> Path:
    """The folder or file that a checkpoint is, or would be."""
    return source if isinstance(source, Path) else source.path


def here(source: Checkpoint) -> Path:
    """The path of a checkpoint that has to be on this machine as a whole. Raises ConfigError when it is elsewhere."""
    if isinstance(source, Path):
        return source
    if isinstance(source, FoundCheckpoint):
        raise ConfigError(
            f"{source}: expected safetensors, since a model is run, got another kind of file. Compress it first, or"
            " decompress that, and give the result."
        )
    raise ConfigError(f"{source}: expected on this disk, since a model is run, got it elsewhere. Download it first.")


def weights_of(source: Checkpoint) -> Mapping[Path, RemoteFile]:
    """The weight files that are elsewhere, by the path each would have."""
    return source.weights if isinstance(source, RemoteCheckpoint) else _NONE


def size_of(file: File) -> int:
    """Bytes of a file."""
    return file.stat().st_size if isinstance(file, Path) else file.size


def version_of(file: File) -> tuple[str | int, ...]:
    """What changes when a file does: name and size, and the time of a local file or the version of a remote one."""
    if isinstance(file, Path):
        status = file.stat()
        return file.name, status.st_size, status.st_mtime_ns
    return file.name, file.size, file.version


@contextmanager
def calling(source: Checkpoint) -> Iterator[None]:
    """Let errors about a checkpoint elsewhere name it as the user does, and not by a path of ours."""
    if isinstance(source, Path):
        yield
        return
    try:
        yield
    except CheckpointError as error:
        raise type(error)(str(error).replace(str(source.path), source.label)) from None


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn an OSError while reading into a CheckpointError that names the place."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{where}: expected a readable file, got an error ({error.strerror or error}). Check the path and its"
            " permissions."
        ) from error


def read_into(file: File, view: memoryview, start: int) -> None:
    """Fill a view with the bytes of a file from ``start`` on.

    Raises:
        CheckpointError: when a local file cannot be read, or ends before that.
        SpectralSurgeryError: when a remote one cannot be read.
    """
    if not isinstance(file, Path):
        file.read_into(view, start)
        return
    done = 0
    with reading(file), file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while done < view.nbytes:
            count = stream.readinto(view[done:])  # one call reads at most 2 GiB
            if not count:
                raise CheckpointError(
                    f"{file}: expected a file that does not change, got one that ends {view.nbytes - done} bytes"
                    " before what is wanted of it. Download it again."
                )
            done += count


def pieces_of(file: File, start: int, stop: int) -> Iterator[memoryview]:
    """A range of the bytes of a file, PIECE at a time.

    A remote file is asked for more and more at a time, and for the next part while the one before is used; whoever
    stops early has moved little for nothing.

    Raises SpectralSurgeryError as `read_into`.
    """
    if isinstance(file, Path):
        for begin in range(start, stop, PIECE):
            yield _range_of(file, begin, min(begin + PIECE, stop))
        return
    for _, data in ahead(lambda part: _range_of(file, *part), _growing(start, stop), 1):
        for begin in range(0, data.nbytes, PIECE):
            yield data[begin : begin + PIECE]


def _growing(start: int, stop: int) -> Iterator[tuple[int, int]]:
    size = PIECE
    while start < stop:
        yield start, min(start + size, stop)
        start, size = start + size, min(2 * size, _LARGEST)


def _range_of(file: File, start: int, stop: int) -> memoryview:
    view = memoryview(bytearray(stop - start))
    read_into(file, view, start)
    return view
