"""REST calls that write: which files are large, and the commit."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.hub_server.access import commit_at
from tests.hub_server.exchange import RefusedError, Request, Response, answer
from tests.hub_server.hub import LoopbackHub
from tests.hub_server.storage import LARGE, LARGE_BYTES, Blob, keep


def preupload(hub: LoopbackHub, request: Request, name: str, revision: str) -> Response:
    """POST /api/models/{name}/preupload/{revision}: how each file is to be sent, and the hash of the one there."""
    _, found = commit_at(hub, request, name, revision, write=not request.asks_for_pull_request())
    files = []
    for entry in request.json()["files"]:
        large = entry["path"].endswith(LARGE) or entry["size"] > LARGE_BYTES
        there = found.files.get(entry["path"])
        oid = {"oid": there.oid} if there else {}
        mode = "lfs" if large else "regular"
        files.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
    return answer({"files": files})


def commit(hub: LoopbackHub, request: Request, name: str, revision: str) -> Response:
    """POST /api/models/{name}/commit/{revision}: one commit, or a pull request with it."""
    repo, found = commit_at(hub, request, name, revision, write=True)
    files = dict(found.files)
    for line in request.body().splitlines():
        _change(hub, files, json.loads(line))
    with hub.lock:
        if request.asks_for_pull_request():
            repo.pull_requests += 1
            revision = f"refs/pr/{repo.pull_requests}"
            repo.refs[revision] = [found]
        sha = repo.append(revision, files)
    url = f"{hub.endpoint}/{name}"
    body = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
    if request.asks_for_pull_request():
        body["pullRequestUrl"] = f"{url}/discussions/{repo.pull_requests}"
    return answer(body)


def _change(hub: LoopbackHub, files: dict[str, Blob], item: dict[str, Any]) -> None:
    """Apply one line of a commit to the files of the one before."""
    value = item["value"]
    if item["key"] == "file":
        files[value["path"]] = keep(hub.objects, base64.b64decode(value["content"]))
    elif item["key"] == "lfsFile":
        path = hub.kept(value["oid"])
        if path is None:
            raise RefusedError(400, "the large file is not there")
        files[value["path"]] = Blob(path, int(value["size"]), value["oid"], value["oid"], large=True)
    elif item["key"] == "deletedFile":
        del files[value["path"]]
