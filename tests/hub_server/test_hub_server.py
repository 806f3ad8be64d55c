"""The Hub on this machine: what it refuses, how it fails on request, and that it counts every byte."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.case import CheckFailedError
from tests.hub_server import TOKEN, LoopbackHub, client, serving
from tests.hub_server.exchange import RefusedError
from tests.hub_server.metadata import problems

DATA = bytes(range(256)) * 4000
SHA = hashlib.sha256(DATA).hexdigest()
KNOWN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with serving(tmp_path / "objects") as hub:
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "a.bin").write_bytes(DATA)
        (folder / "a b.txt").write_text("text")
        for name, closed in (("plain", {}), ("private", {"private": True}), ("gated", {"gated": True})):
            hub.seed(f"org/{name}", folder, **closed)
        yield hub


def ask(
    hub: LoopbackHub, method: str, path: str, body: object = None, headers: dict[str, str] = KNOWN
) -> tuple[int, bytes]:
    """One request; the status and the body."""
    connection = http.client.HTTPConnection(str(urlsplit(hub.endpoint).netloc), timeout=10)
    try:
        raw = body if body is None or isinstance(body, (bytes, Iterator)) else json.dumps(body).encode()
        connection.request(method, path, raw, headers, encode_chunked=isinstance(body, Iterator))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("line", "body", "headers", "text"),
    [
        ("GET /api/models/org/plain", None, {"Authorization": "Bearer hf_x"}, "401: invalid token"),
        ("GET /api/models/org/missing", None, KNOWN, "404: no such repository"),
        ("GET /api/models/org/private", None, {}, "401: no such repository"),
        ("GET /org/gated/resolve/main/a.bin", None, KNOWN, "403: gated"),
        ("GET /org/plain/resolve/main/c.bin", None, KNOWN, "404: no such file"),
        ("GET /api/models/org/plain/revision/v9", None, KNOWN, "404: no such revision"),
        ("POST /api/models/org/plain/branch/dev", {}, {}, "401: a token is needed to write"),
        ("POST /api/repos/create", {"organization": "a", "name": "b"}, {}, "401: a token is needed to create a rep"),
        (f"PUT /lfs/{SHA}", b"other", KNOWN, "400: the content does not have its hash"),
        (
            "POST /api/models/org/plain/commit/main",
            {"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64, "size": 1}},
            KNOWN,
            "400: the large file is not there",
        ),
        ("GET /elsewhere", None, KNOWN, "404: no route for GET /elsewhere"),
    ],
)
def test_what_is_refused(hub: LoopbackHub, line: str, body: object, headers: dict[str, str], text: str) -> None:
    status, answer = ask(hub, *line.split(), body, headers)
    assert f"{status}: {json.loads(answer)['error']}".startswith(text)
    assert (hub.log[-1].line, hub.log[-1].status) == (line, status)
    assert hub.log[-1].authorized == (headers == KNOWN)


def test_a_refusal_says_why() -> None:
    with pytest.raises(RefusedError, match=r"^403: gated$") as caught:
        raise RefusedError(403, "gated")
    assert caught.value.response.status == 403


def test_whole_files_and_parts_with_every_byte_counted(hub: LoopbackHub) -> None:
    assert ask(hub, "GET", "/org/plain/resolve/main/a.bin") == (200, DATA)
    assert len(DATA) < hub.sent < len(DATA) + 500
    hub.reset()
    assert ask(hub, "GET", "/org/plain/resolve/main/a.bin", None, {"Range": "bytes=5-9"}) == (206, DATA[5:10])
    assert ask(hub, "GET", "/org/plain/resolve/main/a.bin", None, {"Range": "bytes=1023995-"}) == (206, DATA[-5:])
    assert ask(hub, "GET", "/org/plain/resolve/main/a%20b.txt") == (200, b"text")
    assert ask(hub, "HEAD", "/org/plain/resolve/main/a.bin") == (200, b"")
    assert hub.moved < 3000


def test_uploads_in_one_piece_and_in_chunks(hub: LoopbackHub) -> None:
    assert ask(hub, "PUT", f"/lfs/{SHA}", DATA)[0] == 200
    assert ask(hub, "PUT", f"/lfs/{SHA}", (DATA[i : i + 99_999] for i in range(0, len(DATA), 99_999)))[0] == 200
    assert hub.stored == [SHA, SHA]
    kept = hub.kept(SHA)
    assert kept is not None
    assert kept.read_bytes() == DATA
    assert 2 * len(DATA) < hub.received < 2 * len(DATA) + 1000
    body = {"oid": SHA, "size": len(DATA)}
    assert [ask(hub, "POST", f"/lfs-verify/{SHA}", body | {"size": n})[0] for n in (len(DATA), 1)] == [200, 404]


def test_faults_of_answers(hub: LoopbackHub) -> None:
    path = "/org/plain/resolve/main/a.bin"
    hub.fail("GET ", 429, headers={"Retry-After": "3"})
    assert ask(hub, "GET", path)[0] == 429
    hub.fail("GET ", corrupt=True)
    assert ask(hub, "GET", path)[1] == b"\x01" + DATA[1:]
    hub.fail("GET ", cut_after=300_000)
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(hub, "GET", path)
    assert caught.value.partial == DATA[:300_000]
    hub.fail("GET ", cut_after=0)
    with pytest.raises(ConnectionError):
        ask(hub, "GET", path)
    hub.fail("GET ", 500, skip_ranges=True)
    assert ask(hub, "GET", path, None, {"Range": "bytes=5-9"})[0] == 206
    assert ask(hub, "GET", path)[0] == 500
    assert ask(hub, "GET", path) == (200, DATA)  # each happened once


def test_faults_of_uploads(hub: LoopbackHub) -> None:
    hits: list[int] = []
    hub.fail("PUT ", cut_after=1000, on_hit=lambda: hits.append(1))
    with pytest.raises(OSError, match=r"."):
        ask(hub, "PUT", f"/lfs/{SHA}", DATA)
    hub.fail("PUT ", corrupt=True)
    assert ask(hub, "PUT", f"/lfs/{SHA}", DATA)[0] == 400
    line = hub.fail("PUT ", times=-1, cut_after=len(DATA) + 10, together=True)
    assert ask(hub, "PUT", f"/lfs/{SHA}", DATA)[0] == 200
    for _ in range(2):  # the line goes dead in the second, and stays dead
        with pytest.raises(OSError, match=r"."):
            ask(hub, "PUT", f"/lfs/{SHA}", DATA)
    assert line.cut_after == 0
    assert (hits, hub.stored) == ([1], [SHA])
    assert not list(hub.objects.glob("*.part"))


def test_clients_that_go_away_are_no_errors(hub: LoopbackHub, capfd: pytest.CaptureFixture[str]) -> None:
    address = urlsplit(hub.endpoint)
    for said in (b"", b"GET / HTT", f"PUT /lfs/{SHA} HTTP/1.1\r\nContent-Length: 9\r\n\r\nab".encode()):
        with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=10) as connection:
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(10) == b""
    assert ask(hub, "GET", "/org/plain/resolve/main/a.bin")[0] == 200
    assert capfd.readouterr().err == ""
    assert hub.stored == []


@pytest.mark.parametrize(
    ("front", "text"),
    [
        ("license: mit\nbase_model: org/name\nbase_model_relation: quantized\ntags: [a]\nlibrary_name: peft", None),
        ("a: [", "bad YAML"),
        ("- a", "must be keys and values"),
        ("base_model: /home/me/model", '"base_model" with value "/home/me/model" is not valid'),
        ("base_model: [org/name, '']", '"base_model" with value "" is not valid'),
        ("base_model_relation: derived", "must be one of adapter, finetune, merge, quantized"),
        ("license: My License", "is not a known license"),
        ("tags: [1]", '"tags" with value "1" must be texts'),
        ("library_name: {}", '"library_name" with value "{}" must be the name of a library'),
    ],
)
def test_what_the_hub_thinks_of_a_card(hub: LoopbackHub, front: str, text: str | None) -> None:
    card = f"---\n{front}\n---\nText\n"
    found = list(problems(card))
    assert (found == []) if text is None else (text in found[0])
    status, answer = ask(hub, "POST", "/api/validate-yaml", {"content": card.replace("\n", "\r\n")})
    assert status == (400 if text else 200)
    assert [error["message"] for error in json.loads(answer)["errors"]] == found
    assert list(problems("Text")) == []


def test_a_client_that_dies_says_so(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with client.running(tmp_path / "client", hub.endpoint, {}) as own:
        own.process.kill()
        with pytest.raises(CheckFailedError, match="the client died"):
            own.run("inspect", "org/plain")
    with pytest.raises(CheckFailedError, match="the command failed: no"):
        client.Done(1, "", "no", 0.0).json()
    monkeypatch.setattr(sys, "argv", [])
    done = client._run({"argv": ["--version"], "environment": {"HF_HOME": None, "NEW": "1"}})
    assert (done["code"], done["stdout"]) == (0, "spectral-surgery, version 0.1.0\n")
