"""A compressed checkpoint on disk: spectra by name, read part by part and checked against the manifest."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.difference import base_name
from spectral_surgery.files.compressed.lossless import LOSSLESS_SUFFIXES, checked_offsets, lossless_info
from spectral_surgery.files.compressed.manifest import (
    FILE_NAME,
    QUANT_METHOD,
    SUFFIXES,
    Manifest,
    manifest_of,
    read_manifest,
)
from spectral_surgery.files.header import read_json
from spectral_surgery.files.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.files.reader import DTYPES, read_flat, read_tensor, read_together
from spectral_surgery.files.sidecar_files import CONFIG_FILE
from spectral_surgery.files.storage import Checkpoint, path_of


@dataclass(frozen=True)
class CompressedCheckpoint:
    """Headers and manifest of a compressed folder; spectra are read when asked for.

    Attributes:
        held: bytes that are read already, by the names they are stored under; see `with_tables`.
    """

    index: CheckpointIndex
    manifest: Manifest
    held: Mapping[str, bytearray] = field(default_factory=dict)

    def with_tables(self) -> CompressedCheckpoint:
        """The same, with the frame offsets and steps of all tensors in memory, for whoever reads many parts."""
        return self._holding(self.manifest.tensors, SUFFIXES[1:])

    def with_parts(self, names: Iterable[str]) -> CompressedCheckpoint:
        """The same, with all of some tensors in memory, as it is stored."""
        return self._holding(names, SUFFIXES)

    def _holding(self, names: Iterable[str], suffixes: Iterable[str]) -> CompressedCheckpoint:
        wanted = [self.index.tensors[f"{name}.{suffix}"] for name in names for suffix in suffixes]
        return replace(
            self, held={info.name: bytearray(data) for info, data in read_together(wanted)}
        )  # can be pickled

    def outline(self, name: str, part: int) -> EncodedSpectrum:
        """One part of a compressed tensor without its frames: nothing but steps is read."""
        return self._encoded(name, part, self._tables(name)[1], ())

    def _encoded(self, name: str, part: int, steps: torch.Tensor, frames: tuple[memoryview, ...]) -> EncodedSpectrum:
        record = self.manifest.tensors[name]
        here = record.parts[part]
        return EncodedSpectrum(
            frames,
            (here.rows[1] - here.rows[0], record.matrix[1]),
            here.rows_per_frame,
            steps[part, :-1].clone(),
            float(steps[part, -1]),
            record.basis(part),
        )

    def part(self, name: str, part: int) -> EncodedSpectrum:
        """One part of a compressed tensor, as frames.

        Raises CheckpointError when the stored bytes do not have their checksum.
        """
        record = self.manifest.tensors[name]
        codes = self.index.tensors[f"{name}.{SUFFIXES[0]}"]
        offsets, steps = self._tables(name)
        first = sum(p.frames for p in record.parts[:part])
        here = record.parts[part]
        ends = offsets[first : first + here.frames + 1]
        held = self.held.get(codes.name)
        data = (
            read_flat(codes, ends[0], ends[-1]).numpy().data if held is None else memoryview(held)[ends[0] : ends[-1]]
        )
        if zlib.crc32(data) != here.crc32:
            raise CheckpointError(
                f"{name}: expected part {part} with its checksum, got another one. Fetch {codes.file.name} again."
            )
        frames = tuple(data[a - ends[0] : b - ends[0]] for a, b in pairwise(ends))
        return self._encoded(name, part, steps, frames)

    def _tables(self, name: str) -> tuple[list[int], torch.Tensor]:
        codes, frames, step = (self.index.tensors[f"{name}.{suffix}"] for suffix in SUFFIXES)
        offsets = checked_offsets(name, self._table(frames), codes)
        steps = self._table(step).float()
        if not bool(torch.isfinite(steps).all()):
            raise CheckpointError(f"{name}: expected finite steps, got damaged ones. Fetch {step.file.name} again.")
        return offsets, steps

    def _table(self, info: TensorInfo) -> torch.Tensor:
        data = self.held.get(info.name)
        if data is None:
            return read_tensor(info)
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.shape)


def is_compressed(source: Checkpoint) -> bool:
    """Whether a folder claims to be a compressed checkpoint; nothing is checked."""
    folder = path_of(source)
    if (folder / FILE_NAME).exists():
        return True
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    quantised = config.get("quantization_config")
    return isinstance(quantised, dict) and quantised.get("quant_method") == QUANT_METHOD


def open_compressed(source: Checkpoint, *, differences: bool = False) -> CompressedCheckpoint:
    """Open a compressed folder; reads headers and the manifest, and checks that they agree.

    Args:
        source: written by compress, or by save_pretrained of a compressed model, which puts the manifest in headers.
        differences: whether spectra may stand for differences to another checkpoint, which are not weights.

    Raises:
        CheckpointError: when a spectrum named by the manifest is missing or has another size than the manifest says,
            or when it holds differences and those are not expected.
    """
    folder = path_of(source)
    if not (folder / FILE_NAME).exists() and (folder / CONFIG_FILE).exists():
        index = read_index(source)
        manifest = manifest_of(index.metadata) or read_manifest(folder)
    else:
        manifest, index = read_manifest(folder), read_index(source)
    base = base_name(manifest.options)
    if base is not None and not differences:
        raise CheckpointError(
            f"{folder.name}: expected a compressed model, got differences to {base} without weights. Decompress it"
            " with --base first."
        )
    for name, record in manifest.tensors.items():
        frames = sum(part.frames for part in record.parts)
        steps = {(len(record.parts), 2), (len(record.parts), record.matrix[1] + 1)}
        _check(index, f"{name}.spectral_codes", ("U8",), None)
        _check(index, f"{name}.spectral_frames", ("I64",), {(frames + 1,)})
        _check(index, f"{name}.spectral_step", ("F32", "BF16"), steps)
    index = _with_lossless(index, manifest)
    for alias, name in manifest.aliases.items():
        if name not in manifest.tensors and name not in index.tensors:
            raise CheckpointError(
                f"{alias}: expected a complete folder, got one without {name}, to which it is tied. Fetch it again."
            )
    return CompressedCheckpoint(index, manifest)


def _with_lossless(index: CheckpointIndex, manifest: Manifest) -> CheckpointIndex:
    """The index with tensors that are coded without loss as if they were stored plainly."""
    if not manifest.lossless:
        return index
    plain = {name: lossless_info(name, record, index.tensors) for name, record in manifest.lossless.items()}
    parts = {f"{name}.{suffix}" for name in plain for suffix in LOSSLESS_SUFFIXES}
    rest = {name: info for name, info in index.tensors.items() if name not in parts}
    return replace(index, tensors=dict(sorted({**rest, **plain}.items())))


def _check(
    index: CheckpointIndex, name: str, dtypes: tuple[str, ...], shapes: set[tuple[int]] | set[tuple[int, int]] | None
) -> None:
    info = index.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{name}: expected a complete folder, got a tensor of the manifest that is in no file. Fetch it again."
        )
    if info.dtype not in dtypes or (shapes is not None and info.shape not in shapes):
        raise CheckpointError(
            f"{name}: expected what the manifest says, got {info.dtype} {info.shape}; both must come from one run."
            " Fetch both again."
        )
