"""What repositories hold: contents by hash on disk, branches of commits in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LARGE = (".safetensors", ".bin", ".png")  # kept as large files, whatever their size
LARGE_BYTES = 10_000_000  # as is everything beyond this


@dataclass(frozen=True)
class Blob:
    """Content of a file.

    Attributes:
        path: where it is kept.
        size: bytes.
        sha256: of the content.
        oid: how the Hub names it: its SHA-256 as a large file, else that of its git blob.
        large: whether it is kept as a large file.
    """

    path: Path
    size: int
    sha256: str
    oid: str
    large: bool

    def described(self) -> dict[str, object]:
        """Size, hash and, of a large file, what the Hub says about that."""
        if not self.large:
            return {"size": self.size, "oid": self.oid}
        return {"size": self.size, "oid": "0" * 40, "lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 130}}


class Commit(NamedTuple):
    """All files of a repository at one time, by path."""

    sha: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A model repository.

    Attributes:
        private: closed to those without the token.
        gated: its files are closed to everybody.
        refs: commits of branches and pull requests, oldest first.
        pull_requests: how many were opened.
    """

    private: bool = False
    gated: bool = False
    refs: dict[str, list[Commit]] = field(default_factory=dict)
    pull_requests: int = 0

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a pull request or a hash means."""
        if revision in self.refs:
            return self.refs[revision][-1]
        return next((commit for own in self.refs.values() for commit in own if commit.sha == revision), None)

    def append(self, ref: str, files: dict[str, Blob]) -> str:
        """Commit these files; the hash."""
        before = self.refs[ref][-1].sha
        sha = commit_hash(before, *(f"{name} {blob.oid}" for name, blob in sorted(files.items())))
        self.refs[ref].append(Commit(sha, files))
        return sha


def keep(folder: Path, content: bytes) -> Blob:
    """Store a small file."""
    sha = hashlib.sha256(content).hexdigest()
    path = folder / sha
    path.write_bytes(content)
    return Blob(path, len(content), sha, git_hash(content), large=False)


def blob_of(path: Path) -> Blob:
    """A file that stays where it is. Of one that is all holes the hash is made up: hashing it would read them all."""
    size, allocated = path.stat().st_size, path.stat().st_blocks * 512
    large = path.name.endswith(LARGE)
    if allocated < size // 2 and size > 1 << 20:
        sha = hashlib.sha256(str(path).encode()).hexdigest()
    else:
        with path.open("rb") as stream:
            sha = hashlib.file_digest(stream, "sha256").hexdigest()
    return Blob(path, size, sha, sha if large else git_hash(path.read_bytes()), large)


def git_hash(content: bytes) -> str:
    """How git names a content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def commit_hash(*parts: str) -> str:
    """A hash of texts, as long as those of git."""
    return hashlib.sha1("\n".join(parts).encode(), usedforsecurity=False).hexdigest()
