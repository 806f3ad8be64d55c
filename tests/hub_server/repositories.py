"""REST calls about repositories: create, branch, list."""

from __future__ import annotations

from tests.hub_server.access import commit_at, is_known, repository
from tests.hub_server.exchange import RefusedError, Request, Response, answer
from tests.hub_server.hub import LoopbackHub


def create_repo(hub: LoopbackHub, request: Request) -> Response:
    """POST /api/repos/create."""
    body = request.json()
    name = f"{body['organization']}/{body['name']}"
    url = f"{hub.endpoint}/{name}"
    if not is_known(request):
        raise RefusedError(401, "a token is needed to create a repository")
    if name in hub.repos:
        return answer({"error": "You already created this model repo", "url": url}, 409)
    hub.create(name, private=body.get("visibility") == "private" or bool(body.get("private")))
    return answer({"url": url, "name": name, "id": name})


def create_branch(hub: LoopbackHub, request: Request, name: str, branch: str) -> Response:
    """POST /api/models/{name}/branch/{branch}."""
    repo = repository(hub, request, name, write=True)
    if branch in repo.refs:
        return answer({"error": "Reference already exists"}, 409)
    repo.refs[branch] = [repo.refs["main"][-1]]
    return answer({})


def info(hub: LoopbackHub, request: Request, name: str, revision: str | None) -> Response:
    """GET /api/models/{name}[/revision/{revision}]: the commit and its files."""
    _, (sha, files) = commit_at(hub, request, name, revision or "main")
    siblings = []
    for path, blob in files.items():
        entry = blob.described()
        lfs = {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.large else {}
        siblings.append({"rfilename": path, "size": blob.size, "blobId": entry["oid"], **lfs})
    return answer({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False})


def tree(hub: LoopbackHub, request: Request, name: str, revision: str) -> Response:
    """GET /api/models/{name}/tree/{revision}."""
    _, (_, files) = commit_at(hub, request, name, revision)
    return answer([{"type": "file", "path": path, **blob.described()} for path, blob in files.items()])
