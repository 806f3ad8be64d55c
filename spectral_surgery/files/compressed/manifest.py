"""The manifest of a compressed checkpoint: what each stored spectrum decodes to, checked before anything is decoded."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from spectral_surgery.codec.encoded import Basis, EncodingReport
from spectral_surgery.errors import CheckpointError, ConfigError, FormatVersionError, LimitError
from spectral_surgery.files.compressed.lossless import LosslessRecord, parse_lossless
from spectral_surgery.files.reader import DTYPES
from spectral_surgery.transforms import TRANSFORMS

FORMAT_VERSION = 2
FILE_NAME = "spectral_surgery.json"
QUANT_METHOD = "spectral_surgery"
SUFFIXES = ("spectral_codes", "spectral_frames", "spectral_step")
_MAX_BYTES = 256 << 20
_MAX_WEIGHTS = 1 << 44
_MAX_TILE = 4096


@dataclass(frozen=True)
class PartRecord:
    """A row range of a compressed tensor that was encoded alone.

    Attributes:
        rows: first row and end of the range.
        rows_per_frame: rows of each of its frames.
        crc32: of its frames.
    """

    rows: tuple[int, int]
    rows_per_frame: int
    transform: str
    crc32: int
    report: EncodingReport

    @property
    def frames(self) -> int:
        """Number of frames."""
        return -(-(self.rows[1] - self.rows[0]) // self.rows_per_frame)

    def to_json(self) -> dict[str, object]:
        """As the manifest has it."""
        return vars(self) | {"report": vars(self.report)}


@dataclass(frozen=True)
class TensorRecord:
    """A compressed tensor.

    Attributes:
        dtype: safetensors code of the original.
        matrix: (rows, columns) it was seen as.
        axes: transformed axes of the matrix.
    """

    dtype: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    tile: int
    axes: tuple[int, ...]
    parts: tuple[PartRecord, ...]

    @property
    def report(self) -> EncodingReport:
        """Measurements of all parts together."""
        return reduce(add, (part.report for part in self.parts))

    def to_json(self) -> dict[str, object]:
        """As the manifest has it."""
        return vars(self) | {"parts": [part.to_json() for part in self.parts]}

    def basis(self, part: int) -> Basis:
        """Transform of one part."""
        return Basis(self.parts[part].transform, self.tile, self.axes)


@dataclass(frozen=True)
class Manifest:
    """All compressed tensors by name, tied names, and how the folder was made: settled options and the command line.

    ``lossless``: tensors that are coded bit for bit.
    """

    tensors: dict[str, TensorRecord]
    aliases: dict[str, str]
    options: Mapping[str, object]
    source: str
    command: str = ""
    lossless: Mapping[str, LosslessRecord] = field(default_factory=dict)

    @property
    def report(self) -> EncodingReport:
        """Measurements of all tensors together."""
        return reduce(add, (record.report for record in self.tensors.values()), EncodingReport(0, 0, 0, 0.0, 0.0, 0.0))

    def to_json(self) -> str:
        """Text of the manifest; equal manifests give equal text."""
        body = {
            "format_version": FORMAT_VERSION,
            "quant_method": QUANT_METHOD,
            "source": self.source,
            **({"command": self.command} if self.command else {}),
            "options": self.options,
            "aliases": self.aliases,
            "tensors": {name: record.to_json() for name, record in self.tensors.items()},
            **({"lossless": {name: asdict(one) for name, one in self.lossless.items()}} if self.lossless else {}),
        }
        return indented(body) + "\n"


def indented(value: object, margin: str = "\n") -> str:
    """JSON as ``json.dumps(value, sort_keys=True, indent=1)`` has it, which takes many times as long."""
    inner = f"{margin} "
    if isinstance(value, dict) and value:
        rows = (f"{_quoted(key)}: {indented(value[key], inner)}" for key in sorted(value))
        return "{" + inner + f",{inner}".join(rows) + margin + "}"
    if isinstance(value, list | tuple) and value:
        return "[" + inner + f",{inner}".join([indented(one, inner) for one in value]) + margin + "]"
    if isinstance(value, str):
        return _quoted(value)
    return repr(value) if type(value) is int or (type(value) is float and math.isfinite(value)) else json.dumps(value)


_quoted = json.encoder.encode_basestring_ascii


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a compressed folder.

    Returns:
        The manifest; sizes in it are consistent with each other, and bounded.

    Raises:
        CheckpointError: when there is none or it is damaged.
        FormatVersionError: when it is of another format version.
        LimitError: when it claims impossible sizes.
    """
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LimitError(f"{path.name}: expected at most {_MAX_BYTES} bytes, got {path.stat().st_size}.")
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder.name}: expected a folder that compress wrote, got no {FILE_NAME}. Is it compressed at all?"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name}: expected the JSON that compress wrote, got what cannot be read ({error}). Fetch it again."
        ) from None
    return parse_manifest(body)


