"""The work list of a compression: each part is encoded into a file of its own, and all of them are joined at the end.

A unit file is written under a temporary name and renamed, so what is there is complete; it carries a key of everything
that
decided its bytes. A crash costs the units under way, and a rerun keeps the others.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from spectral_surgery.checkpoint.difference import read_rows
from spectral_surgery.checkpoint.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.checkpoint.manifest import (
    FORMAT_VERSION,
    SUFFIXES,
    Manifest,
    PartRecord,
    TensorRecord,
    parse_part,
)
from spectral_surgery.checkpoint.plan import CompressOptions, Plan, PlannedTensor, Unit
from spectral_surgery.checkpoint.reader import read_bytes, read_flat, read_tensor
from spectral_surgery.checkpoint.writer import Entry, replace_file, tensor_entry
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.spectra.codec import Basis, EncodedSpectrum, EncodingReport, choose_basis, encode
from spectral_surgery.spectra.feedback import Codes, codes_of, encode_codes
from spectral_surgery.spectra.parallel import one_torch_thread

UNITS = "units"  # folder of unfinished work
PIECE = 1 << 24  # bytes of a copied tensor read at a time


@dataclass(frozen=True)
class Workshop:
    """Where unfinished work lives, and the key that its unit files must carry."""

    folder: Path
    key: str

    def path(self, unit: Unit) -> Path:
        """File of a unit."""
        return self.folder / f"{unit.ordinal:06d}.unit"


def work_key(index: CheckpointIndex, options: CompressOptions) -> str:
    """Digest of what decides the result: options, format, and names, shapes, sizes and times of the files."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in index.files]
    body = json.dumps([FORMAT_VERSION, options.to_json(), files, source_digest(index)], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def source_digest(index: CheckpointIndex) -> str:
    """SHA-256 over names, dtypes, shapes and sizes of all tensors of a checkpoint."""
    rows = [(info.name, info.dtype, info.shape, info.nbytes) for info in index.tensors.values()]
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def is_done(workshop: Workshop, unit: Unit) -> bool:
    """Whether a unit file of this very work is there and intact."""
    return _load(workshop, unit) is not None


def run_unit(workshop: Workshop, unit: Unit, options: CompressOptions, threads: int) -> EncodingReport | None:
    """Encode one part and leave its file.

    Args:
        workshop: where to.
        unit: which part.
        options: what was asked.
        threads: frames encoded at once.

    Returns:
        The measured report, or None when the part is not finite and is to be copied.

    Raises:
        ConfigError: when the weights are not finite (and may not be copied) or cannot be encoded; the tensor is named.
    """
    done = _load(workshop, unit)
    if done is not None:
        return done[1].report if done[1] else None
    with one_torch_thread():
        return _encode_unit(workshop, unit, options, threads)


def _encode_unit(workshop: Workshop, unit: Unit, options: CompressOptions, threads: int) -> EncodingReport | None:
    tensor = unit.tensor
    start, stop = tensor.parts[unit.part]
    weight = read_flat(tensor.info, start * tensor.columns, stop * tensor.columns).reshape(stop - start, tensor.columns)
    if tensor.base is not None:
        weight = weight.float() - read_rows(tensor.base, (start, stop), tensor.columns)
    if not _is_finite(weight):
        if not options.copy_nonfinite:
            raise ConfigError(
                f"{tensor.info.name}: has NaN or infinite values; finite weights are accepted. "
                "Repair it, or use --copy-nonfinite to pass such tensors through."
            )
        _save(workshop, unit, None, None)
        return None
    try:
        target = tensor.target or options.target
        basis = choose_basis(weight, target, options.candidates(tensor.axes))
        encoded, report = encode(weight, target, basis, threads=threads)
    except ConfigError as error:
        raise ConfigError(f"{tensor.info.name}: {error} Or copy it with --exclude.") from None
    _save(workshop, unit, encoded, part_record((start, stop), encoded, report))
    return report


def leave_codes(
    workshop: Workshop,
    plan: Plan,
    tensor: PlannedTensor,
    coefficients: Tensor,
    codes: Codes,
    *,
    threads: int = 1,
) -> None:
    """Leave the unit files of a tensor whose codes were chosen elsewhere.

    Args:
        workshop: where to.
        plan: the plan it belongs to.
        tensor: which.
        coefficients: [O, I] float32, what the codes stand for.
        codes: of them.
        threads: frames encoded at once.
    """
    basis = Basis(plan.options.transform, plan.options.tile, tensor.axes)
    for unit in (unit for unit in plan.units if unit.tensor is tensor):
        start, stop = tensor.parts[unit.part]
        own = replace(codes, values=codes.values[start:stop])
        encoded, report = encode_codes(coefficients[start:stop], own, basis, threads=threads)
        _save(workshop, unit, encoded, part_record((start, stop), encoded, report))


def finished_codes(workshop: Workshop, plan: Plan, tensor: PlannedTensor) -> Codes | None:
    """What `leave_codes` was given, if all its unit files are there.

    Returns:
        The codes, or None.
    """
    parts, step = [], torch.ones(2)
    for unit in (unit for unit in plan.units if unit.tensor is tensor):
        done = _load(workshop, unit)
        if done is None or done[1] is None:
            return None
        start, stop = tensor.parts[unit.part]
        step = read_tensor(done[0]["step"])
        offsets = read_tensor(done[0]["frames"]).tolist()
        data = memoryview(read_bytes(done[0]["codes"], 0, done[0]["codes"].nbytes))
        frames = tuple(data[a:b] for a, b in pairwise(offsets))
        basis = Basis(done[1].transform, plan.options.tile, tensor.axes)
        shape = (stop - start, tensor.columns)
        encoded = EncodedSpectrum(frames, shape, done[1].rows_per_frame, step[:-1], float(step[-1]), basis)
        parts += [encoded.codes(frame).to(torch.int32) for frame in range(len(frames))]
    return codes_of(torch.cat(parts), step[:-1], float(step[-1]))


def part_record(rows: tuple[int, int], encoded: EncodedSpectrum, report: EncodingReport) -> PartRecord:
    """What the manifest says of encoded rows."""
    crc = 0
    for frame in encoded.frames:
        crc = zlib.crc32(frame, crc)
    return PartRecord(rows, encoded.rows_per_frame, encoded.basis.transform, crc, report)


def _is_finite(weight: Tensor) -> bool:
    values = weight.float() if weight.element_size() == 1 else weight
    total = values.sum(dtype=torch.float32)  # ten times faster than looking at each; it may overflow, so then look
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def join(workshop: Workshop, plan: Plan, index: CheckpointIndex) -> tuple[list[Entry], Manifest, dict[str, str]]:
    """Everything the compressed checkpoint consists of, once all units were written or found intact by this run.

    Args:
        workshop: where the unit files are.
        plan: the plan they belong to.
        index: the source, for tensors that are copied.

    Returns:
        Entries for the writer, the manifest, and the reasons for every tensor that is copied.

    Raises:
        CheckpointError: when a unit is missing.
    """
    units: dict[str, list[Unit]] = {}
    for unit in plan.units:
        units.setdefault(unit.tensor.info.name, []).append(unit)
    copied = dict(plan.copied)
    entries: list[Entry] = []
    records: dict[str, TensorRecord] = {}
    for tensor in plan.tensors:
        parts = []
        for unit in units[tensor.info.name]:
            done = _load(workshop, unit, verify=False)
            if done is None:
                raise CheckpointError(
                    f"{workshop.path(unit).name}: this unit is not done; all of {len(plan.units)} are needed. Run "
                    "again with --resume."
                )
            parts.append(done)
        if any(record is None for _, record in parts):
            copied[tensor.info.name] = "not finite"
            continue
        records[tensor.info.name] = _record(tensor, [record for _, record in parts if record], plan.options.tile)
        entries += _entries(tensor, [file for file, _ in parts])
    entries += [copy_entry(index.tensors[name]) for name in copied]
    return entries, Manifest(records, dict(plan.aliases), plan.options.to_json(), source_digest(index)), copied


def copy_entry(info: TensorInfo) -> Entry:
    """A tensor copied bit for bit, a piece at a time."""

    def chunks() -> Iterator[bytearray]:
        for start in range(0, info.nbytes, PIECE):
            yield read_bytes(info, start, min(start + PIECE, info.nbytes))

    return Entry(info.name, info.dtype, info.shape, chunks)


def step_entry(name: str, steps: Tensor) -> Entry:
    """Steps and offset of each part, [P, 2] or [P, I + 1] float32, with half the bytes where that loses nothing."""
    half = steps.bfloat16()
    return tensor_entry(name, half if steps.shape[1] > 2 and torch.equal(half.float(), steps) else steps)


def _record(tensor: PlannedTensor, parts: list[PartRecord], tile: int) -> TensorRecord:
    return TensorRecord(
        tensor.info.dtype, tensor.info.shape, (tensor.rows, tensor.columns), tile, tensor.axes, tuple(parts)
    )


def _entries(tensor: PlannedTensor, files: list[dict[str, TensorInfo]]) -> list[Entry]:
    codes, frames, step = (f"{tensor.info.name}.{suffix}" for suffix in SUFFIXES)
    offsets = [torch.zeros(1, dtype=torch.int64)]
    for file in files:
        offsets.append(read_tensor(file["frames"])[1:] + offsets[-1][-1])
    joined = torch.cat(offsets)
    steps = torch.stack([read_tensor(file["step"]) for file in files])

    def chunks() -> Iterator[bytearray]:
        for file in files:
            yield read_bytes(file["codes"], 0, file["codes"].nbytes)

    return [
        Entry(codes, "U8", (int(joined[-1]),), chunks),
        Entry(frames, "I64", tuple(joined.shape), lambda: [joined.numpy().tobytes()]),
        step_entry(step, steps),
    ]


def _save(workshop: Workshop, unit: Unit, encoded: EncodedSpectrum | None, record: PartRecord | None) -> None:
    tensors = {}
    if encoded is not None:
        lengths = torch.tensor([0, *map(len, encoded.frames)])
        data = bytearray().join(encoded.frames)
        tensors = {
            "codes": torch.frombuffer(data, dtype=torch.uint8),
            "frames": torch.cumsum(lengths, 0),
            "step": torch.cat((encoded.step, torch.tensor([encoded.offset]))),
        }
    metadata = {"key": workshop.key, "record": json.dumps(asdict(record) if record else None)}
    replace_file(workshop.path(unit), save(tensors, metadata))


def _load(
    workshop: Workshop, unit: Unit, *, verify: bool = True
) -> tuple[dict[str, TensorInfo], PartRecord | None] | None:
    path = workshop.path(unit)
    if not path.exists():
        return None
    try:
        index = read_index(path)
    except CheckpointError:
        return None  # cut short by a full disk or a power failure: it is done again
    if index.metadata.get("key") != workshop.key:
        return None
    body = json.loads(index.metadata["record"])
    record = parse_part(body) if body else None
    codes = index.tensors.get("codes")
    if record and (codes is None or (verify and zlib.crc32(read_bytes(codes, 0, codes.nbytes)) != record.crc32)):
        return None
    return index.tensors, record
