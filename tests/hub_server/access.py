"""What a Hub checks before it answers: the token, the repository, the revision."""

from __future__ import annotations

from tests.hub_server.exchange import RefusedError, Request
from tests.hub_server.hub import TOKEN, LoopbackHub
from tests.hub_server.storage import Commit, Repo


def is_known(request: Request) -> bool:
    """Whether a request comes with the token."""
    return request.authorization == f"Bearer {TOKEN}"


def repository(hub: LoopbackHub, request: Request, name: str, *, write: bool = False, files: bool = False) -> Repo:
    """The repository, if a request may have it.

    Args:
        hub: that is asked.
        request: with or without a token.
        name: ``org/name``.
        write: it is to be changed.
        files: its files are wanted, which a gated one keeps.

    Raises:
        RefusedError: with the status and the headers of the Hub.
    """
    repo = hub.repos.get(name)
    known = is_known(request)
    if request.authorization and not known:
        raise RefusedError(401, "invalid token", {"X-Error-Message": "Invalid credentials in Authorization header"})
    if repo is None or (repo.private and not known):
        raise RefusedError(404 if known else 401, "no such repository", {"X-Error-Code": "RepoNotFound"})
    if repo.gated and files:
        raise RefusedError(403, "gated", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
    if write and not known:
        raise RefusedError(401, "a token is needed to write")
    return repo


def commit_at(
    hub: LoopbackHub, request: Request, name: str, revision: str, *, write: bool = False, files: bool = False
) -> tuple[Repo, Commit]:
    """A repository and its commit at a revision; see `repository`.

    Raises:
        RefusedError: when there is none, or the request may not have it.
    """
    repo = repository(hub, request, name, write=write, files=files)
    found = repo.at(revision)
    if found is None:
        raise RefusedError(404, "no such revision", {"X-Error-Code": "RevisionNotFound"})
    return repo, found
