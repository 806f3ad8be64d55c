"""What a user types for a place on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spectral_surgery.errors import HubError

_SCHEME = "hf://"
_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
_PLAIN = re.compile(rf"({_NAME})(?:@([\w./-]+))?")
# in a URI a path may follow, so of revisions with a slash only those of pull requests are known
_URI = re.compile(rf"(?:models/)?({_NAME})(?:@(refs/(?:convert|pr)/\w+|[^/]+))?(?:/(.+))?")
_OTHER_KINDS = ("datasets/", "spaces/", "buckets/", "kernels/")


@dataclass(frozen=True)
class Repository:
    """A model repository at a revision, or a folder or file in it.

    Attributes:
        name: ``org/name``.
        revision: branch, tag or commit; None is the default branch.
        path: folder or file inside, with ``/``; empty is all of it.
    """

    name: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        """As a user would type it."""
        at = f"@{self.revision}" if self.revision else ""
        return f"{_SCHEME}{self.name}{at}/{self.path}" if self.path else f"{self.name}{at}"


def remote(source: str, revision: str | None = None) -> Repository | None:
    """Which repository a source names, if it is not one on this machine.

    Args:
        source: a folder, a file, ``org/name``, ``org/name@revision`` or ``hf://org/name[@revision][/path]``.

    Returns:
        The repository; None for a path. What exists on disk is a path, and so is all that looks like nothing else.

    Raises:
        HubError: when the source is a URI of no model.
    """
    if not source.startswith(_SCHEME):
        if source.startswith((".", "/", "~")) or Path(source).exists():
            return None
        match = _PLAIN.fullmatch(source)
        return Repository(match.group(1), revision or match.group(2)) if match else None
    inner = source.removeprefix(_SCHEME)
    match = _URI.fullmatch(inner.rstrip("/"))
    if match is None or inner.startswith(_OTHER_KINDS) or not is_safe(match.group(3) or ""):
        raise HubError(f"{source}: is not a model on the Hub; expected hf://org/name[@revision][/path].")
    return Repository(match.group(1), revision or match.group(2), match.group(3) or "")


def to_push(name: str, revision: str | None = None) -> Repository:
    """The repository to push to. Raises HubError when the name is not ``org/name``."""
    match = re.fullmatch(rf"(?:{_SCHEME})?({_NAME})", name)
    if match is None:
        raise HubError(f"{name}: cannot be pushed to; expected org/name. A branch is given by --revision.")
    return Repository(match.group(1), revision)


def is_safe(path: str) -> bool:
    """Whether a path with ``/`` stays in the folder it is joined to."""
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and "\\" not in path and "\0" not in path
