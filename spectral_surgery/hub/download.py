"""Headers first, then only the files that are needed, or only ranges of them."""

from __future__ import annotations

import glob
import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from spectral_surgery.errors import HubError
from spectral_surgery.files.compressed.manifest import FILE_NAME
from spectral_surgery.files.header import read_json
from spectral_surgery.files.index import INDEX_FILE, SINGLE_FILE, other_files, read_index
from spectral_surgery.files.merge_record import FOLDER as MERGE_FOLDER
from spectral_surgery.files.pickled import PICKLED_ENDINGS, PICKLED_NAME
from spectral_surgery.files.storage import Checkpoint, RemoteCheckpoint, calling
from spectral_surgery.hub.failures import UnansweredError, reaching, retrying
from spectral_surgery.hub.listing import Listing, RemoteFile, list_files
from spectral_surgery.hub.ranges import file_of
from spectral_surgery.hub.repository import Repository, remote

_READ_WHOLE = ("config.json", "adapter_config.json", INDEX_FILE, FILE_NAME)
_PIECE = 1 << 20
_OWN_CACHE = ".cache"  # where huggingface_hub remembers unfinished files of a folder


def locate(
    source: str, *, revision: str | None = None, token: str | None = None, companions: bool = True
) -> Checkpoint:
    """Find a checkpoint without downloading its weights; any range of them can be read afterwards.

    Files without weights are fetched into the cache. What is in the cache whole is read from there.

    Args:
        source: as for `resolve`.
        companions: also fetch what is copied beside weights, such as the tokenizer; without, only what headers are
            read with.

    Returns:
        A local path, or a checkpoint elsewhere, pinned to one commit.

    Raises:
        CheckpointError: when the repository has no weights in safetensors.
        HubError: when it cannot be read.
    """
    repository = remote(source, revision)
    if repository is None:
        return Path(source).expanduser()
    listing = _listed_or_cached(repository, token)
    if isinstance(listing, Path):
        return listing
    found = _elsewhere(listing, token)
    if companions:
        others, _ = other_files(found.path, (found.path / name for name in found.names))
        merges = [name for name in found.names if name.parts[0] == MERGE_FOLDER]
        _fetched(listing, [name.as_posix() for name in (*others, *merges)], token)
    whole = all(path.is_file() and path.stat().st_size == file.size for path, file in found.weights.items())
    return found.path if whole else found


def fetch_foreign(
    source: str, *, revision: str | None = None, token: str | None = None, pickled: bool = False
) -> Path | None:
    """Fetch a checkpoint in files of another kind than safetensors into the cache.

    Args:
        pickled: also in PyTorch's files, where there are no safetensors.

    Returns:
        Where it is; None for what is no GGUF file, no PyTorch's files, on this disk, or out of reach.

    Raises:
        HubError: when it cannot be fetched.
    """
    repository = remote(source, revision)
    listing = _listed_or_cached(repository, token) if repository else None
    if not isinstance(listing, Listing):
        return None
    lone = listing.repository.path.rpartition("/")[2]
    if lone in listing.files:
        foreign = lone.lower().endswith((".gguf", *(PICKLED_ENDINGS if pickled else ())))
        return _fetched(listing, [lone], token) / lone if foreign else None
    weights = {name for name in listing.files if name.startswith(PICKLED_NAME) and "/" not in name}
    plain = any(name.endswith(".safetensors") and "/" not in name for name in listing.files)
    if plain or not weights or not pickled:
        return None
    root = Path()
    others, _ = other_files(root, (root / name for name in listing.files))
    return _fetched(listing, sorted(weights | {name.as_posix() for name in others}), token)


def _elsewhere(listing: Listing, token: str | None) -> RemoteCheckpoint:
    """A checkpoint of which nothing is fetched but what headers are read with."""
    repository = listing.repository
    root = _fetched(listing, [name for name in _READ_WHOLE if name in listing.files], token)
    lone = repository.path.endswith(".safetensors")
    path = root / repository.path.rpartition("/")[2] if lone else root
    found = RemoteCheckpoint(path, {}, tuple(map(Path, sorted(listing.files))), str(repository), listing.commit)
    with calling(found):
        weights = _weight_files(listing, root)
    if not weights:
        read_index(found, adapters=True)  # which says what is there instead
    names = tuple(name for name in found.names if name.as_posix() not in weights)
    return replace(found, names=names, weights={root / name: file_of(listing, name, token) for name in weights})


def _fetched(listing: Listing, names: Sequence[str], token: str | None) -> Path:
    """Fetch files into the cache; where the folder of the listing is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    repository = listing.repository
    inside = [listing.inside(name) for name in names]
    if inside:
        with reaching(repository):
            patterns = [glob.escape(name) for name in inside]
            retrying(
                lambda: snapshot_download(
                    repository.name, revision=listing.commit, allow_patterns=patterns, token=token
                )
            )
    here = repo_folder_name(repo_id=repository.name, repo_type="model")
    return Path(HF_HUB_CACHE, here, "snapshots", listing.commit, listing.folder)


def resolve(source: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Find a checkpoint on disk, fetching it from the Hub when the source names a repository.

    Headers are read first, so that a repository without usable weights is refused before anything is downloaded. Then
    the weights in safetensors and the files beside them are fetched into the cache, and no other formats.

    Args:
        source: a folder, a file, ``org/name``, ``org/name@revision`` or ``hf://org/name[@revision][/path]``. What
            exists on disk is a path.
        revision: branch, tag or commit; overrides the one in source.

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
    found = _elsewhere(listing, token)
    index = read_index(found, adapters=True)
    names = {path.relative_to(found.path).as_posix() for path, file in found.weights.items() if file in index.files}
    names |= {path.as_posix() for path in index.other_files}
    names |= {name for name in listing.files if name == INDEX_FILE or name.startswith(f"{MERGE_FOLDER}/")}
    return sorted(names)


def fetch(listing: Listing, names: Iterable[str], folder: Path, *, token: str | None = None) -> None:
    """Download files into a folder and check their hashes; goes on with what an earlier attempt left there.

    Args:
        names: which of its files.
        folder: where to; in the end it holds exactly these files.

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
                " downloaded before, as by --keep-source. Unset HF_HUB_OFFLINE once."
            )
        raise unanswered
    return Path(folder, repository.path)


def _weight_files(listing: Listing, folder: Path) -> list[str]:
    """Which weight files the index of a checkpoint may look at."""
    top = {name for name in listing.files if name.endswith(".safetensors") and "/" not in name}
    if INDEX_FILE in listing.files:
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        return sorted((shards | {SINGLE_FILE}) & listing.files.keys())
    return [SINGLE_FILE] if SINGLE_FILE in top and not listing.repository.path.endswith(".safetensors") else sorted(top)


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
