"""What a repository holds, without downloading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from spectral_surgery.errors import HubError
from spectral_surgery.hub.failures import reaching, retrying
from spectral_surgery.hub.repository import Repository, is_safe


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        sha256: of its content, when the Hub keeps it as a large file; otherwise None.
        blob_id: SHA-1 of its git blob; of a large file, that of its pointer.
    """

    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class Listing:
    """All files of a repository at one commit.

    Attributes:
        folder: in the repository; empty is its top.
        files: by path relative to folder.
    """

    repository: Repository
    commit: str
    folder: str
    files: Mapping[str, RemoteFile]

    def inside(self, name: str) -> str:
        """Path of one of the files in the whole repository."""
        return str(PurePosixPath(self.folder, name))


def list_files(repository: Repository, token: str | None = None) -> Listing:
    """List a repository; one request.

    Returns:
        Commit and files; of a repository with a path, the files below it, or the file itself.

    Raises:
        HubError: when it cannot be read, or lists paths that lead out of it.
    """
    from huggingface_hub import HfApi

    with reaching(repository):
        info = retrying(
            lambda: HfApi(token=token).model_info(
                repository.name, revision=repository.revision, files_metadata=True, token=token
            )
        )
    files, folder = {}, repository.path
    for entry in info.siblings or []:
        if not is_safe(entry.rfilename):
            raise HubError(f"{repository}: expected paths inside it, got {entry.rfilename!r}. Do not trust this Hub.")
        path = PurePosixPath(entry.rfilename)
        if str(path) == repository.path:
            files[path.name] = _remote_file(entry)
            folder = str(path.parent)
        elif path.is_relative_to(repository.path):
            files[str(path.relative_to(repository.path))] = _remote_file(entry)
    if not files and repository.path:
        raise HubError(f"{repository}: has no such file or folder; expected files it lists. Check the path.")
    return Listing(repository, str(info.sha), folder, files)


def _remote_file(entry: object) -> RemoteFile:
    lfs = getattr(entry, "lfs", None)
    return RemoteFile(
        int(getattr(entry, "size", 0) or 0), lfs.sha256 if lfs else None, str(getattr(entry, "blob_id", "") or "")
    )
