"""Headers first, then only the files that are needed."""

from __future__ import annotations

import glob
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spectral_surgery.errors import CheckpointError, HubError
from spectral_surgery.files.compressed.manifest import FILE_NAME
from spectral_surgery.files.header import HEADER_LIMIT, read_json
from spectral_surgery.files.index import INDEX_FILE, SINGLE_FILE, read_index
from spectral_surgery.files.merge_record import FOLDER as MERGE_FOLDER
from spectral_surgery.hub.failures import UnansweredError, reaching, retrying
from spectral_surgery.hub.listing import Listing, RemoteFile, first_bytes, list_files
from spectral_surgery.hub.repository import Repository, remote

_READ_WHOLE = ("config.json", "adapter_config.json", INDEX_FILE, FILE_NAME)
_FIRST = 1 << 15  # bytes of a weight file fetched at once; most headers end within
_CONNECTIONS = 8
_PIECE = 1 << 20
_OWN_CACHE = ".cache"  # where huggingface_hub remembers unfinished files of a folder


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk.

    Attributes:
        path: folder or file.
        whole: whether the weights are there; otherwise files have their length, their header, and holes.
    """

    path: Path
    whole: bool


@contextmanager
def outline(source: str, *, revision: str | None = None, token: str | None = None) -> Iterator[Found]:
    """A checkpoint to read headers of; of a repository, without downloading weights.

    The outline of a repository is a temporary folder whose weight files have their true length and header, fetched
    by range requests, and holes where the data would be. So headers are checked as those of local files are.

    Yields:
        Where it is. A path is given as it is; a repository that cannot be reached, as it is in the cache.

    Raises:
        HubError: when the repository cannot be read.
    """
    repository = remote(source, revision)
    if repository is None:
        yield Found(Path(source).expanduser(), whole=True)
        return
    listing = _listed_or_cached(repository, token)
    if isinstance(listing, Path):
        yield Found(listing, whole=True)
        return
    with tempfile.TemporaryDirectory(prefix="spectral-surgery-") as scratch:
        folder = Path(scratch) / repository.name.rpartition("/")[2]
        _draw(listing, folder, token)
        try:
            yield Found(_at(folder, listing), whole=False)
        except CheckpointError as error:  # about the repository, not about our scratch
            raise type(error)(str(error).replace(str(folder), str(repository))) from None


def resolve(source: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Find a checkpoint on disk, fetching it from the Hub when the source names a repository.

    Headers are read first, so that a repository without usable weights is refused before anything is downloaded. Then
    the weights in safetensors and the files beside them are fetched into the cache, and no other formats.

    Args:
        source: a folder, a file, ``org/name``, ``org/name@revision`` or ``hf://org/name[@revision][/path]``. What
            exists on disk is a path.
        revision: branch, tag or commit; overrides the one in source.
        token: instead of the one that is logged in.

    Returns:
        A local path; for anything that does not look like a repository, the path as given.

    Raises:
        CheckpointError: when the repository holds no usable checkpoint.
        HubError: when it cannot be fetched.
    """
    repository = remote(source, revision)
    if repository is None:
        return Path(source).expanduser()
    listing = _listed_or_cached(repository, token)
    if isinstance(listing, Path):
        return listing
    names = [listing.inside(name) for name in needed(listing, token)]
    from huggingface_hub import snapshot_download

    with reaching(repository):
        folder = retrying(
            lambda: snapshot_download(
                repository.name,
                revision=repository.revision,
                allow_patterns=[glob.escape(name) for name in names],
                token=token,
            )
        )
    return Path(folder, repository.path)


def needed(listing: Listing, token: str | None = None) -> list[str]:
    """The files of a checkpoint and beside it, without weights in other formats; judged from headers.

    Raises:
        CheckpointError: when there is no usable checkpoint.
        HubError: when headers cannot be read.
    """
    repository = listing.repository
    if repository.path.endswith(".safetensors"):
        return list(listing.files)
    with tempfile.TemporaryDirectory(prefix="spectral-surgery-") as scratch:
        folder = Path(scratch) / "outline"
        _draw(listing, folder, token)
        try:
            index = read_index(folder, adapters=True)
        except CheckpointError as error:
            raise type(error)(str(error).replace(str(folder), str(repository))) from None
        names = {file.relative_to(folder).as_posix() for file in index.files if isinstance(file, Path)}
    names |= {path.as_posix() for path in index.other_files}
    names |= {name for name in listing.files if name == INDEX_FILE or name.startswith(f"{MERGE_FOLDER}/")}
    return sorted(names)


