"""Files of a repository, whole or in part."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.hub_server.access import commit_at
from tests.hub_server.exchange import PIECE, RefusedError, Request, Response
from tests.hub_server.hub import LoopbackHub

HOST = "127.0.0.1"
_STORE = "/store"  # beginning of addresses on another host, where the Hub sends those who want large files


def resolve(hub: LoopbackHub, request: Request, name: str, revision: str, path: str) -> Response:
    """GET or HEAD [/store]/{name}/resolve/{revision}/{path}, with or without a Range header."""
    stored = request.path.startswith(_STORE)
    if stored and request.authorization:
        raise RefusedError(400, "the token is for the Hub alone")
    _, (sha, files) = commit_at(hub, request, name, revision, files=True)
    if path not in files:
        raise RefusedError(404, "no such file", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
    blob = files[path]
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range) if hub.ranges else None
    start = int(asked.group(1)) if asked else 0
    stop = min(blob.size, int(asked.group(2)) + 1) if asked and asked.group(2) else blob.size
    if asked and hub.longest:
        stop = min(stop, start + hub.longest)
    if blob.large and hub.redirects and not stored:
        there = f"{hub.endpoint.replace(HOST, 'localhost')}{_STORE}/{name}/resolve/{revision}/{path}"
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "X-Repo-Commit": sha}
        return Response(302, {"Location": there, "Content-Length": "0", **linked})
    headers = {
        "ETag": f'"{blob.oid}"',
        "X-Repo-Commit": sha,
        "Accept-Ranges": "bytes",
        "Content-Length": str(stop - start),
    }
    if stored:
        headers["ETag"] = '"of-the-store"'
    elif blob.large:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    if asked:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    return Response(206 if asked else 200, headers, _part(hub, blob.path, start, stop))


def _part(hub: LoopbackHub, path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        while start < stop:
            piece = stream.read(min(PIECE, stop - start))
            start += len(piece)
            hub.speed.wait(len(piece))
            yield piece
