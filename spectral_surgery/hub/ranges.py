"""Any range of a file on the Hub, at one commit, by the client of huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from spectral_surgery.errors import HubError
from spectral_surgery.hub.failures import pause, reaching, transport_error
from spectral_surgery.hub.listing import Listing
from spectral_surgery.hub.repository import Repository

_TRIES = 7  # attempts in a row that bring nothing: they wait two minutes in all
_TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit; see `files.storage.RemoteFile`.

    Attributes:
        repository: as the user named it.
        version: its SHA-256 as a large file, else the hash of its git blob; empty where the Hub does not tell.
        endpoint: address of the Hub, which another machine may not know.
    """

    repository: Repository
    commit: str
    path: str
    size: int
    version: str
    endpoint: str
    token: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Without the folders it is in."""
        return PurePosixPath(self.path).name

    def __str__(self) -> str:
        return f"{self.repository}/{self.name}"

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill a view with the bytes from ``start`` on. A connection that is cut is made again for what is missing.

        Raises HubError when several attempts in a row bring nothing, when the Hub refuses, or when the file is another
        one by now.
        """
        done = attempt = 0
        with reaching(self):
            while done < view.nbytes:
                before, failure = done, None
                try:
                    for piece in self._pieces(start + done, start + view.nbytes):
                        view[done : done + len(piece)] = piece
                        done += len(piece)
                except transport_error() as error:
                    failure = error
                if done == view.nbytes:
                    return
                attempt = 1 if done > before else attempt + 1
                ended = f"{self}: ends at byte {start + done}; expected {self.size} bytes. Run the command again."
                pause(failure or HubError(ended), attempt, _TRIES)

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """What one request brings; no more is taken from the connection than is wanted."""
        left = stop - start
        with self._answer(start, stop) as response:
            for piece in response.iter_raw():
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return

    @contextmanager
    def _answer(self, start: int, stop: int) -> Iterator[Any]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repository.name, self.path, revision=self.commit, endpoint=self.endpoint)
        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(token=self.token) | wanted
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            self._check(response, start)
            yield response

    def _check(self, response: Any, start: int) -> None:
        """Refuse what is not the wanted range of the listed file."""
        first = (*response.history, response)[0]  # the Hub; what comes after is where it stores files
        told = str(first.headers.get("X-Linked-Etag") or first.headers.get("ETag") or "").removeprefix("W/").strip('"')
        replaced = len(told) == len(self.version) and told != self.version
        if response.status_code == 206:
            span, _, total = str(response.headers.get("Content-Range", "")).removeprefix("bytes ").partition("/")
            replaced = replaced or (total.isdigit() and int(total) != self.size)
            if not replaced and span.partition("-")[0] != str(start):
                raise HubError(f"{self}: gives bytes {span}; expected them from {start} on. Use --keep-source.")
        elif start:  # it gives the whole file, from its beginning
            raise HubError(
                f"{self}: is given as a whole ({response.status_code}), perhaps by a proxy; expected the part that was"
                " asked for (206). Use --keep-source, which downloads whole files."
            )
        if replaced:
            raise HubError(
                f"{self}: was replaced while it was read; expected the file of commit {self.commit[:12]}. Run the"
                " command again."
            )


def file_of(listing: Listing, name: str, token: str | None = None) -> HubFile:
    """One of the files of a listing."""
    from huggingface_hub import constants

    found = listing.files[name]
    version = found.sha256 or found.blob_id
    where = (listing.repository, listing.commit, listing.inside(name))
    return HubFile(*where, found.size, version, constants.ENDPOINT, token)
