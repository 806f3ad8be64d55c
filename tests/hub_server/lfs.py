"""Large files: which are missing, the upload itself, and whether it arrived. Kept only when the hash is right."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

from tests.hub_server.access import repository
from tests.hub_server.exchange import RefusedError, Request, Response, answer
from tests.hub_server.hub import LoopbackHub


def batch(hub: LoopbackHub, request: Request, name: str) -> Response:
    """POST /{name}.git/info/lfs/objects/batch: where to send what is not there yet."""
    repository(hub, request, name, write=True)
    objects = []
    for wanted in request.json()["objects"]:
        entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if hub.kept(wanted["oid"]) is None:
            entry["actions"] = {
                "upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{hub.endpoint}/lfs-verify/{wanted['oid']}"},
            }
        objects.append(entry)
    return answer({"transfer": "basic", "objects": objects})


def put(hub: LoopbackHub, request: Request, oid: str) -> Response:
    """PUT /lfs/{oid}: written as it comes, so that no file is held in memory."""
    partial = hub.objects / f"{oid}.{threading.get_ident()}.part"
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as stream:
            for piece in request.pieces:
                stream.write(piece)
                digest.update(piece)
        if digest.hexdigest() != oid:
            raise RefusedError(400, "the content does not have its hash")
        partial.rename(hub.objects / oid)
    finally:
        partial.unlink(missing_ok=True)
    hub.stored.append(oid)
    return answer({})


def verify(hub: LoopbackHub, request: Request, oid: str) -> Response:
    """POST /lfs-verify/{oid}."""
    size, path = request.json()["size"], hub.kept(oid)
    return answer({}, 200 if path is not None and path.stat().st_size == size else 404)
