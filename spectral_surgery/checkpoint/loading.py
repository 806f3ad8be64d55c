"""What transformers raises for a folder that it cannot load, as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spectral_surgery.errors import CheckpointError, SpectralSurgeryError

_RAISED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ImportError)
_LONGEST = 300  # characters of a reason


@contextmanager
def loading(where: object, problem: str) -> Iterator[None]:
    """Turn what is raised meanwhile into a CheckpointError.

    Args:
        where: the folder.
        problem: what is wrong with it, before the reason.

    Raises:
        CheckpointError: with the reason; for a model with code of its own, with the option that runs it.
    """
    try:
        yield
    except SpectralSurgeryError:
        raise
    except _RAISED as error:
        reason = " ".join(f"{error or type(error).__name__}".split())
        if "trust_remote_code" in reason:
            raise CheckpointError(
                f"{where}: the model has code of its own, which config.json names (auto_map); models that transformers"
                " knows are accepted without --trust-remote-code (in Python trust_remote_code=True). Read the code, and"
                " run it with that."
            ) from error
        raise CheckpointError(f"{where}: {problem}: {reason[:_LONGEST]}") from error
