"""Differences to a base checkpoint: which tensors have a counterpart there, and whether it is the same base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.header import FLOATS, FLOATS8
from spectral_surgery.files.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.files.reader import byte_pieces, read_flat
from spectral_surgery.files.storage import Checkpoint

_MARK = " sha256:"


def describe(base: CheckpointIndex, name: str) -> str:
    """A base in words and a checksum over all its tensors, which are read for it. Returns ``<name> sha256:<hex>``."""
    digest = hashlib.sha256()
    for info in base.tensors.values():
        digest.update(json.dumps([info.name, info.dtype, info.shape]).encode())
        for piece in byte_pieces(info):
            digest.update(piece)
    return f"{name}{_MARK}{digest.hexdigest()}"


def base_name(options: Mapping[str, object]) -> str | None:
    """What the base of a compressed checkpoint is called; None when it holds no differences."""
    text = options.get("base")
    return str(text).rpartition(_MARK)[0] if text else None


def check_base(options: Mapping[str, object], base: Checkpoint | None, where: str) -> CheckpointIndex | None:
    """Read the headers of the right base; all of its tensors are read to see that it is.

    Returns:
        The base; None where none is needed.

    Raises:
        ConfigError: when one was given and none is needed.
        CheckpointError: when one is needed and not given, or has other tensors than the one the differences are to.
    """
    name = base_name(options)
    if name is None:
        if base is not None:
            raise ConfigError(f"{where}: expected differences to go with a base, got whole weights. Leave out --base.")
        return None
    if base is None:
        raise CheckpointError(f"{where}: expected {name} too, which it holds differences to, got no base. Use --base.")
    index = read_index(base)
    if describe(index, name) != options["base"]:
        raise CheckpointError(
            f"{base}: expected the {name} that {where} holds differences to, with the same tensors bit for bit, got"
            " another checkpoint."
        )
    return index


def counterpart(base: CheckpointIndex | None, name: str, shape: tuple[int, ...]) -> TensorInfo | None:
    """The tensor of a base that one of another checkpoint is the difference to; None when it has none."""
    info = base.tensors.get(name) if base is not None else None
    return info if info is not None and info.shape == shape and info.dtype in (*FLOATS, *FLOATS8) else None


def read_rows(info: TensorInfo, rows: tuple[int, int], columns: int) -> Tensor:
    """Rows of a tensor seen as a matrix: [N, I] float32."""
    start, stop = rows
    return read_flat(info, start * columns, stop * columns).reshape(stop - start, columns).float()
