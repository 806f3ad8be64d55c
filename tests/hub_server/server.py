"""Sockets: a thread for each connection, one request on each, every byte counted.

wsgiref's own server is not used: it serves one connection at a time, and writes each request to stderr.
"""

from __future__ import annotations

import io
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import parse_headers
from pathlib import Path
from typing import IO, BinaryIO, cast
from urllib.parse import unquote, urlsplit
from wsgiref.handlers import SimpleHandler

from tests.hub_server.application import application
from tests.hub_server.exchange import Record
from tests.hub_server.files import HOST
from tests.hub_server.hub import LoopbackHub

_WAITING = 64  # connections that may wait to be accepted
_POLL = 0.05  # seconds between looks at whether to stop
_LONGEST_LINE = 1 << 16


@contextmanager
def serving(objects: Path) -> Iterator[LoopbackHub]:
    """Run a Hub until the block ends.

    Args:
        objects: folder for contents.

    Yields:
        The Hub; its ``endpoint`` is what HF_ENDPOINT should be.
    """
    with socket.create_server((HOST, 0), backlog=_WAITING) as listener:
        listener.settimeout(_POLL)
        hub = LoopbackHub(objects, f"http://{HOST}:{listener.getsockname()[1]}")
        stop = threading.Event()
        thread = threading.Thread(target=_accept, args=(listener, hub, stop), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            stop.set()
            thread.join()


def _accept(listener: socket.socket, hub: LoopbackHub, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        threading.Thread(target=_serve, args=(connection, hub), daemon=True).start()


def _serve(connection: socket.socket, hub: LoopbackHub) -> None:
    """Answer the one request of a connection. Clients that go away, and cuts on request, are no errors."""
    with (
        suppress(ConnectionError),
        connection,
        connection.makefile("rb") as incoming,
        connection.makefile("wb") as outgoing,
    ):
        head = _head(incoming)
        if not head:
            return
        environ = _environ(head)
        record = Record(f"{environ['REQUEST_METHOD']} {environ['REQUEST_URI']}", received=len(head))
        hub.log.append(record)
        counted = cast("IO[bytes]", _Counted(outgoing, record))  # of which wsgiref calls write and flush
        handler = SimpleHandler(incoming, counted, sys.stderr, environ, multithread=True)
        handler.os_environ = {}  # requests are not to be mixed with the variables of this process
        handler.run(application(hub, record))


def _head(stream: BinaryIO) -> bytes:
    """Everything before the body; empty when the client went away."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline(_LONGEST_LINE)
        if not line:
            return b""
        head += line
    return head


def _environ(head: bytes) -> dict[str, str]:
    """The variables of PEP 3333."""
    first, _, rest = head.partition(b"\r\n")
    method, target, protocol = first.decode("latin-1").split()
    parts = urlsplit(target)
    environ = {
        "REQUEST_METHOD": method,
        "REQUEST_URI": target,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote(parts.path, "latin-1"),
        "QUERY_STRING": parts.query,
        "SERVER_PROTOCOL": protocol,
        "SERVER_NAME": HOST,
        "SERVER_PORT": "0",
    }
    for name, value in parse_headers(io.BytesIO(rest)).items():
        key = name.upper().replace("-", "_")
        environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value
    return environ


@dataclass(frozen=True)
class _Counted:
    """A stream that counts what is written, before it is: the client may look at the log at once."""

    stream: BinaryIO
    record: Record

    def write(self, data: bytes) -> int:
        self.record.sent += len(data)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()
