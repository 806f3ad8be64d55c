"""decompress: a compressed folder back to a plain checkpoint that any tool reads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spectral_surgery import cards
from spectral_surgery.checkpoint.companions import check_apart, copy_companions
from spectral_surgery.checkpoint.compressed import CompressedCheckpoint, open_compressed
from spectral_surgery.checkpoint.index import TensorInfo, read_index
from spectral_surgery.checkpoint.manifest import FILE_NAME, SUFFIXES, TensorRecord
from spectral_surgery.checkpoint.plan import FLOATS
from spectral_surgery.checkpoint.reader import DTYPES, read_flat
from spectral_surgery.checkpoint.writer import Entry, publishing, tensor_bytes, write_checkpoint
from spectral_surgery.errors import ConfigError
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.workflows.facts import decompressed_facts
from spectral_surgery.workflows.progress import Progress, silent

_PIECE = 1 << 22  # elements of a copied tensor converted or compared at a time


@dataclass(frozen=True)
class DecompressReport:
    """What a decompression did.

    Attributes:
        tensors: tensors written.
        weights: weights decoded from spectra.
        output_bytes: bytes of all tensors written.
        seconds: wall time.
        peak_rss_bytes: largest resident size of this process.
        verified: whether the result was read back and checked.
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
        return {
            "tensors": self.tensors,
            "weights": self.weights,
            "output_bytes": self.output_bytes,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "verified": self.verified,
            "failures": list(self.failures),
        }


class _NotVerifiedError(Exception):
    def __init__(self, failures: Sequence[str]) -> None:
        super().__init__()
        self.failures = tuple(failures)


def decompress(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    threads: int = 1,
    overwrite: bool = False,
    progress: Progress = silent,
) -> DecompressReport:
    """Write the plain checkpoint that a compressed folder stands for.

    Every tensor has its original name, shape and dtype; tensors that were copied keep their bits, tied ones get both
    names
    back. Checksums are always verified before decoding.

    Args:
        source: a folder written by compress.
        out: folder to create.
        dtype: store all floating tensors in this dtype (``float32``, ``bfloat16``, ``float16``) instead of their own.
        verify: read the result back: copied tensors must be bit-equal, and decoded ones must have the norm that was
            measured
            when they were encoded.
        threads: frames decoded at once.
        overwrite: replace an existing folder.
        progress: called after each tensor.

    Returns:
        The report.

    Raises:
        ConfigError: when dtype is unknown.
        CheckpointError: when the source is damaged or out is taken.
    """
    started = time.perf_counter()
    code = _dtype_code(dtype)
    check_apart(source, out)
    checkpoint = open_compressed(source)
    entries = _Entries(checkpoint, code, threads, progress).all()
    failures: tuple[str, ...] = ()
    try:
        with publishing(out, overwrite=overwrite) as folder:
            write_checkpoint(folder, entries)
            copy_companions(checkpoint.index, folder, _plain_config(checkpoint, dtype), without=FILE_NAME)
            facts = decompressed_facts(checkpoint.manifest, checkpoint.index, dtype)
            cards.write_derived(folder, facts)
            wrong = _verify(checkpoint, folder, code) if verify else []
            if wrong:
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
    names = {str(DTYPES[code]).removeprefix("torch."): code for code in FLOATS}
    if dtype not in names:
        raise ConfigError(f"--dtype {dtype}: unknown; {', '.join(names)} are accepted.")
    return names[dtype]


@dataclass(frozen=True)
class _Entries:
    checkpoint: CompressedCheckpoint
    code: str | None
    threads: int
    progress: Progress

    def all(self) -> list[Entry]:
        """Entries of the plain checkpoint, by original name."""
        manifest, index = self.checkpoint.manifest, self.checkpoint.index
        stored = {f"{name}.{suffix}" for name in manifest.tensors for suffix in SUFFIXES}
        entries = {name: self._decoded(name, name, record) for name, record in manifest.tensors.items()}
        entries |= {name: self._copied(name, info) for name, info in index.tensors.items() if name not in stored}
        for alias, name in manifest.aliases.items():
            record = manifest.tensors.get(name)
            entries[alias] = self._decoded(alias, name, record) if record else self._copied(alias, index.tensors[name])
        return [entries[name] for name in sorted(entries)]

    def _decoded(self, as_name: str, name: str, record: TensorRecord) -> Entry:
        code = self.code or record.dtype

        def chunks() -> Iterator[memoryview]:
            for part in range(len(record.parts)):
                dense = self.checkpoint.part(name, part).to_dense(threads=self.threads)
                yield tensor_bytes(_cast(dense, DTYPES[code]))
            self._advance(as_name)

        return Entry(as_name, code, record.shape, chunks)

    def _copied(self, as_name: str, info: TensorInfo) -> Entry:
        code = self.code if self.code and info.dtype in FLOATS else info.dtype

        def chunks() -> Iterator[memoryview]:
            for start in range(0, info.numel, _PIECE):
                piece = read_flat(info, start, min(start + _PIECE, info.numel))
                yield tensor_bytes(piece.to(DTYPES[code]))
            self._advance(as_name)

        return Entry(as_name, code, info.shape, chunks)

    def _advance(self, name: str) -> None:
        names = sorted({*self.checkpoint.index.tensors, *self.checkpoint.manifest.aliases})
        self.progress(names.index(name) + 1 if name in names else 0, len(names), name)


def _cast(dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize == 1:  # float8 has no infinity to round to: large values would become NaN
        limit = torch.finfo(dtype).max
        dense = dense.clamp(-limit, limit)
    return dense.to(dtype)


def _plain_config(checkpoint: CompressedCheckpoint, dtype: str | None) -> dict[str, object]:
    config = {key: value for key, value in checkpoint.index.config.items() if key != "quantization_config"}
    for key in ("dtype", "torch_dtype"):
        if dtype and key in config:
            config[key] = dtype
    return config


def _verify(checkpoint: CompressedCheckpoint, folder: Path, code: str | None) -> list[str]:
    written = read_index(folder).tensors
    failures = []
    for name, record in checkpoint.manifest.tensors.items():
        dtype = DTYPES[code or record.dtype]
        tolerance = max(torch.finfo(dtype).eps, 1e-5)
        energy = sum(float(piece.double().square().sum()) for piece in _pieces(written[name]))
        expected = record.report.stored_energy
        if abs(energy - expected) > 2 * tolerance * expected:
            failures.append(f"{name}: squared norm {energy:.6g} where {expected:.6g} was encoded")
    if code is None:
        for name, info in checkpoint.index.tensors.items():
            if name in written and not all(map(_same_bits, _pieces(info), _pieces(written[name]))):
                failures.append(f"{name}: copied with other bits")
    for alias, name in checkpoint.manifest.aliases.items():
        if not all(map(_same_bits, _pieces(written[alias]), _pieces(written[name]))):
            failures.append(f"{alias}: differs from {name}, to which it is tied")
    return failures


def _pieces(info: TensorInfo) -> Iterator[torch.Tensor]:
    for start in range(0, info.numel, _PIECE):
        yield read_flat(info, start, min(start + _PIECE, info.numel))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
