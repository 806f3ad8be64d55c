"""The Hub itself: its repositories, the faults it was asked for, and its log."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.hub_server.exchange import Record
from tests.hub_server.faults import Fault
from tests.hub_server.speed import Speed
from tests.hub_server.storage import Commit, Repo, blob_of, commit_hash, keep

TOKEN = "hf_loopbackSECRETtoken0123456789abcd"
_ATTRIBUTES = ".gitattributes"


class LoopbackHub:
    """Repositories, faults and a log; `serving` runs one.

    Attributes:
        objects: folder of contents, by hash.
        endpoint: address.
        repos: by ``org/name``.
        faults: still to come.
        log: every request since the last `reset`.
        stored: hash of every large file that was uploaded and kept, once for each time.
        ranges: whether requests for a part of a file are understood.
        longest: bytes of a part that are given at most, as a server may; 0 is any number.
        redirects: whether large files are given from another address, as the Hub does.
        speed: how fast files are given, all together.
        lock: held by what reads and then writes.
    """

    def __init__(self, objects: Path, endpoint: str) -> None:
        """Start without repositories; ``objects`` is made."""
        objects.mkdir(parents=True, exist_ok=True)
        self.objects = objects
        self.endpoint = endpoint
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[Record] = []
        self.stored: list[str] = []
        self.ranges = True
        self.longest = 0
        self.redirects = False
        self.speed = Speed()
        self.lock = threading.RLock()

    @property
    def received(self) -> int:
        """Bytes of all requests in the log."""
        return sum(record.received for record in self.log)

    @property
    def sent(self) -> int:
        """Bytes of all answers in the log."""
        return sum(record.sent for record in self.log)

    @property
    def moved(self) -> int:
        """Bytes both ways."""
        return self.received + self.sent

    def fail(
        self,
        path: str,
        status: int = 0,
        *,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        cut_after: int | None = None,
        together: bool = False,
        corrupt: bool = False,
        skip_ranges: bool = False,
        on_hit: Callable[[], None] | None = None,
    ) -> Fault:
        """Ask for a failure; see `Fault`."""
        fault = Fault(path, status, times, dict(headers or {}), cut_after, together, corrupt, skip_ranges, on_hit)
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        """Forget faults and log, and be as fast and as able as ever; repositories stay."""
        self.ranges, self.longest, self.redirects, self.speed = True, 0, False, Speed()
        self.faults.clear()
        self.log.clear()
        self.stored.clear()

    def create(self, name: str, *, private: bool = False, gated: bool = False) -> Repo:
        """An empty repository, with the first commit that the Hub makes."""
        attributes = keep(self.objects, b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repo = self.repos[name] = Repo(private, gated)
        repo.refs["main"] = [Commit(commit_hash(name), {_ATTRIBUTES: attributes})]
        return repo

    def seed(self, name: str, folder: Path, *, private: bool = False, gated: bool = False) -> Repo:
        """A repository with the files of a folder, which are served from there."""
        repo = self.create(name, private=private, gated=gated)
        files = dict(repo.refs["main"][-1].files)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = blob_of(path)
        repo.append("main", files)
        return repo

    def edit(self, name: str, path: str, content: bytes) -> str:
        """Change a small file as somebody on the web site would; the hash of the commit."""
        repo = self.repos[name]
        return repo.append("main", repo.refs["main"][-1].files | {path: keep(self.objects, content)})

    def replace(self, name: str, path: str, file: Path) -> None:
        """Put another file in the place of one, at the very same commit, as a mirror might."""
        self.repos[name].refs["main"][-1].files[path] = blob_of(file)

    def contents(self, name: str, ref: str = "main") -> dict[str, bytes]:
        """What a branch holds, by path, without the file that the Hub makes."""
        files = self.repos[name].refs[ref][-1].files
        return {path: blob.path.read_bytes() for path, blob in files.items() if path != _ATTRIBUTES}

    def kept(self, sha256: str) -> Path | None:
        """Where a content is, if it is there."""
        path = self.objects / sha256
        return path if path.exists() else None
