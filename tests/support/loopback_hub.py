"""A Hub on 127.0.0.1, with the standard library alone: the calls that huggingface_hub makes without Xet.

It counts the bytes it gets and sends, and fails on request. Content is kept by hash on disk, commits in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopbackSECRETtoken0123456789abcd"
_PIECE = 1 << 18
_LARGE = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class Blob:
    """Content of a file; ``path`` is where it is kept."""

    path: Path
    size: int
    sha256: str
    oid: str
    large: bool


@dataclass
class Repo:
    """Branches and pull requests, each with its commits: (hash, files)."""

    private: bool = False
    gated: bool = False
    refs: dict[str, list[tuple[str, dict[str, Blob]]]] = field(default_factory=dict)
    pull_requests: int = 0

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision in self.refs:
            return self.refs[revision][-1]
        every = (commit for commits in self.refs.values() for commit in commits)
        return next((commit for commit in every if commit[0] == revision), None)


@dataclass
class Fault:
    """A failure of requests that match.

    Attributes:
        path: searched in method and path, such as ``PUT /lfs``.
        status: answered instead of serving; 0 serves.
        times: how often; negative is always.
        headers: of the answer.
        cut_after: close the connection after this many bytes of the body, got or sent.
        corrupt: change a byte of the body, got or sent.
    """

    path: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    corrupt: bool = False
    skip_ranges: bool = False  # leave requests for a part of a file alone
    on_hit: Callable[[], None] | None = None


@dataclass(frozen=True)
class Request:
    """What was asked: line, answer, and bytes of both bodies."""

    line: str
    status: int
    received: int
    sent: int
    authorized: bool


class LoopbackHub:
    """Repositories, faults and a log; `serving` runs one."""

    def __init__(self, folder: Path) -> None:
        self.objects = folder
        self.objects.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.stored: list[str] = []  # every upload of a large file that was kept, by hash
        self.lock = threading.RLock()
        self.endpoint = ""
        self.ranges = True  # whether requests for a part are understood

    @property
    def received(self) -> int:
        return sum(request.received for request in self.log)

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.log)

    def fail(self, path: str, status: int = 0, **settings: Any) -> Fault:
        fault = Fault(path, status, **settings)
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        self.faults.clear()
        self.log.clear()
        self.stored.clear()

    def create(self, name: str, *, private: bool = False, gated: bool = False) -> Repo:
        attributes = self.keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False)
        repo = self.repos[name] = Repo(private, gated)
        repo.refs["main"] = [(_commit_hash(name), {".gitattributes": attributes})]
        return repo

    def seed(self, name: str, folder: Path, *, private: bool = False, gated: bool = False) -> Repo:
        """A repository with the files of a folder; they are served from there. Sparse files get a made-up hash."""
        repo = self.create(name, private=private, gated=gated)
        files = dict(repo.refs["main"][-1][1])
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = _blob_of(path)
        self.commit(repo, "main", files)
        return repo

    def commit(self, repo: Repo, ref: str, files: dict[str, Blob]) -> str:
        commits = repo.refs[ref]
        sha = _commit_hash(commits[-1][0], *(f"{name} {blob.oid}" for name, blob in sorted(files.items())))
        commits.append((sha, files))
        return sha

    def edit(self, name: str, path: str, content: bytes) -> str:
        """Change a file as somebody on the web site would."""
        repo = self.repos[name]
        files = repo.refs["main"][-1][1] | {path: self.keep(content, large=False)}
        return self.commit(repo, "main", files)

    def contents(self, name: str, ref: str = "main") -> dict[str, bytes]:
        found = self.repos[name].at(ref)
        assert found is not None
        return {path: blob.path.read_bytes() for path, blob in found[1].items() if path != ".gitattributes"}

    def keep(self, content: bytes, *, large: bool) -> Blob:
        sha = hashlib.sha256(content).hexdigest()
        path = self.objects / sha
        path.write_bytes(content)
        return Blob(path, len(content), sha, sha if large else _git_hash(content), large)

    def object(self, sha: str) -> Path | None:
        path = self.objects / sha
        return path if path.exists() else None


@contextmanager
def serving(folder: Path) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(folder)

    class Handler(_Handler):
        state = hub

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Connections that are cut are the point."""

    server = Server(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:
        """The log is kept by the hub."""

    def _serve(self) -> None:
        self.taken = self.given = self.status = 0
        self.fault = self._matching_fault()
        try:
            if self.fault and self.fault.cut_after == 0:
                self._cut()
            self._dispatch()
        except ConnectionError:
            self.close_connection = True
        finally:
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            line = f"{self.command} {self.path}"
            self.state.log.append(Request(line, self.status, self.taken, self.given, authorized))

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _matching_fault(self) -> Fault | None:
        with self.state.lock:
            for fault in self.state.faults:
                spared = fault.skip_ranges and self.headers.get("Range", "bytes=0-").rpartition("-")[2]
                if fault.times and not spared and re.search(fault.path, f"{self.command} {self.path}"):
                    fault.times -= 1
                    return fault
        return None

    def _dispatch(self) -> None:
        if self.fault and self.fault.status:
            self._body()
            if self.fault.on_hit:
                self.fault.on_hit()
            body = {"error": "asked to fail", "errors": [{"message": "asked to fail"}]}
            self._reply(body, self.fault.status, self.fault.headers)
            return
        path = unquote(urlsplit(self.path).path)
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                method(self, *match.groups())
                return
        self._body()
        self._reply({"error": f"no route for {self.command} {path}"}, 404)

    # --- bodies

    def _body(self) -> bytes:
        data = bytearray()
        self._receive(data.extend)
        return bytes(data)

    def _receive(self, sink: Callable[[bytes], object]) -> None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self._take(self._piece(size), sink)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self._piece(min(left, _PIECE))
            left -= len(piece)
            self._take(piece, sink)

    def _piece(self, size: int) -> bytes:
        """Exactly ``size`` bytes, unless it is time to cut."""
        limit = self.fault.cut_after if self.fault else None
        if limit is not None and self.taken + size > limit:
            self.taken += len(self.rfile.read(limit - self.taken))
            self._cut()
        piece = self.rfile.read(size)
        if len(piece) < size:
            self.taken += len(piece)
            raise ConnectionError("the client went away")
        return piece

    def _take(self, piece: bytes, sink: Callable[[bytes], object]) -> None:
        if self.fault and self.fault.corrupt and not self.taken:
            piece = bytes([piece[0] ^ 1]) + piece[1:]
        self.taken += len(piece)
        sink(piece)

    def _cut(self) -> None:
        if self.fault and self.fault.on_hit:
            self.fault.on_hit()
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionError("cut on request")

    def _reply(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})})
        self._send(data)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, data: bytes) -> None:
        if self.command == "HEAD":
            return
        limit = self.fault.cut_after if self.fault else None
        if limit is not None and self.given + len(data) > limit:
            self.wfile.write(data[: limit - self.given])
            self.given = limit
            self._cut()
        if self.fault and self.fault.corrupt and not self.given and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.wfile.write(data)
        self.given += len(data)

    # --- what a Hub checks

    def _repo(self, name: str, *, write: bool = False, files: bool = False) -> Repo | None:
        """The repository, or None after an answer that refuses it."""
        token = self.headers.get("Authorization")
        known = token == f"Bearer {TOKEN}"
        repo = self.state.repos.get(name)
        if token and not known:
            message = "Invalid credentials in Authorization header"
            self._refuse(401, {"X-Error-Message": message})
        elif repo is None or (repo.private and not known):
            self._refuse(404 if known else 401, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and files:
            self._refuse(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif write and not known:
            self._refuse(401, {})
        else:
            return repo
        return None

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self._body()
        self._reply({"error": "refused"}, status, headers)

    def _commit_at(self, name: str, revision: str, **wants: bool) -> tuple[str, dict[str, Blob]] | None:
        repo = self._repo(name, **wants)
        found = repo.at(revision) if repo else None
        if repo and found is None:
            self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        return found

    # --- routes

    def create_repo(self) -> None:
        body = json.loads(self._body())
        name = f"{body['organization']}/{body['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply({"error": "Unauthorized"}, 401)
        elif name in self.state.repos:
            self._reply({"error": "You already created this model repo", "url": f"{self.state.endpoint}/{name}"}, 409)
        else:
            self.state.create(name, private=body.get("visibility") == "private" or bool(body.get("private")))
            self._reply({"url": f"{self.state.endpoint}/{name}", "name": name, "id": name})

    def create_branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        if repo is None:
            return
        self._body()
        if branch in repo.refs:
            self._reply({"error": "Reference already exists"}, 409)
        else:
            repo.refs[branch] = [repo.refs["main"][-1]]
            self._reply({})

    def info(self, name: str, revision: str | None) -> None:
        found = self._commit_at(name, revision or "main")
        if found:
            sha, files = found
            siblings = [
                {"rfilename": path, "size": blob.size, "blobId": blob.oid if not blob.large else "0" * 40}
                | ({"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.large else {})
                for path, blob in files.items()
            ]
            self._reply({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, name: str, revision: str) -> None:
        found = self._commit_at(name, revision)
        if found:
            entries = [
                {"type": "file", "path": path, "size": blob.size, "oid": blob.oid if not blob.large else "0" * 40}
                | ({"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.large else {})
                for path, blob in found[1].items()
            ]
            self._reply(entries)

    def validate_yaml(self) -> None:
        content = json.loads(self._body())["content"]
        front = re.match(r"---\n(.*?)\n---", content.replace("\r\n", "\n"), re.DOTALL)
        bad = front is not None and any(
            line and not re.match(r"(- .*|[\w-]+:( .*)?|\s+.*)$", line) for line in front.group(1).split("\n")
        )
        errors = [{"message": "bad YAML"}] if bad else []
        self._reply({"errors": errors, "warnings": []}, 400 if bad else 200)

    def preupload(self, name: str, revision: str) -> None:
        pull_request = "create_pr" in parse_qs(urlsplit(self.path).query)
        found = self._commit_at(name, revision, write=not pull_request)
        if found is None:
            return
        files = []
        for entry in json.loads(self._body())["files"]:
            large = entry["path"].endswith(_LARGE) or entry["size"] > 10_000_000
            there = found[1].get(entry["path"])
            oid = {"oid": there.sha256 if there.large else there.oid} if there else {}
            mode = "lfs" if large else "regular"
            files.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        self._reply({"files": files})

    def batch(self, name: str) -> None:
        if self._repo(name, write=True) is None:
            return
        objects = []
        for wanted in json.loads(self._body())["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if self.state.object(wanted["oid"]) is None:
                entry["actions"] = {
                    "upload": {"href": f"{self.state.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.state.endpoint}/lfs-verify/{wanted['oid']}"},
                }
            objects.append(entry)
        self._reply({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        partial = self.state.objects / f"{oid}.{threading.get_ident()}.part"
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as stream:
                self._receive(lambda piece: (stream.write(piece), digest.update(piece)))
            if digest.hexdigest() != oid:
                self._reply({"error": "content does not have its hash"}, 400)
                return
            partial.rename(self.state.objects / oid)
            self.state.stored.append(oid)
            self._reply({})
        finally:
            partial.unlink(missing_ok=True)

    def verify(self, oid: str) -> None:
        body = json.loads(self._body())
        path = self.state.object(oid)
        fits = path is not None and path.stat().st_size == body["size"]
        self._reply({}, 200 if fits else 404)

    def make_commit(self, name: str, revision: str) -> None:
        pull_request = "create_pr" in parse_qs(urlsplit(self.path).query)
        found = self._commit_at(name, revision, write=True)
        if found is None:
            return
        files = dict(found[1])
        for line in self._body().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = self.state.keep(base64.b64decode(value["content"]), large=False)
            elif item["key"] == "lfsFile":
                path = self.state.object(value["oid"])
                if path is None:
                    self._reply({"error": "the large file is not there"}, 400)
                    return
                files[value["path"]] = Blob(path, value["size"], value["oid"], value["oid"], large=True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repo = self.state.repos[name]
        with self.state.lock:
            if pull_request:
                repo.pull_requests += 1
                revision = f"refs/pr/{repo.pull_requests}"
                repo.refs[revision] = [found]
            sha = self.state.commit(repo, revision, files)
        url = f"{self.state.endpoint}/{name}"
        extra = {"pullRequestUrl": f"{url}/discussions/{repo.pull_requests}"} if pull_request else {}
        self._reply({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **extra})

    def file(self, name: str, revision: str, path: str) -> None:
        found = self._commit_at(name, revision, files=True)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self._reply({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        blob = files[path]
        asked = self.headers.get("Range") if self.state.ranges else None
        start, stop = _range(asked, blob.size)
        headers = {
            "ETag": f'"{blob.oid}"',
            "X-Repo-Commit": sha,
            "Accept-Ranges": "bytes",
            "Content-Length": str(stop - start),
        }
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        partial = asked is not None
        self._head(
            206 if partial else 200,
            headers | ({"Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"} if partial else {}),
        )
        with blob.path.open("rb") as stream:
            stream.seek(start)
            while self.command == "GET" and start < stop:
                piece = stream.read(min(_PIECE, stop - start))
                start += len(piece)
                self._send(piece)


_ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("POST /api/repos/create", _Handler.create_repo),
    ("POST /api/validate-yaml", _Handler.validate_yaml),
    (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", _Handler.info),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", _Handler.tree),
    (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", _Handler.create_branch),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", _Handler.preupload),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", _Handler.make_commit),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)", _Handler.put),
    (r"POST /lfs-verify/(\w+)", _Handler.verify),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", _Handler.file),
]


def _range(header: str | None, size: int) -> tuple[int, int]:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
    if match is None:
        return 0, size
    return int(match.group(1)), min(size, int(match.group(2)) + 1) if match.group(2) else size


def _blob_of(path: Path) -> Blob:
    size = path.stat().st_size
    large = path.name.endswith(_LARGE)
    sparse = path.stat().st_blocks * 512 < size // 2 and size > 1 << 20
    content = b"" if sparse else path.read_bytes()
    sha = hashlib.sha256(content or str(path).encode()).hexdigest()
    return Blob(path, size, sha, sha if large else _git_hash(content), large)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _commit_hash(*parts: str) -> str:
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()
