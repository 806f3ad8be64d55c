"""Sparse spectra as safetensors files: written whole or not at all, and read with suspicion."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectral_surgery.errors import CheckpointError, ConfigError, FormatVersionError, ShapeError
from spectral_surgery.sparse.domain import Domain

FORMAT = "spectral_surgery.sparse"
FORMAT_VERSION = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Stored:
    """What a file holds; see SparseSpectralTensor for the meaning."""

    values: Tensor
    positions: Tensor
    domain: Domain
    dtype: torch.dtype


def write(path: Path, stored: Stored) -> None:
    """Write one spectrum; the file appears under its name only when it is complete."""
    header = {
        "version": FORMAT_VERSION,
        "shape": stored.domain.shape,
        "tile": stored.domain.tile,
        "transform": stored.domain.transform,
        "axes": stored.domain.axes,
        "dtype": str(stored.dtype).removeprefix("torch."),
    }
    partial = path.with_name(path.name + ".partial")
    tensors = {"values": stored.values.contiguous(), "positions": stored.positions.contiguous()}
    # one key: safetensors does not order several, and equal spectra must give equal files
    save_file(tensors, partial, metadata={FORMAT: json.dumps(header, sort_keys=True)})
    partial.replace(path)


def read(path: Path) -> Stored:
    """Read one spectrum and check all of it.

    Raises:
        FormatVersionError: If the file has another format version.
        CheckpointError: If the file is missing, damaged, or not a valid spectrum.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
            names = sorted(file.keys())
            tensors = [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got what cannot be read ({error}).") from error
    if text is None or names != ["positions", "values"]:
        raise CheckpointError(
            f"{path}: expected a file written by SparseSpectralTensor.save, got {', '.join(names) or 'nothing'}."
        )
    positions, values = tensors
    domain, dtype = _parse(path, text)
    _check_values(path, values, domain)
    _check_positions(path, positions, len(values), domain)
    return Stored(values, positions, domain, dtype)


def _parse(path: Path, text: str) -> tuple[Domain, torch.dtype]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON in the header, got an error ({error}).") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: expected format version {FORMAT_VERSION}, got {version}. Use the release that wrote it."
        )
    shape, axes, tile = header.get("shape"), header.get("axes"), header.get("tile")
    transform, dtype = header.get("transform"), header.get("dtype")
    numbers = _integers(shape) and _integers(axes) and _integers([0 if tile is None else tile])
    if not (numbers and isinstance(transform, str) and dtype in list(DTYPES)):
        raise CheckpointError(
            f"{path}: expected integers for shape, axes and tile, and the names of a transform and of a dtype"
            f" ({', '.join(DTYPES)}) in the header, got {text[:200]}."
        )
    domain = Domain(tuple(shape), tile, transform, tuple(axes))
    try:
        domain.check()
    except (ConfigError, ShapeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return domain, DTYPES[dtype]


def _integers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_values(path: Path, values: Tensor, domain: Domain) -> None:
    accepted = (torch.complex64,) if domain.half_plane else VALUE_DTYPES
    if values.dtype not in accepted or values.ndim != 1 or not values.numel():
        raise CheckpointError(
            f"{path}: expected values as a non-empty vector of {' or '.join(map(str, accepted))} for"
            f" {domain.transform}, got {values.dtype} {tuple(values.shape)}."
        )
    if not values.isfinite().all():
        raise CheckpointError(f"{path}: expected finite values, got others.")


def _check_positions(path: Path, positions: Tensor, count: int, domain: Domain) -> None:
    if positions.dtype not in (torch.int32, torch.int64) or positions.shape != (count,):
        raise CheckpointError(
            f"{path}: expected positions of int32 or int64 of shape ({count},), one for each value, got"
            f" {positions.dtype} {tuple(positions.shape)}."
        )
    if not (positions[1:] > positions[:-1]).all():
        raise CheckpointError(f"{path}: expected strictly increasing positions, got others.")
    rows, columns = domain.spectrum_shape
    if positions[0] < 0 or positions[-1] >= rows * columns:
        raise CheckpointError(
            f"{path}: expected positions from 0 to {rows * columns - 1}, got {int(positions[0])} to"
            f" {int(positions[-1])}."
        )
    if not domain.freedom(positions).all():
        raise CheckpointError(f"{path}: expected one of each pair of conjugate positions, got both.")
