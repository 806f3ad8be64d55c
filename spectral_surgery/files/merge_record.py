"""The record of a merge: which adapters went into a checkpoint, and what takes them out again.

It lies beside the weights in a folder: ``merge.json``, the coded differences one after the other, and the
adapters without what they replaced whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import zstandard
from torch import Tensor

from spectral_surgery.errors import CheckpointError, FormatVersionError, UnmergeError
from spectral_surgery.files.header import read_json

FOLDER = "spectral_surgery_merge"
RECORD_FILE = "merge.json"
DATA_FILE = "undo.zst"
CONFIG_FILE = "config.json"  # of the base, where the merge had to change it
FORMAT_VERSION = 2
_FIRST_VERSION = 1  # had neither whole rows nor parts of tensors

Coding = Literal["update", "whole", "xor"]
Span = tuple[int, int, int]  # first row of the parameter, first row of the stored tensor, number of rows


@dataclass(frozen=True)
class Source:
    """An update of one adapter in a stored tensor.

    Rows are those of the matrix [numel / columns, columns], where columns are the last dimension, or 1 of a vector.

    Attributes:
        shape: of the parameter that it changes; () where that is the stored tensor.
        spans: which rows of the parameter are which of the stored tensor; () for all.
        transposed: whether the parameter is [I, O], or [E, I, O] for stacked experts.
        turned: whether the rows are those of the stored tensor with its last two dimensions exchanged.
    """

    number: int
    layer: str
    shape: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    transposed: bool = False
    turned: bool = False

    def resolved(self, shape: Sequence[int]) -> Source:
        """With nothing left to the stored tensor, which is of this shape."""
        whole = self.shape or tuple(shape)
        rows = whole[0] if len(whole) == 1 else math.prod(whole[:-1])
        return replace(self, shape=whole, spans=self.spans or ((0, 0, rows),))

    @property
    def out_in(self) -> tuple[int, int]:
        """(O, I) of the update of a matrix, or of a convolution."""
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)

    def to_json(self) -> list[object]:
        """Without what is empty at the end."""
        values = [
            self.number,
            self.layer,
            list(self.shape),
            [list(s) for s in self.spans],
            self.transposed,
            self.turned,
        ]
        while len(values) > 2 and not values[-1]:
            values.pop()
        return values


@dataclass(frozen=True)
class MergedTensor:
    """One tensor that the merge changed.

    Attributes:
        coding: what the bytes are: ``update``, what `live.undo` makes, with factors of DoRA before it; ``whole``,
            the base compressed; ``xor``, the differing bits compressed.
        step: of the grid the update was rounded to.
        offset: of its bytes in the data file.
        nbytes: how many; 0 where the base has no such tensor.
        base: SHA-256 of the tensor before; None where the base has no such tensor.
        merged: SHA-256 after.
        shape: of the base; None where the merge kept it.
    """

    sources: tuple[Source, ...]
    coding: Coding
    step: float
    offset: int
    nbytes: int
    base: str | None
    merged: str
    shape: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {**asdict(self), "sources": [source.to_json() for source in self.sources]}


@dataclass(frozen=True)
class MergeRecord:
    """A merge. ``aliases``: second name -> first name of tensors that were equal, and were changed together."""

    weights: tuple[float, ...]
    tensors: Mapping[str, MergedTensor]
    aliases: Mapping[str, str]

    def to_json(self) -> str:
        """As text."""
        body = {
            "format_version": FORMAT_VERSION,
            "weights": list(self.weights),
            "aliases": dict(self.aliases),
            "tensors": {name: tensor.to_json() for name, tensor in self.tensors.items()},
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

    Raises:
        UnmergeError: when there is none.
        FormatVersionError: when a later version wrote it.
        CheckpointError: when it is damaged.
    """
    path = root / FOLDER / RECORD_FILE
    if not path.is_file():
        raise UnmergeError(f"{root}: expected a folder that merge wrote, got one without a record of a merge.")
    body = read_json(path)
    version = body.get("format_version")
    if version not in (_FIRST_VERSION, FORMAT_VERSION):
        raise FormatVersionError(f"{path}: expected format_version up to {FORMAT_VERSION}, got {version!r}. Upgrade.")
    try:
        weights = tuple(float(weight) for weight in _as(list, body["weights"]))
        aliases = {_as(str, a): _as(str, b) for a, b in _as(dict, body["aliases"]).items()}
        tensors = {
            name: _tensor(_as(dict, row) if version == FORMAT_VERSION else _upgraded(_as(dict, row)), len(weights))
            for name, row in _as(dict, body["tensors"]).items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected the file that merge wrote, got a damaged one ({error}).") from None
    return MergeRecord(weights, tensors, aliases)


def read_data(root: Path, tensor: MergedTensor) -> bytes:
    """The coded differences of one tensor.

    Raises UnmergeError when the data file is missing or shorter than the record says.
    """
    path = root / FOLDER / DATA_FILE
    try:
        with path.open("rb") as stream:
            stream.seek(tensor.offset)
            data = stream.read(min(tensor.nbytes, path.stat().st_size))
    except OSError as error:
        raise UnmergeError(
            f"{path}: expected the file that merge wrote, got what cannot be read ({error.strerror})."
        ) from None
    if len(data) != tensor.nbytes:
        raise UnmergeError(f"{path}: expected the file that merge wrote, got a shorter one. Fetch it again.")
    return data


def compressed(base: Tensor, merged: Tensor | None = None) -> bytes:
    """A tensor, compressed.

    ``merged``: of the same shape and dtype, to code only the bits that differ; None for all.
    """
    raw = _bytes_of(base) if merged is None else _bytes_of(base) ^ _bytes_of(merged)
    return zstandard.ZstdCompressor().compress(raw.numpy().data)


def decompressed(data: bytes, shape: Sequence[int], dtype: torch.dtype, merged: Tensor | None = None) -> Tensor | None:
    """The reverse of `compressed`; None when the bytes do not fit."""
    size = math.prod(shape) * dtype.itemsize
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size) if size else b""
    except zstandard.ZstdError:
        return None
    if len(raw) != size or not size:
        return torch.empty(tuple(shape), dtype=dtype) if not size else None
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    flat = flat if merged is None else flat ^ _bytes_of(merged)
    return flat.view(dtype).reshape(tuple(shape))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _upgraded(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the first version as one of this."""
    transposed = _as(bool, row["transposed"])
    sources = [[number, layer, [], [], transposed] for number, layer in _as(list, row["sources"])]
    settings = {key: value for key, value in row.items() if key != "transposed"}
    return settings | {"sources": sources, "coding": "update" if sources else "whole", "shape": None}


def _tensor(row: dict[str, Any], adapters: int) -> MergedTensor:
    if set(row) != {field.name for field in fields(MergedTensor)}:
        raise ValueError(f"unknown fields {', '.join(sorted(row))}")
    sources = tuple(_source(_as(list, source)) for source in _as(list, row["sources"]))
    if any(not 0 <= source.number < adapters for source in sources):
        raise ValueError(f"adapters {[source.number for source in sources]}")
    if row["coding"] not in get_args(Coding) or (row["coding"] == "update") != bool(sources and row["base"]):
        raise ValueError(f"coding {row['coding']!r}")
    offset, nbytes = _as(int, row["offset"]), _as(int, row["nbytes"])
    if offset < 0 or nbytes < 0:
        raise ValueError(f"offset {offset}, nbytes {nbytes}")
    base = None if row["base"] is None else _as(str, row["base"])
    step = float(row["step"])
    if not 0 < step < float("inf"):
        raise ValueError(f"step {step}")
    shape = None if row["shape"] is None else _sizes(row["shape"])
    return MergedTensor(sources, row["coding"], step, offset, nbytes, base, _as(str, row["merged"]), shape)


def _source(values: list[Any]) -> Source:
    empty: tuple[Any, ...] = (0, "", [], [], False, False)
    number, layer, shape, spans, transposed, turned = *values, *empty[len(values) :]
    runs = []
    for span in _as(list, spans):
        row, stored, count = _sizes(span)
        runs.append((row, stored, count))
    flags = _as(bool, transposed), _as(bool, turned)
    return Source(_as(int, number), _as(str, layer), _sizes(shape), tuple(runs), *flags)


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(_as(int, value) for value in _as(list, values))
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes {sizes}")
    return sizes


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} where {kind.__name__} is expected")
    return value
