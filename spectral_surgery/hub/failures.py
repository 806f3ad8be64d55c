"""Failures of the Hub in one line each, without secrets, and calls that are tried again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from spectral_surgery.errors import HubError, SpectralSurgeryError

T = TypeVar("T")

TRIES = 4
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 300.0  # seconds
_LIMIT = re.compile(r"\br=0\b.*?\bt=(\d+)")  # nothing remains for so many seconds; draft-ietf-httpapi-ratelimit-headers
_TOKEN = re.compile(r"\bhf_\w+")
_QUERY = re.compile(r"\?\S+")  # the signature of a presigned address
_CREDENTIALS = "Give --token, set HF_TOKEN, or run `hf auth login`."
_STATUS = {
    401: f"the token is missing or refused (401); expected one that opens it. {_CREDENTIALS}",
    403: "not permitted (403); expected a token with the right to do this. Use another token or repository.",
    404: "not found (404); expected an existing repository. Check the name.",
    409: "changed while it was written to (409); expected one writer at a time. Run the command again.",
    416: "shorter than the Hub says (416); expected whole files. Upload it again.",
    429: "too many requests (429); expected a slower pace. Wait some minutes and run the command again.",
}


class UnansweredError(HubError):
    """No answer came at all, so that the cache is the next best."""


@contextmanager
def reaching(where: object) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError about ``where``."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    transport = transport_error()
    try:
        yield
    except SpectralSurgeryError:
        raise
    except (transport, OSError, EntryNotFoundError, HFValidationError, ValueError, RuntimeError) as error:
        unanswered = isinstance(error, (transport, OSError)) and _response(error) is None
        raise (UnansweredError if unanswered else HubError)(f"{where}: {explain(error)}") from None


def transport_error() -> type[Exception]:
    """What huggingface_hub raises when a request fails on its way: the error of whichever HTTP library it uses."""
    from huggingface_hub.errors import HfHubHTTPError

    kind: type[Exception] = HfHubHTTPError.__mro__[1]
    return kind


def pause(error: Exception, attempt: int, tries: int) -> None:
    """Wait before another attempt, as long as the Hub asks for; raise the error where another one would not help.

    Args:
        error: what went wrong; without an answer of the Hub it may pass.
        attempt: how many there were.
        tries: how many there may be.
    """
    response = _response(error)
    if attempt >= tries or (response is not None and getattr(response, "status_code", None) not in _PASSING):
        raise error
    asked = _asked_for(getattr(response, "headers", {}))
    time.sleep(min(2.0**attempt if asked is None else asked, _LONGEST_WAIT))


def _asked_for(headers: Mapping[str, str]) -> float | None:
    """Seconds that the Hub asks to wait for."""
    text = str(headers.get("Retry-After", ""))
    if text.isdigit():
        return float(text)
    limit = _LIMIT.search(str(headers.get("RateLimit", "")))
    return float(limit.group(1)) if limit else None


def retrying(call: Callable[[], T], tries: int = TRIES) -> T:
    """Call, and again when the Hub was busy or broken for a moment; waits as long as it asks for."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except (HfHubHTTPError, EntryNotFoundError, RuntimeError) as error:
            if _response(error) is None:
                raise
            pause(error, attempt, tries)


def explain(error: BaseException) -> str:
    """What went wrong, what was expected and what to do, in one line without tokens or signatures."""
    from huggingface_hub import errors

    chain = [error, *_causes(error)]
    for kind, text in (
        (errors.GatedRepoError, f"is gated; expected an account with access. Ask on its page, then: {_CREDENTIALS}"),
        (
            errors.RevisionNotFoundError,
            "has no such revision; expected a branch, tag or commit. Check @revision or --revision.",
        ),
        (
            errors.RepositoryNotFoundError,
            "no such repository, or a private one that the token does not open; expected org/name of a model. "
            f"Check the name. {_CREDENTIALS}",
        ),
        (
            errors.OfflineModeIsEnabled,
            "is not asked, since HF_HUB_OFFLINE is set; what is in the cache can be read. Unset HF_HUB_OFFLINE.",
        ),
        (errors.RemoteEntryNotFoundError, "has no such file; expected files it lists. Check the path."),
    ):
        if any(isinstance(one, kind) for one in chain):
            return text
    status = getattr(_response(error), "status_code", 0)
    if status >= 500:
        return f"the Hub failed ({status}); expected a working one. Wait a while and run the command again."
    if status in _STATUS:
        return _STATUS[status]
    told = (str(one) for one in chain if not isinstance(one, RuntimeError) and str(one).strip())
    reason = clean(next(told, type(chain[-1]).__name__))
    if status:
        return f"refused what was sent ({reason}); expected what its documentation allows. Correct it and retry."
    if "xet" in " ".join(map(str, chain)).lower():
        return f"cannot store by Xet ({reason}); expected a Hub with Xet. For one without, set HF_HUB_DISABLE_XET=1."
    return (
        f"cannot be reached or used ({reason}); expected a path, org/name or hf://org/name. "
        "Check the name, the network and HF_ENDPOINT."
    )


def clean(text: str) -> str:
    """The first two lines of a text as one, without tokens and the queries of addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _TOKEN.sub("hf_...", _QUERY.sub("", " ".join(lines[:2])))[:200]


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__) is not None:
        yield cause
        error = cause


def _response(error: BaseException) -> object | None:
    found = (getattr(one, "response", None) for one in (error, *_causes(error)))
    return next((response for response in found if response is not None), None)
