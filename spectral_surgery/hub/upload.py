"""One commit with all of a folder, or none of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_surgery.errors import HubError
from spectral_surgery.hub.failures import TRIES, reaching, retrying
from spectral_surgery.hub.listing import Listing
from spectral_surgery.hub.repository import Repository

_SEARCHED = 10 << 20  # bytes of a file that may be text


@dataclass(frozen=True)
class Uploaded:
    """What a push did.

    Attributes:
        url: its address, or that of the pull request.
        changed: whether there was anything to commit.
    """

    commit: str
    url: str
    changed: bool


@dataclass(frozen=True)
class Stored:
    """A large file that the Hub has, and that no commit has yet."""

    name: str
    size: int
    sha256: str


def prepare(
    repository: Repository, *, private: bool = False, create_pr: bool = False, token: str | None = None
) -> None:
    """Create a repository and a branch where they are missing; fails early where pushing would fail late.

    Args:
        private: visibility, should it be new.
        create_pr: it must exist already, and nobody has to be able to write to it.

    Raises:
        HubError: when it cannot be written to.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with reaching(repository):
        if create_pr:
            return
        retrying(lambda: api.create_repo(repository.name, private=private or None, exist_ok=True))
        revision = repository.revision
        if revision and not revision.startswith("refs/"):
            retrying(lambda: api.create_branch(repository.name, branch=revision, exist_ok=True))


def read_text(listing: Listing, name: str, token: str | None = None) -> str | None:
    """Text of a small remote file as it is at the listed commit; None when there is none.

    Raises HubError when it cannot be read, or is not text.
    """
    from huggingface_hub import hf_hub_download

    if name not in listing.files:
        return None
    repository = listing.repository
    with reaching(repository):
        path = retrying(
            lambda: hf_hub_download(repository.name, listing.inside(name), revision=listing.commit, token=token)
        )
        return Path(path).read_bytes().decode("utf-8")


def refuse_tokens(files: Mapping[str, Path | bytes], token: str | None = None) -> None:
    """Refuse to publish the access token itself. Raises HubError when one of the smaller files holds it."""
    from huggingface_hub import get_token

    secret = (token or get_token() or "").encode()
    for name, content in files.items():
        small = isinstance(content, bytes) or content.stat().st_size <= _SEARCHED
        if secret and small and secret in (content if isinstance(content, bytes) else content.read_bytes()):
            raise HubError(f"{name}: holds your access token; expected files without it. Remove it, and renew it.")


def store(repository: Repository, path: Path, *, token: str | None = None) -> Stored:
    """Upload a large file for a commit to come; content that the Hub has already is not sent again.

    Raises HubError when it cannot be uploaded, or the Hub takes it for a small one.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    def uploaded() -> CommitOperationAdd:  # it is used up by an attempt
        addition = CommitOperationAdd(path.name, path)
        HfApi(token=token).preupload_lfs_files(repository.name, [addition], revision=repository.revision)
        return addition

    with reaching(repository):
        done = retrying(uploaded)
    if done._upload_mode != "lfs":
        raise HubError(f"{repository}: keeps {path.name} as a small file; expected one that is stored by itself.")
    return Stored(path.name, done.upload_info.size, done.upload_info.sha256.hex())


def _addition(stored: Stored) -> Any:
    """What a commit says of a file that is stored.

    huggingface_hub has no public way to say it: `preupload_lfs_files(free_memory=True)` lets go of the content, but the
    operation that it marks as uploaded lives only as long as this process, and a run that goes on has no file to make
    another one of. A test says so when it renames these attributes.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(stored.name, b"")
    addition.upload_info = UploadInfo(size=stored.size, sample=b"", sha256=bytes.fromhex(stored.sha256))
    addition._upload_mode, addition._is_uploaded, addition._should_ignore = "lfs", True, False
    return addition


def upload(
    listing: Listing,
    files: Mapping[str, Path | bytes],
    *,
    stored: Iterable[Stored] = (),
    delete: Iterable[str] = (),
    message: str,
    create_pr: bool = False,
    token: str | None = None,
) -> Uploaded:
    """Upload files as one commit; content the Hub has already is not sent again, and no change makes no commit.

    Large files are stored before the commit, so an upload that was cut off goes on with the ones still missing.

    Args:
        files: content by path.
        stored: more files, which the Hub has already.
        delete: paths to remove in the same commit.
        create_pr: open a pull request instead of committing to the branch.

    Raises:
        HubError: when it cannot be uploaded or committed.
    """
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

    repository = listing.repository

    def commit() -> CommitInfo:  # operations are used up by an attempt
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        return HfApi(token=token, library_name="spectral-surgery").create_commit(
            repository.name,
            [*additions, *map(_addition, stored), *(CommitOperationDelete(name) for name in delete)],
            commit_message=message,
            revision=repository.revision,
            create_pr=create_pr,
        )

    with reaching(repository):
        done = retrying(commit, tries=1 if create_pr else TRIES)  # every attempt would open another pull request
    return Uploaded(str(done.oid), str(done.pr_url or done.commit_url), done.oid != listing.commit)
