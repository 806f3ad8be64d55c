"""Where a checkpoint comes from: a path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from spectral_surgery.errors import HubError

_REPOSITORY = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def resolve(source: str, *, revision: str | None = None) -> Path:
    """Find a checkpoint on disk, fetching it from the Hub when the source names a repository.

    Args:
        source: a folder, a file, ``org/name``, ``org/name@revision`` or ``hf://org/name``. What exists on disk is a
            path.
        revision: branch, tag or commit; overrides the one in source.

    Returns:
        A local path; for anything that does not look like a repository, the path as given.

    Raises:
        HubError: when the repository cannot be fetched.
    """
    path = Path(source).expanduser()
    match = _REPOSITORY.fullmatch(source)
    if path.exists() or match is None or source.startswith((".", "/", "~")):
        return path
    # lazily: a second of imports that local work does not need
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, at = match.group(1), revision or match.group(2)
    try:
        return Path(
            snapshot_download(
                name, revision=at, ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(
            f"{source}: no such folder, and the Hub repository cannot be fetched ({reason}); "
            "a path, org/name or hf://org/name is accepted. Check the name, the network and HF_TOKEN."
        ) from None
