"""The work list of a compression: each part is encoded into one file, and all of them are joined at the end.

A unit file is written under a temporary name and renamed, so what is there is complete; it carries a key of everything
that
decided its bytes. A crash costs the units under way, and a rerun keeps the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum, EncodingReport
from spectral_surgery.codec.feedback import Codes, codes_of, encode_codes
from spectral_surgery.codec.parallel import one_torch_thread
from spectral_surgery.codec.pick_transform import choose_basis
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.difference import read_rows
from spectral_surgery.files.compressed.joining import JoinedTensor, giving_way
from spectral_surgery.files.compressed.lossless import LosslessPart, encode_part, layout_for
from spectral_surgery.files.compressed.manifest import FORMAT_VERSION, Manifest, TensorRecord
from spectral_surgery.files.compressed.parts import (
    joined,
    joined_lossless,
    part_record,
    read_lossless,
    read_part,
    write_lossless,
    write_part,
)
from spectral_surgery.files.compressed.plan import Plan, PlannedTensor, Unit
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import CheckpointIndex, TensorInfo
from spectral_surgery.files.reader import read_bytes, read_flat, read_tensor
from spectral_surgery.files.storage import version_of
from spectral_surgery.files.writer import Entry, copy_entry
from spectral_surgery.memory import release_freed_memory

UNITS = "units"  # folder of unfinished work


@dataclass(frozen=True)
class UnitStore:
    """Where unfinished work lives, and the key that its unit files must carry."""

    folder: Path
    key: str

    def path(self, unit: Unit) -> Path:
        """File of a unit."""
        return self.folder / f"{unit.ordinal:06d}.unit"


def work_key(index: CheckpointIndex, options: CompressOptions) -> str:
    """Digest of what decides the result: options, format, tensors, and names, sizes and versions of the files."""
    files = [version_of(file) for file in index.files]
    body = json.dumps([FORMAT_VERSION, options.to_json(), files, source_digest(index)], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def source_digest(index: CheckpointIndex) -> str:
    """SHA-256 over names, dtypes, shapes and sizes of all tensors of a checkpoint."""
    rows = [(info.name, info.dtype, info.shape, info.nbytes) for info in index.tensors.values()]
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def is_done(store: UnitStore, unit: Unit) -> bool:
    """Whether a unit file of this very work is there and intact."""
    read = read_lossless if unit.tensor.lossless else read_part
    return read(store.path(unit), store.key) is not None


@dataclass(frozen=True)
class ReadUnit:
    """A part and its weights, [r, I]; None of one whose file is there and intact."""

    unit: Unit
    weight: Tensor | None


def read_unit(store: UnitStore, unit: Unit) -> ReadUnit:
    """Read what `run_unit` encodes, unless that is done."""
    return ReadUnit(unit, None if is_done(store, unit) else _weight(unit.tensor, unit.tensor.parts[unit.part]))


def run_unit(store: UnitStore, read: ReadUnit, options: CompressOptions, threads: int) -> EncodingReport | None:
    """Encode one part and leave its file.

    Returns:
        The measured report, or None when the part is not finite and is to be copied.

    Raises:
        ConfigError: when the weights are not finite (and may not be copied) or cannot be encoded; the tensor is named.
    """
    if read.unit.tensor.lossless:
        if read.weight is not None:
            _code_unit(store, read.unit, read.weight, threads)
        return None
    if read.weight is None:
        done = read_part(store.path(read.unit), store.key, verify=False)
        return done[1].report if done and done[1] else None
    with one_torch_thread():
        return _encode_unit(store, read.unit, read.weight, options, threads)


def _encode_unit(
    store: UnitStore, unit: Unit, weight: Tensor, options: CompressOptions, threads: int
) -> EncodingReport | None:
    release_freed_memory()  # of the part before: pieces between which there are gaps
    tensor, rows = unit.tensor, unit.tensor.parts[unit.part]
    target, candidates = tensor.target or options.target, options.candidates(tensor.axes)
    try:
        basis = candidates[0]
        if len(candidates) > 1:  # by the first part: one transform for all, so that one form can hold them
            first = weight if unit.part == 0 else _weight(tensor, tensor.parts[0])
            basis = choose_basis(first, target, candidates)
        encoded, report = encode(weight, target, basis, quantizer=options.quantizer, threads=threads)
    except ConfigError as error:
        if _is_finite(weight):
            raise ConfigError(f"{tensor.info.name}: {error} Or copy it with --exclude.") from None
        if not options.copy_nonfinite:
            raise ConfigError(
                f"{tensor.info.name}: expected finite weights, got NaN or infinite values. Repair it, or use"
                " --copy-nonfinite to pass such tensors through."
            ) from None
        write_part(store.path(unit), store.key, None, None)
        return None
    write_part(store.path(unit), store.key, encoded, part_record(rows, encoded, report))
    return report


def _code_unit(store: UnitStore, unit: Unit, numbers: Tensor, threads: int) -> None:
    """Code one part without loss and leave its file."""
    tensor = unit.tensor
    with one_torch_thread():
        coded = encode_part(numbers.reshape(-1), layout_for(tensor.info), tensor.parts[unit.part], threads)
    write_lossless(store.path(unit), store.key, *coded)


def _weight(tensor: PlannedTensor, rows: tuple[int, int]) -> Tensor:
    """Rows of a tensor, or of its difference to another one: [r, I]."""
    flat = read_flat(tensor.info, rows[0] * tensor.columns, rows[1] * tensor.columns)
    weight = flat.reshape(rows[1] - rows[0], tensor.columns)
    return weight if tensor.base is None else weight.float() - read_rows(tensor.base, rows, tensor.columns)


def leave_codes(
    store: UnitStore,
    plan: Plan,
    tensor: PlannedTensor,
    coefficients: Tensor,
    codes: Codes,
    *,
    first: int = 0,
    threads: int = 1,
) -> None:
    """Leave the unit files of a tensor, or of rows of it that are whole parts, whose codes were chosen elsewhere.

    Args:
        coefficients: [O, I] float32, what the codes stand for.
        first: row of the tensor that they begin at.
    """
    basis = Basis(plan.options.transform, plan.options.tile, tensor.axes)
    for unit in _units_of(plan, tensor, (first, first + len(coefficients))):
        start, stop = tensor.parts[unit.part]
        part = replace(codes, values=codes.values[start - first : stop - first])
        encoded, report = encode_codes(coefficients[start - first : stop - first], part, basis, threads=threads)
        write_part(store.path(unit), store.key, encoded, part_record((start, stop), encoded, report))


def _units_of(plan: Plan, tensor: PlannedTensor, rows: tuple[int, int]) -> list[Unit]:
    units = plan.units_of[tensor.info.name]
    return [unit for unit in units if rows[0] <= tensor.parts[unit.part][0] < rows[1]]


def finished_codes(
    store: UnitStore, plan: Plan, tensor: PlannedTensor, rows: tuple[int, int] | None = None
) -> Codes | None:
    """What `leave_codes` was given, if all its unit files are there. ``rows``: of it, from and to; None for all."""
    parts, step = [], torch.ones(2)
    for unit in _units_of(plan, tensor, rows or (0, tensor.rows)):
        done = read_part(store.path(unit), store.key)
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


def _is_finite(weight: Tensor) -> bool:
    values = weight.float() if weight.element_size() == 1 else weight
    return bool(torch.isfinite(values).all())


def paths_of(store: UnitStore, plan: Plan) -> dict[str, list[Path]]:
    """The files of the units of each tensor, by its name."""
    return {name: [store.path(unit) for unit in units] for name, units in plan.units_of.items()}


def join(
    store: UnitStore, plan: Plan, index: CheckpointIndex, before: Mapping[str, JoinedTensor] | None = None
) -> tuple[list[Entry], Manifest, dict[str, str]]:
    """Everything the compressed checkpoint consists of, once all units were written or found intact by this run.

    Args:
        before: tensors without units, that are in weight files already; None not to let units give way to those.

    Returns:
        Entries for the writer, the manifest, and the reasons for every tensor that is copied.

    Raises:
        CheckpointError: when a unit is missing.
    """
    copied = dict(plan.copied)
    entries: list[Entry] = []
    records: dict[str, TensorRecord] = {}
    for tensor in plan.tensors:
        if there := (before or {}).get(tensor.info.name):
            records[tensor.info.name] = there.record
            entries += there.entries()
            continue
        parts = []
        for unit in plan.units_of[tensor.info.name]:
            done = read_part(store.path(unit), store.key, verify=False)
            if done is None:
                raise _not_done(store, plan, unit)
            parts.append(done)
        finite = [(file, record) for file, record in parts if record is not None]
        if len(finite) < len(parts):
            copied[tensor.info.name] = "not finite"
            continue
        joined_entries, counted = joined(tensor.info.name, finite)
        seen = (tensor.info.dtype, tensor.info.shape, (tensor.rows, tensor.columns), plan.options.tile, tensor.axes)
        records[tensor.info.name] = TensorRecord(*seen, counted)
        files = [store.path(unit) for unit in plan.units_of[tensor.info.name]]
        entries += joined_entries if before is None else giving_way(joined_entries, files)
    lossless = {}
    for tensor in plan.coded:
        name = tensor.info.name
        coded = joined_lossless(tensor.info, [_coded_part(store, plan, unit) for unit in plan.units_of[name]])
        if coded is not None:
            entries += coded[0]
            lossless[name] = coded[1]
    entries += [copy_entry(index.tensors[name]) for name in copied if name not in lossless]
    digest = source_digest(index)
    return entries, Manifest(records, dict(plan.aliases), plan.options.to_json(), digest, lossless=lossless), copied


def _coded_part(store: UnitStore, plan: Plan, unit: Unit) -> tuple[dict[str, TensorInfo], LosslessPart]:
    done = read_lossless(store.path(unit), store.key)
    if done is None:
        raise _not_done(store, plan, unit)
    return done


def _not_done(store: UnitStore, plan: Plan, unit: Unit) -> CheckpointError:
    return CheckpointError(
        f"{store.path(unit).name}: expected all {len(plan.units)} units done, got none here. Run again with --resume."
    )
