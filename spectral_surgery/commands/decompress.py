"""decompress: a compressed folder back to a plain checkpoint that any tool reads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from spectral_surgery.cards import card as cards
from spectral_surgery.cards.checkpoints import decompressed_card
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.atomic import publishing
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, open_compressed
from spectral_surgery.files.compressed.dense import cast
from spectral_surgery.files.compressed.difference import check_base, counterpart, read_rows
from spectral_surgery.files.compressed.lossless import decoded_entry
from spectral_surgery.files.compressed.manifest import FILE_NAME, SUFFIXES, TensorRecord
from spectral_surgery.files.compressed.stacked import Stacks
from spectral_surgery.files.header import FLOATS, FLOATS8
from spectral_surgery.files.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.files.reader import DTYPES, flat_pieces, read_flat, same_bytes
from spectral_surgery.files.sidecar_files import check_apart, copy_companions
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.files.writer import Entry, reported, tensor_bytes, weights_name, write_checkpoint
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.progress import Progress, silent


@dataclass(frozen=True)
class DecompressReport:
    """What a decompression did.

    Attributes:
        failures: what did not check out; nothing is published then.
    """

    tensors: int
    weights: int
    output_bytes: int
    seconds: float
    peak_rss_bytes: int
    verified: bool
    failures: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return vars(self) | {"failures": list(self.failures)}


class _NotVerifiedError(Exception):
    def __init__(self, failures: Sequence[str]) -> None:
        super().__init__()
        self.failures = tuple(failures)


def decompress(
    source: Checkpoint,
    out: Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    threads: int = 1,
    overwrite: bool = False,
    base: Checkpoint | None = None,
    origin: str | None = None,
    progress: Progress = silent,
) -> DecompressReport:
    """Write the plain checkpoint that a compressed folder stands for.

    Every tensor has its original name, shape and dtype; tensors that were copied keep their bits, tied ones get both
    names back. Checksums are always verified before decoding.

    Args:
        dtype: store all floating tensors in this dtype (``float32``, ``bfloat16``, ``float16``) instead of that stored.
        verify: read the result back: copied tensors must be bit-equal, and decoded ones must have the norm that was
            measured when they were encoded.
        base: the checkpoint that differences are to; None for a compressed model.

    Raises:
        CheckpointError: when the source is damaged, out is taken, or the base is missing or another one.
    """
    started = time.perf_counter()
    code, failures = _dtype_code(dtype), tuple[str, ...]()
    check_apart(source, out)
    checkpoint = open_compressed(source, differences=True)
    work = _Entries(checkpoint, check_base(checkpoint.manifest.options, base, source.name), code, threads, progress)
    entries = work.all()
    try:
        with publishing(out, overwrite=overwrite) as folder:
            write_checkpoint(folder, entries, name=weights_name(checkpoint.index))
            copy_companions(checkpoint.index, folder, _plain_config(checkpoint, dtype), without=FILE_NAME)
            cards.write_derived(folder, decompressed_card(checkpoint.manifest, checkpoint.index, dtype, origin))
            if verify and (wrong := _verify(work, folder)):
                raise _NotVerifiedError(wrong)
    except _NotVerifiedError as error:
        failures = error.failures
    return DecompressReport(
        len(entries),
        sum(record.report.weights for record in checkpoint.manifest.tensors.values()),
        sum(entry.nbytes for entry in entries),
        time.perf_counter() - started,
        peak_rss_bytes(),
        verify,
        failures,
    )


def _dtype_code(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    names = {str(DTYPES[code]).removeprefix("torch."): code for code in (*FLOATS, *FLOATS8)}
    if dtype not in names:
        raise ConfigError(f"--dtype: expected {', '.join(names)}, got {dtype}.")
    return names[dtype]


@dataclass(frozen=True)
class _Entries:
    checkpoint: CompressedCheckpoint
    base: CheckpointIndex | None
    code: str | None
    threads: int
    progress: Progress

    @cached_property
    def stacks(self) -> Stacks:
        """What is decoded together."""
        return Stacks(self.checkpoint)

    def all(self) -> list[Entry]:
        """Entries of the plain checkpoint, by original name."""
        manifest, index = self.checkpoint.manifest, self.checkpoint.index
        stored = {f"{name}.{suffix}" for name in manifest.tensors for suffix in SUFFIXES}
        entries = {name: self._decoded(name, name, record) for name, record in manifest.tensors.items()}
        entries |= {name: self._copied(name, info) for name, info in index.tensors.items() if name not in stored}
        for alias, name in manifest.aliases.items():
            record = manifest.tensors.get(name)
            entries[alias] = self._decoded(alias, name, record) if record else self._copied(alias, index.tensors[name])
        return reported([entries[name] for name in sorted(entries)], self.progress)

    def _decoded(self, as_name: str, name: str, record: TensorRecord) -> Entry:
        code = self.code or record.dtype

        def chunks() -> Iterator[memoryview]:
            for weight, _ in self.weights(name, record):
                yield tensor_bytes(cast(weight, DTYPES[code]))

        return Entry(as_name, code, record.shape, chunks)

    def weights(self, name: str, record: TensorRecord) -> Iterator[tuple[torch.Tensor, float]]:
        """Parts of a tensor, [N, I] float32, with the energy of what was decoded for each."""
        before = counterpart(self.base, name, record.shape)
        for number, part in enumerate(record.parts):
            dense = self.stacks.take(name)
            if dense is None:
                dense = self.checkpoint.part(name, number).to_dense(threads=self.threads)
            energy = float(dense.double().square().sum()) if before is not None else 0.0
            if before is not None:
                dense = dense + read_rows(before, part.rows, record.matrix[1])
            yield dense, energy

    def _copied(self, as_name: str, info: TensorInfo) -> Entry:
        code = self.code
        if code is None or code == info.dtype or info.dtype not in (*FLOATS, *FLOATS8):
            return decoded_entry(info, as_name)
        dtype = DTYPES[code]
        return Entry(as_name, code, info.shape, lambda: (tensor_bytes(piece.to(dtype)) for piece in flat_pieces(info)))


def _plain_config(checkpoint: CompressedCheckpoint, dtype: str | None) -> dict[str, object]:
    config = {key: value for key, value in checkpoint.index.config.items() if key != "quantization_config"}
    for key in ("dtype", "torch_dtype"):
        if dtype and key in config:
            config[key] = dtype
    return config


def _verify(work: _Entries, folder: Path) -> list[str]:
    checkpoint, code = work.checkpoint, work.code
    written = read_index(folder).tensors
    failures = []
    for name, record in checkpoint.manifest.tensors.items():
        dtype = DTYPES[code or record.dtype]
        if counterpart(work.base, name, record.shape) is not None:
            failures += _verify_sum(work, name, written[name], dtype)
            continue
        tolerance = max(torch.finfo(dtype).eps, 1e-5)
        energy = sum(float(piece.double().square().sum()) for piece in flat_pieces(written[name]))
        expected = record.report.stored_energy
        if abs(energy - expected) > 2 * tolerance * expected:
            failures.append(f"{name}: squared norm {energy:.6g} where {expected:.6g} was encoded")
    if code is None:
        for name, info in checkpoint.index.tensors.items():
            if name in written and not same_bytes(info, written[name]):
                failures.append(f"{name}: copied with other bits")
    for alias, name in checkpoint.manifest.aliases.items():
        if not same_bytes(written[alias], written[name]):
            failures.append(f"{alias}: differs from {name}, to which it is tied")
    return failures


def _verify_sum(work: _Entries, name: str, written: TensorInfo, dtype: torch.dtype) -> list[str]:
    """A difference is far below the rounding of a norm, so each part is decoded and added once more."""
    record, energy, start = work.checkpoint.manifest.tensors[name], 0.0, 0
    for weight, part_energy in work.weights(name, record):
        energy += part_energy
        expected = cast(weight, dtype).reshape(-1)
        there = read_flat(written, start, start + len(expected))
        if not torch.equal(there.view(torch.uint8), expected.view(torch.uint8)):
            return [f"{name}: is not the sum of the base and the difference"]
        start += len(expected)
    stored = record.report.stored_energy
    if abs(energy - stored) > 1e-4 * stored:
        return [f"{name}: squared norm {energy:.6g} of the difference where {stored:.6g} was encoded"]
    return []
