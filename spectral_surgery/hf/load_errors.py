"""What transformers raises for a folder that it cannot load, as one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectral_surgery.errors import CheckpointError, ConfigError, SpectralSurgeryError
from spectral_surgery.files.header import read_json
from spectral_surgery.files.remote_code import own_auto_map

RAISED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ImportError)
_LONGEST = 300  # characters of a reason


@contextmanager
def loading(folder: Path, problem: str) -> Iterator[None]:
    """Turn what is raised meanwhile into a CheckpointError.

    Raises CheckpointError with the reason; for a model that brings code, with the option that runs it.
    """
    try:
        yield
    except SpectralSurgeryError:
        raise
    except RAISED as error:
        reason = reason_of(error)
        shim = "trust_remote_code" in reason and not own_code(folder)  # transformers takes ours for the model's code
        if shim or reason.startswith("Unrecognized configuration class"):
            reason = "it has no class of this kind for the architecture in config.json"
        elif "trust_remote_code" in reason:
            raise CheckpointError(
                f"{folder}: expected a model that transformers knows, got one that brings code, which"
                " config.json names (auto_map). Read that code, and run it with --trust-remote-code (in Python"
                " trust_remote_code=True)."
            ) from error
        raise CheckpointError(f"{folder}: {problem}: {reason[:_LONGEST]}") from error


def reason_of(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(f"{error or type(error).__name__}".split())


def check_utf8(text: str | Path, where: str) -> None:
    """Refuse what Python was given in another encoding than it reads: most libraries cannot take it.

    Python keeps such bytes as halves of surrogate pairs (PEP 383), which its functions for files turn back.

    Raises ConfigError when there are any, with the way out.
    """
    try:
        str(text).encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        remedy = "Use a name in UTF-8." if encoding == "utf-8" else "Set PYTHONUTF8=1 in the environment."
        raise ConfigError(
            f"{where}: expected text that Python can read as {encoding}, got other bytes. {remedy}"
        ) from None


def own_code(folder: Path) -> dict[str, object]:
    """The code that a model brings along, by what it is for, such as AutoModel; empty of most models."""
    file = folder / "config.json"
    return own_auto_map(read_json(file).get("auto_map")) if file.is_file() else {}