def fetch(listing: Listing, names: Iterable[str], folder: Path, *, token: str | None = None) -> None:
    """Download files into a folder and check their hashes; goes on with what an earlier attempt left there.

    Args:
        listing: of the repository.
        names: which of its files.
        folder: where to; in the end it holds exactly these files.
        token: instead of the one that is logged in.

    Raises:
        HubError: when a file cannot be fetched or does not have its hash. It is fetched anew the next time.
    """
    from huggingface_hub import snapshot_download

    repository, wanted = listing.repository, sorted(names)
    with reaching(repository):
        retrying(
            lambda: snapshot_download(
                repository.name,
                revision=listing.commit,
                allow_patterns=[glob.escape(listing.inside(name)) for name in wanted],
                local_dir=folder,
                token=token,
            )
        )
    wrong = [name for name in wanted if not _has_hash(folder / listing.inside(name), listing.files[name])]
    for name in wrong:
        (folder / listing.inside(name)).unlink(missing_ok=True)
    if wrong:
        raise HubError(
            f"{repository}: {wrong[0]} does not have the hash the Hub lists"
            f"{f', nor have {len(wrong) - 1} more' if len(wrong) > 1 else ''}; expected files as they were uploaded."
            " Run the command again."
        )
    shutil.rmtree(folder / _OWN_CACHE, ignore_errors=True)
    kept = set()
    for name in wanted:
        kept.add(folder / name)
        if listing.folder:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / listing.inside(name)).replace(folder / name)
    for path in sorted(folder.rglob("*"), reverse=True):  # children before their folder
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif not path.is_dir() and path not in kept:
            path.unlink()


def _listed_or_cached(repository: Repository, token: str | None) -> Listing | Path:
    """The listing, or what the cache has when there is no answer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return list_files(repository, token)
    except UnansweredError as error:
        unanswered = error
    try:
        folder = snapshot_download(repository.name, revision=repository.revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        # what we fetched is a part of the repository on purpose
        folder = getattr(error, "snapshot_path", None)
    if folder is None or not Path(folder, repository.path).exists():
        if HF_HUB_OFFLINE:
            raise HubError(
                f"{repository}: is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; expected what was"
                " fetched before. Unset HF_HUB_OFFLINE once."
            )
        raise unanswered
    return Path(folder, repository.path)


def _at(folder: Path, listing: Listing) -> Path:
    path = listing.repository.path
    return folder / path.rpartition("/")[2] if path.endswith(".safetensors") else folder


def _draw(listing: Listing, folder: Path, token: str | None) -> None:
    """Write the outline of a repository."""
    for name in listing.files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in _READ_WHOLE:
        if name in listing.files:
            size = min(listing.files[name].size, HEADER_LIMIT)
            (folder / name).write_bytes(first_bytes(listing, name, 0, size, token))
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(lambda name: _draw_header(listing, name, folder / name, token), _weight_files(listing, folder)))


def _weight_files(listing: Listing, folder: Path) -> list[str]:
    """Which weight files the index of a checkpoint may look at."""
    top = {name for name in listing.files if name.endswith(".safetensors") and "/" not in name}
    if INDEX_FILE in listing.files:
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        return sorted((shards | {SINGLE_FILE}) & listing.files.keys())
    return [SINGLE_FILE] if SINGLE_FILE in top and not listing.repository.path.endswith(".safetensors") else sorted(top)


def _draw_header(listing: Listing, name: str, path: Path, token: str | None) -> None:
    size = listing.files[name].size
    data = first_bytes(listing, name, 0, min(size, _FIRST), token)
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end <= min(size, HEADER_LIMIT):
        data += first_bytes(listing, name, len(data), end, token)
    with path.open("wb") as stream:
        stream.write(data[:end] if end <= len(data) else data)
        stream.truncate(size)


def _has_hash(path: Path, listed: RemoteFile) -> bool:
    if not path.is_file() or path.stat().st_size != listed.size:
        return False
    if listed.sha256 is None and not listed.blob_id:
        return True
    # a file that is not large is a git blob, whose hash is SHA-1 of "blob <size>\0" and the content
    blob = f"blob {listed.size}\0".encode()
    digest = hashlib.sha256() if listed.sha256 else hashlib.sha1(blob, usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest() == (listed.sha256 or listed.blob_id)
