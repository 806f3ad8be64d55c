"""One request and its answer, as the handlers see them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import parse_qs

from spectral_surgery.errors import SpectralSurgeryError

PIECE = 1 << 18


@dataclass
class Record:
    """What the log keeps of a request.

    Attributes:
        line: method and address.
        status: of the answer; 0 when there was none.
        received: bytes of the request that were read, with its head.
        sent: bytes of the answer, with its head.
        authorized: whether it came with the token.
    """

    line: str
    status: int = 0
    received: int = 0
    sent: int = 0
    authorized: bool = False


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        method: GET, HEAD, POST or PUT.
        path: of the address, decoded.
        query: the rest of the address.
        authorization: the header, empty without.
        range: the header, empty without.
        pieces: the body; to be read once.
    """

    method: str
    path: str
    query: str
    authorization: str
    range: str
    pieces: Iterator[bytes]

    def body(self) -> bytes:
        """The body as a whole."""
        return b"".join(self.pieces)

    def json(self) -> dict[str, Any]:
        """The body, parsed."""
        found: dict[str, Any] = json.loads(self.body())
        return found

    def asks_for_pull_request(self) -> bool:
        """Whether what is written goes to a new pull request."""
        return "create_pr" in parse_qs(self.query)


@dataclass(frozen=True)
class Response:
    """What is answered; the headers say the length of the body."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Iterable[bytes] = ()


class RefusedError(SpectralSurgeryError):
    """A request that is answered with a refusal.

    Attributes:
        response: the answer.
    """

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        """Refuse with a status, a reason for people, and headers for programs."""
        super().__init__(f"{status}: {reason}")
        self.response = answer({"error": reason}, status, headers)


def answer(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    data = json.dumps(body).encode()
    known = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    return Response(status, {**known, **(headers or {})}, (data,))


def read_body(stream: BinaryIO, length: str, encoding: str, record: Record) -> Iterator[bytes]:
    """The body of a request, piece by piece, counted as it is read.

    Args:
        stream: after the head of the request.
        length: the Content-Length header, empty without.
        encoding: the Transfer-Encoding header, empty without.
        record: counts the bytes.

    Raises:
        ConnectionAbortedError: when it ends before that.
    """
    if encoding.lower() == "chunked":
        while size := int(stream.readline().split(b";")[0] or b"0", 16):
            yield _exactly(stream, size, record)
            stream.readline()
        stream.readline()
        return
    left = int(length or 0)
    while left:
        piece = _exactly(stream, min(left, PIECE), record)
        left -= len(piece)
        yield piece


def _exactly(stream: BinaryIO, size: int, record: Record) -> bytes:
    piece = stream.read(size)
    record.received += len(piece)
    if len(piece) < size:
        raise ConnectionAbortedError("the client went away")
    return piece
