"""Encoded parts of tensors, a file each, and the entries of a checkpoint that are joined from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from spectral_surgery.codec.encoded import EncodedSpectrum, EncodingReport, steps_bytes
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.atomic import replace_file
from spectral_surgery.files.compressed.lossless import (
    LOSSLESS_SUFFIXES,
    LosslessPart,
    LosslessRecord,
    crc32_of,
    layout_for,
    parse_lossless_part,
)
from spectral_surgery.files.compressed.manifest import SUFFIXES, PartRecord, parse_part
from spectral_surgery.files.header import TensorInfo, read_header
from spectral_surgery.files.reader import byte_pieces, read_bytes, read_tensor, release
from spectral_surgery.files.writer import Entry, tensor_entry

_OVERHEAD = 512  # bytes of names, headers and the manifest that a tensor coded without loss takes more


def part_record(rows: tuple[int, int], encoded: EncodedSpectrum, report: EncodingReport) -> PartRecord:
    """What the manifest says of encoded rows."""
    return PartRecord(rows, encoded.rows_per_frame, encoded.basis.transform, crc32_of(encoded.frames), report)


def write_part(path: Path, key: str, encoded: EncodedSpectrum | None, record: PartRecord | None) -> None:
    """Leave a part in a file, whole or not at all.

    Args:
        key: of everything that decided its bytes.
        encoded: the part; None where it is to be copied.
    """
    tensors = {}
    if encoded is not None:
        lengths = torch.tensor([0, *map(len, encoded.frames)])
        data = bytearray().join(encoded.frames)
        tensors = {
            "codes": torch.frombuffer(data, dtype=torch.uint8),
            "frames": torch.cumsum(lengths, 0),
            "step": torch.cat((encoded.step, torch.tensor([encoded.offset]))),
        }
    tables = crc32_of(tensors[name].numpy().data for name in ("frames", "step")) if tensors else 0
    metadata = {"key": key, "record": json.dumps(record.to_json() if record else None), "tables": str(tables)}
    replace_file(path, save(tensors, metadata), durable=False)  # there may be very many, and `read_part` checks them


def read_part(path: Path, key: str, *, verify: bool = True) -> tuple[dict[str, TensorInfo], PartRecord | None] | None:
    """Where the tensors of a part are, and its record; None for a file that is missing, damaged or of another key.

    ``verify``: read all of it and compare checksums.
    """
    if not path.exists():
        return None
    try:
        index = read_header(path)
    except CheckpointError:
        return None  # cut short by a full disk or a power failure: it is done again
    if index.metadata.get("key") != key:
        return None
    body = json.loads(index.metadata["record"])
    record = parse_part(body) if body else None
    if record and not index.tensors.keys() >= {"codes", "frames", "step"}:
        return None
    if record and verify:
        codes, *tables = (index.tensors[name] for name in ("codes", "frames", "step"))
        sums = [crc32_of(read_bytes(info, 0, info.nbytes) for info in infos) for infos in ([codes], tables)]
        if sums[0] != record.crc32 or str(sums[1]) != index.metadata.get("tables"):
            return None
    return index.tensors, record


def write_lossless(path: Path, key: str, pieces: Sequence[bytes], part: LosslessPart) -> None:
    """Leave a part that is coded without loss in a file, whole or not at all; see `write_part`."""
    tensors = {
        "codes": torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8),
        "frames": torch.cumsum(torch.tensor([0, *map(len, pieces)]), 0),
    }
    replace_file(path, save(tensors, {"key": key, "lossless": json.dumps(asdict(part))}))


def read_lossless(path: Path, key: str) -> tuple[dict[str, TensorInfo], LosslessPart] | None:
    """Where the tensors of such a part are, and its record; None for a file that is missing or of another key."""
    try:
        index = read_header(path) if path.exists() else None
    except CheckpointError:
        return None
    if index is None or index.metadata.get("key") != key or "lossless" not in index.metadata:
        return None
    return index.tensors, parse_lossless_part(json.loads(index.metadata["lossless"]))


def joined_lossless(
    info: TensorInfo, parts: Sequence[tuple[Mapping[str, TensorInfo], LosslessPart]]
) -> tuple[list[Entry], LosslessRecord] | None:
    """A tensor that is coded without loss, joined from the files of its parts; None where that saves no bytes."""
    files, records = zip(*parts, strict=True)
    entries = _joined_frames(info.name, LOSSLESS_SUFFIXES, files)
    if sum(entry.nbytes for entry in entries) + _OVERHEAD >= info.nbytes:
        return None
    layout = layout_for(info)
    return entries, LosslessRecord(info.dtype, info.shape, layout.columns, layout.per_frame, tuple(records))


def _joined_frames(name: str, suffixes: Sequence[str], files: Sequence[Mapping[str, TensorInfo]]) -> list[Entry]:
    """Entries of the codes of all parts, and of the offsets of their frames."""
    offsets = [torch.zeros(1, dtype=torch.int64)]
    for file in files:
        offsets.append(read_tensor(file["frames"])[1:] + offsets[-1][-1])
    places = torch.cat(offsets)

    def chunks() -> Iterator[memoryview]:
        for file in files:
            yield from byte_pieces(file["codes"])
            release(file["codes"].file)

    codes, frames = (f"{name}.{suffix}" for suffix in suffixes[:2])
    return [Entry(codes, "U8", (int(places[-1]),), chunks), tensor_entry(frames, places)]


def joined(
    name: str, parts: Sequence[tuple[Mapping[str, TensorInfo], PartRecord]]
) -> tuple[list[Entry], tuple[PartRecord, ...]]:
    """A compressed tensor, joined from the files of its parts a piece at a time.

    Returns its entries, and the records with the bytes that steps take beside those of the other parts.
    """
    files, records = zip(*parts, strict=True)
    steps = _stored_steps([read_tensor(file["step"]) for file in files])
    return [*_joined_frames(name, SUFFIXES, files), tensor_entry(f"{name}.{SUFFIXES[2]}", steps)], tuple(
        map(_counted, files, records, steps)
    )


def _stored_steps(parts: Sequence[Tensor]) -> Tensor:
    """Steps and offset of each part: [P, 2] or [P, I + 1] float32, with half the bytes where that loses nothing.

    A part with one step has it for every column, where another part has a step for each.
    """
    longest = max(map(len, parts))
    steps = torch.stack([torch.cat((part[:1].expand(longest - len(part)), part)) for part in parts])
    half = steps.bfloat16()
    return half if longest > 2 and torch.equal(half.float(), steps) else steps


def _counted(file: Mapping[str, TensorInfo], record: PartRecord, steps: Tensor) -> PartRecord:
    """The record of a part with the bytes of its steps as they are stored."""
    more = steps.nbytes - steps_bytes(file["step"].numel)
    return replace(record, report=replace(record.report, stored_bytes=record.report.stored_bytes + more))
