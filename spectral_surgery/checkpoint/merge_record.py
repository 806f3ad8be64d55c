"""The record of a merge: which adapters went into a checkpoint, and what takes them out again.

It lies beside the weights in a folder of its own: ``merge.json``, the coded differences one after the other, and the
adapters without what they replaced whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spectral_surgery.checkpoint.header import read_json
from spectral_surgery.errors import CheckpointError, FormatVersionError, UnmergeError

FOLDER = "spectral_surgery_merge"
RECORD_FILE = "merge.json"
DATA_FILE = "undo.zst"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class MergedTensor:
    """One tensor that the merge changed.

    Attributes:
        sources: (number of the adapter, its layer) of every update in it; none where the tensor was replaced whole.
        transposed: whether the weight is stored as [I, O].
        step: of the grid the update was rounded to.
        offset: of its bytes in the data file.
        nbytes: how many; 0 where the base has no such tensor.
        base: SHA-256 of the tensor before; None where the base has no such tensor.
        merged: SHA-256 after.
    """

    sources: tuple[tuple[int, str], ...]
    transposed: bool
    step: float
    offset: int
    nbytes: int
    base: str | None
    merged: str


@dataclass(frozen=True)
class MergeRecord:
    """A merge.

    Attributes:
        weights: factor of each adapter.
        tensors: what was changed, by name.
        aliases: second name -> first name of tensors that were equal, and were changed together.
    """

    weights: tuple[float, ...]
    tensors: Mapping[str, MergedTensor]
    aliases: Mapping[str, str]

    def to_json(self) -> str:
        """As text."""
        body = {
            "format_version": FORMAT_VERSION,
            "weights": list(self.weights),
            "aliases": dict(self.aliases),
            "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()},
        }
        return json.dumps(body, indent=1, sort_keys=True) + "\n"


def adapter_folder(root: Path, number: int) -> Path:
    """Where the record keeps an adapter."""
    return root / FOLDER / "adapters" / str(number)


def is_merged(root: Path) -> bool:
    """Whether a checkpoint folder has the record of a merge."""
    return (root / FOLDER / RECORD_FILE).exists()


def read_record(root: Path) -> MergeRecord:
    """Read the record of a merged checkpoint.

    Args:
        root: its folder.

    Raises:
        UnmergeError: when there is none.
        FormatVersionError: when a later version wrote it.
        CheckpointError: when it is damaged.
    """
    path = root / FOLDER / RECORD_FILE
    if not path.is_file():
        raise UnmergeError(f"{root}: has no record of a merge; a folder that merge wrote is accepted.")
    body = read_json(path)
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatVersionError(f"{path}: format_version {version!r}; {FORMAT_VERSION} is accepted. Upgrade.")
    try:
        weights = tuple(float(weight) for weight in _as(list, body["weights"]))
        aliases = {_as(str, a): _as(str, b) for a, b in _as(dict, body["aliases"]).items()}
        tensors = {name: _tensor(_as(dict, row), len(weights)) for name, row in _as(dict, body["tensors"]).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); the file that merge wrote is accepted.") from None
    return MergeRecord(weights, tensors, aliases)


def read_data(root: Path, tensor: MergedTensor) -> bytes:
    """The coded differences of one tensor.

    Raises:
        UnmergeError: when the data file is missing or shorter than the record says.
    """
    path = root / FOLDER / DATA_FILE
    try:
        with path.open("rb") as stream:
            stream.seek(tensor.offset)
            data = stream.read(min(tensor.nbytes, path.stat().st_size))
    except OSError as error:
        raise UnmergeError(f"{path}: cannot be read ({error.strerror}); the file merge wrote is accepted.") from None
    if len(data) != tensor.nbytes:
        raise UnmergeError(f"{path}: is too short; the file that merge wrote is accepted. Fetch it again.")
    return data


def _tensor(row: dict[str, Any], adapters: int) -> MergedTensor:
    if set(row) != {field.name for field in fields(MergedTensor)}:
        raise ValueError(f"unknown fields {', '.join(sorted(row))}")
    sources = tuple((_as(int, number), _as(str, layer)) for number, layer in _as(list, row["sources"]))
    if any(not 0 <= number < adapters for number, _ in sources):
        raise ValueError(f"adapters {sources}")
    offset, nbytes = _as(int, row["offset"]), _as(int, row["nbytes"])
    if offset < 0 or nbytes < 0:
        raise ValueError(f"offset {offset}, nbytes {nbytes}")
    base = None if row["base"] is None else _as(str, row["base"])
    step = float(row["step"])
    if not 0 < step < float("inf"):
        raise ValueError(f"step {step}")
    return MergedTensor(sources, _as(bool, row["transposed"]), step, offset, nbytes, base, _as(str, row["merged"]))


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} where {kind.__name__} is expected")
    return value
