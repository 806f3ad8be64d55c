"""pull: a repository to a folder that appears whole, with every hash checked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from spectral_surgery import hub
from spectral_surgery.cards.check import check_folder
from spectral_surgery.errors import CheckpointError, HubError, TargetError
from spectral_surgery.files.atomic import partial_folder, publishing
from spectral_surgery.progress import Progress, silent

_MARK = Path(".cache", "huggingface")  # what an unfinished pull leaves


@dataclass(frozen=True)
class PullReport:
    """What a pull did, or would do.

    Attributes:
        files: bytes by path.
        kind: compressed, adapter or dense; ``files`` when only some were asked for.
    """

    repository: str
    commit: str
    files: Mapping[str, int]
    kind: str
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return vars(self) | {"files": dict(self.files), "bytes": self.nbytes}


def pull(
    source: str,
    out: Path,
    *,
    include: Sequence[str] = (),
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PullReport:
    """Download a checkpoint or an adapter and check it.

    Without include, weights in safetensors and the files beside them are fetched, and no other formats. The folder
    appears at the end; a pull that was cut off goes on where it was.

    Args:
        source: ``org/name``, ``org/name@revision`` or ``hf://org/name``.
        include: globs of the only files to fetch, of any kind.
        revision: branch, tag or commit; overrides the one in source.

    Raises:
        CheckpointError: when the repository holds no usable checkpoint, or out is taken.
        HubError: when it cannot be fetched, or a file does not have its hash.
        TargetError: when a glob matches nothing.
    """
    started = time.perf_counter()
    repository = hub.remote(source, revision)
    if repository is None:
        raise HubError(f"{source}: expected org/name or hf://org/name, got a path. Copy folders as they are.")
    partial = partial_folder(out, overwrite=overwrite)
    if partial.exists() and not (partial / _MARK).exists():
        raise CheckpointError(
            f"{partial.name}: expected an unfinished pull, got the work of another command. Finish or remove it first."
        )
    listing = hub.list_files(repository, token)
    names = _matching(listing, include) if include else hub.needed(listing, token)
    files = {name: listing.files[name].size for name in names}
    kind = "files" if include else "unknown"
    if not dry_run:
        with publishing(out, overwrite=overwrite, keep_partial=True) as folder:
            hub.fetch(listing, names, folder, token=token)
            if not include and not repository.path.endswith(".safetensors"):
                kind = check_folder(folder, progress=progress).kind
    return PullReport(str(repository), listing.commit, files, kind, time.perf_counter() - started)


def _matching(listing: hub.Listing, include: Sequence[str]) -> list[str]:
    for glob in include:
        if not any(fnmatchcase(name, glob) for name in listing.files):
            raise TargetError(
                f"--include: expected globs of file names, got {glob!r}, which matches none of {len(listing.files)}"
                f" files of {listing.repository}. Look at the names on its page."
            )
    return sorted(name for name in listing.files if any(fnmatchcase(name, glob) for glob in include))