def manifest_of(metadata: Mapping[str, str]) -> Manifest | None:
    """The manifest in the header of a weight file; None when there is none.

    Raises CheckpointError when it is damaged; see `read_manifest`.
    """
    text = metadata.get(QUANT_METHOD)
    if text is None:
        return None
    try:
        return parse_manifest(json.loads(text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            f"{QUANT_METHOD} in the header: expected the JSON that save_pretrained wrote, got what cannot be read"
            f" ({error}). Fetch the file again."
        ) from None


def parse_manifest(body: object) -> Manifest:
    """Check the parsed JSON of a manifest; see `read_manifest`."""
    if not isinstance(body, dict) or body.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{FILE_NAME}: expected the file that compress wrote, got another one.")
    check_version(body.get("format_version"), FILE_NAME)
    try:
        tensors = {str(name): _tensor(str(name), record) for name, record in body["tensors"].items()}
        aliases = {str(alias): str(name) for alias, name in body["aliases"].items()}
        lossless = {str(name): parse_lossless(str(name), one) for name, one in body.get("lossless", {}).items()}
        options, source, command = dict(body["options"]), str(body["source"]), str(body.get("command", ""))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            f"{FILE_NAME}: expected the file that compress wrote, got a damaged one ({error!r}). Fetch it again."
        ) from None
    return Manifest(tensors, aliases, options, source, command, lossless)


def check_version(version: object, file: str) -> None:
    """Refuse a format version that this release does not read, with what to do about it, as FormatVersionError."""
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        advice = "Compress the original again" if older else "Upgrade spectral-surgery to read newer files"
        raise FormatVersionError(f"{file}: expected format version {FORMAT_VERSION}, got {version!r}. {advice}.")


def _tensor(name: str, body: dict[str, Any]) -> TensorRecord:
    rows, columns = map(_count, body["matrix"])
    shape = tuple(map(_count, body["shape"]))
    record = TensorRecord(
        str(body["dtype"]),
        shape,
        (rows, columns),
        _count(body["tile"]),
        tuple(map(int, body["axes"])),
        tuple(parse_part(part) for part in body["parts"]),
    )
    weights = 1
    for size in shape:
        weights *= size
    if weights > _MAX_WEIGHTS or not weights or weights != rows * columns:
        raise LimitError(
            f"{name}: expected the sizes that compress wrote, got shape {shape} for a matrix of {rows} x {columns}."
        )
    ends = [0, *(part.rows[1] for part in record.parts)]
    if ends[-1] != rows or any(
        part.rows[0] != end or part.rows[1] <= end for part, end in zip(record.parts, ends, strict=False)
    ):
        raise LimitError(
            f"{name}: expected parts that cover {rows} rows in order, got others. Fetch the manifest again."
        )
    if record.dtype not in DTYPES or not 1 <= record.tile <= _MAX_TILE or record.axes not in ((0, 1), (1,), (0,), ()):
        raise CheckpointError(
            f"{name}: expected a known dtype, tile and axes, got {record.dtype}, {record.tile} and {record.axes}. "
            "Fetch the manifest again."
        )
    return record


def parse_part(body: dict[str, Any]) -> PartRecord:
    """Check the parsed JSON of one part."""
    start, stop = map(int, body["rows"])
    TRANSFORMS[body["transform"]]  # refuses unknown names
    report = body["report"]
    counts = (_count(report[key]) for key in ("weights", "stored_bytes", "kept"))
    energies = (_energy(report[key]) for key in ("energy", "error_energy", "stored_energy"))
    height = _count(body["rows_per_frame"])
    if not height:
        raise ValueError("rows_per_frame is 0")
    return PartRecord((start, stop), height, body["transform"], int(body["crc32"]), EncodingReport(*counts, *energies))


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _energy(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{value!r} is not a squared norm")
    return value
