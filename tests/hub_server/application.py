"""Requests to handlers, as a WSGI application.

Source: PEP 3333; the calls are those that huggingface_hub 1 and 2 make.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from tests.hub_server import commits, files, lfs, metadata, repositories
from tests.hub_server.access import is_known
from tests.hub_server.exchange import Record, RefusedError, Request, Response, answer, read_body
from tests.hub_server.faults import Fault, disturbed, matching
from tests.hub_server.hub import LoopbackHub

_ROUTES: tuple[tuple[str, Callable[..., Response]], ...] = (
    ("POST /api/repos/create", repositories.create_repo),
    ("POST /api/validate-yaml", metadata.validate_yaml),
    (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", repositories.info),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", repositories.tree),
    (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", repositories.create_branch),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", commits.preupload),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", commits.commit),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs.batch),
    (r"PUT /lfs/(\w+)", lfs.put),
    (r"POST /lfs-verify/(\w+)", lfs.verify),
    (r"(?:GET|HEAD) (?:/store)?/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", files.resolve),
)


def application(hub: LoopbackHub, record: Record) -> WSGIApplication:
    """The Hub as a function of one request.

    Args:
        hub: that is asked.
        record: the entry of its log, to be filled in.
    """

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with hub.lock:
            fault = matching(hub.faults, record.line, environ.get("HTTP_RANGE", ""))
        if fault and fault.cut_after == 0:
            raise fault.cut()
        length, encoding = environ.get("CONTENT_LENGTH", ""), environ.get("HTTP_TRANSFER_ENCODING", "")
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"].encode("latin-1").decode(),
            environ["QUERY_STRING"],
            environ.get("HTTP_AUTHORIZATION", ""),
            environ.get("HTTP_RANGE", ""),
            disturbed(read_body(environ["wsgi.input"], length, encoding, record), fault),
        )
        record.authorized = is_known(request)
        response = _failing(fault) if fault and fault.status else _served(hub, request)
        deque(request.pieces, maxlen=0)  # closing a connection with unread bytes would lose the answer
        record.status = response.status
        start_response(f"{response.status} {HTTPStatus(response.status).phrase}", list(response.headers.items()))
        return disturbed(response.body, fault) if request.method != "HEAD" else ()

    return call


def _failing(fault: Fault) -> Response:
    if fault.on_hit:
        fault.on_hit()
    body = {"error": "asked to fail", "errors": [{"message": "asked to fail"}]}
    return answer(body, fault.status, fault.headers)


def _served(hub: LoopbackHub, request: Request) -> Response:
    for pattern, handler in _ROUTES:
        match = re.fullmatch(pattern, f"{request.method} {request.path}")
        if match:
            try:
                return handler(hub, request, *match.groups())
            except RefusedError as error:
                return error.response
    return answer({"error": f"no route for {request.method} {request.path}"}, 404)
