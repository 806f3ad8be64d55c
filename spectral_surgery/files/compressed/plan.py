"""What compressing a checkpoint will do, decided from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from spectral_surgery.codec.encoded import rows_per_frame
from spectral_surgery.codec.quantizers.lattice import SAVED
from spectral_surgery.codec.quantizers.scalar import for_density, for_error
from spectral_surgery.codec.rate import Magnitudes, Target
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.difference import counterpart
from spectral_surgery.files.compressed.lossless import is_codable, parts_for
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.header import FLOATS, FLOATS8
from spectral_surgery.files.index import CheckpointIndex, TensorInfo
from spectral_surgery.files.reader import same_bytes
from spectral_surgery.files.remote_code import notes_on
from spectral_surgery.targets import matching

PART_WEIGHTS = 1 << 23  # a part is what one worker holds in memory: 32 MiB of float32 coefficients
BYTES_PER_WEIGHT = 22  # measured peak while encoding a part: input, coefficients, codes, frames and temporaries

_LEFT = {"BF16": 0.67, "F16": 0.85, "F32": 0.84, "F8_E4M3": 0.83, "F8_E5M2": 0.75}  # of bytes, coded without loss
_EMBEDDING = re.compile(r"(embed|wte|wpe|shared\.weight)", re.IGNORECASE)
_HEAD = re.compile(r"(lm_head|embed_out|output\.weight|decoder\.weight|classifier\.weight)")
_EXPERT = re.compile(r"experts?\b")
_DBRX_EXPERTS = re.compile(r"\.experts\.mlp\.(w1|v1|w2)$")
_DBRX_USUAL = 4  # experts of a DBRX whose configuration does not say how many; as transformers 5.24 has it
_ROUTER = re.compile(r"(\.gate\.weight|router)")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to compress, seen as a matrix.

    Attributes:
        rows: rows of the matrix (experts are stacked).
        axes: transformed axes; an embedding only along its features, so that a row decodes from one frame.
        parts: row ranges that are compressed one by one, cut at the matrices of a stack (experts) and at PART_WEIGHTS.
        base: the tensor whose difference is compressed instead, if any.
        target: asked of this tensor; None for that of the options.
        lossless: whether it is coded bit for bit; rows are numbers then, and there is one column.
    """

    info: TensorInfo
    rows: int
    columns: int
    axes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    base: TensorInfo | None = None
    target: Target | None = None
    lossless: bool = False


@dataclass(frozen=True)
class Unit:
    """One part of one tensor: what a worker does at a time."""

    tensor: PlannedTensor
    part: int
    ordinal: int

    @property
    def weights(self) -> int:
        """Number of weights of the part."""
        start, stop = self.tensor.parts[self.part]
        return (stop - start) * self.tensor.columns

    @property
    def memory(self) -> int:
        """Bytes that a worker needs at it, on top of the interpreter and torch."""
        return BYTES_PER_WEIGHT * self.weights


@dataclass(frozen=True)
class Plan:
    """What compressing will do.

    Attributes:
        copied: reason by name of every tensor stored bit for bit.
        aliases: second name of a tied tensor -> the name it is stored under.
        coded: those of what is copied that are coded without loss, where that saves bytes.
    """

    options: CompressOptions
    tensors: tuple[PlannedTensor, ...]
    copied: dict[str, str]
    aliases: dict[str, str]
    coded: tuple[PlannedTensor, ...] = ()

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Every part of every tensor, in file order."""
        pairs = [(tensor, part) for tensor in (*self.tensors, *self.coded) for part in range(len(tensor.parts))]
        return tuple(Unit(tensor, part, ordinal) for ordinal, (tensor, part) in enumerate(pairs))

    @cached_property
    def units_of(self) -> dict[str, tuple[Unit, ...]]:
        """Every part of each tensor, by its name."""
        found: dict[str, list[Unit]] = {tensor.info.name: [] for tensor in (*self.tensors, *self.coded)}
        for unit in self.units:
            found[unit.tensor.info.name].append(unit)
        return {name: tuple(units) for name, units in found.items()}

    @property
    def weights(self) -> int:
        """Number of weights to compress."""
        return sum(tensor.info.numel for tensor in self.tensors)

    def with_targets(self, targets: Mapping[str, Target]) -> Plan:
        """The same plan, with other targets for some tensors."""
        return replace(
            self, tensors=tuple(replace(tensor, target=targets.get(tensor.info.name)) for tensor in self.tensors)
        )

    def predicted_bits(self) -> float:
        """Stored bits per weight to expect: as asked, or as of Gaussian coefficients."""
        if self.options.target.kind in ("bits", "lossless"):
            return self.options.target.value
        gaussian = Magnitudes(np.random.default_rng(0).standard_normal(1 << 16))
        value = self.options.target.value
        if self.options.target.kind == "density":
            quantizer = for_density(gaussian, gaussian.quantile(value))
        else:
            quantizer = for_error(gaussian, value)
        bits = quantizer.estimate(gaussian).entropy
        return bits - SAVED if self.options.target.kind == "max_error" and self.options.quantizer != "scalar" else bits

    def predicted_memory(self) -> int:
        """Bytes one worker needs at its largest part, on top of the interpreter and torch."""
        return max((unit.memory for unit in self.units), default=0)

    def predicted_bytes(self, index: CheckpointIndex) -> int:
        """Bytes of weights to expect, those of copied tensors included."""
        left = {tensor.info.name: _LEFT.get(tensor.info.dtype, 1.0) for tensor in self.coded}
        copied = round(sum(index.tensors[name].nbytes * left.get(name, 1.0) for name in self.copied))
        return round(self.weights * self.predicted_bits() / 8) + copied

    def to_json(self, index: CheckpointIndex) -> dict[str, object]:
        """Plain values for ``--json``; the index is that of the source."""
        return {
            "tensors": [
                {"name": tensor.info.name, "shape": list(tensor.info.shape), "parts": len(tensor.parts)}
                for tensor in self.tensors
            ],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.copied.items()],
            "tied": self.aliases,
            "weights": self.weights,
            "predicted_bits_per_weight": self.predicted_bits(),
            "predicted_bytes": self.predicted_bytes(index),
            "predicted_worker_bytes": self.predicted_memory(),
            "input_bytes": index.nbytes,
            "files_left_out": [str(name) for name in index.skipped_files],
            "notes": [*index.notes, *notes_on(index.config)],
        }

    def shard(self, index: int, count: int) -> list[Unit]:
        """Units of one of ``count`` shards, balanced by weights: each next largest goes to the least loaded."""
        loads = [0] * count
        mine = []
        for unit in sorted(self.units, key=lambda u: (-u.weights, u.ordinal)):
            least = loads.index(min(loads))
            loads[least] += unit.weights
            if least == index:
                mine.append(unit)
        return mine


def make_plan(
    index: CheckpointIndex, options: CompressOptions, *, compare: bool = True, base: CheckpointIndex | None = None
) -> Plan:
    """Decide what happens to every tensor.

    Args:
        compare: find tied tensors, for which some are read; otherwise none is taken to be tied.
        base: compress differences to the tensors of this checkpoint, where it has the same.

    Raises:
        TargetError: when a pattern matches nothing.
        ConfigError: when nothing is left to compress.
    """
    names = list(index.tensors)
    included = matching(names, options.include, option="--include") if options.include else None
    excluded = matching(names, options.exclude, option="--exclude")
    aliases = find_tied(index) if compare else {}
    tensors, copied = [], {}
    for name, info in index.tensors.items():
        if name in aliases:
            continue
        reason = _why_copied(info, options, included, excluded)
        if reason:
            copied[name] = reason
        else:
            planned = _planned(info, options.tile, _matrices_in(info, index.config))
            tensors.append(replace(planned, base=counterpart(base, name, info.shape)))
    if not tensors and options.target.kind != "lossless":
        reasons = "; ".join(sorted(set(copied.values())))
        raise ConfigError(
            f"{index.root.name}: expected a matrix to compress, got none ({reasons}). Widen --include or lower"
            " --min-weights."
        )
    coded = tuple(_coded(index.tensors[name]) for name in copied if options.copy == "coded")
    return Plan(options, tuple(tensors), copied, aliases, tuple(tensor for tensor in coded if tensor.parts))


def _coded(info: TensorInfo) -> PlannedTensor:
    """A tensor that is coded without loss; without parts where that cannot save bytes."""
    parts = parts_for(info) if is_codable(info) else ()
    return PlannedTensor(info, info.numel, 1, (), parts, lossless=True)


def _why_copied(info: TensorInfo, options: CompressOptions, included: set[str] | None, excluded: set[str]) -> str:
    reasons = {
        "nothing is compressed with a loss": options.target.kind == "lossless",
        f"{info.dtype} is not floating": info.dtype not in (*FLOATS, *FLOATS8),
        "excluded": info.name in excluded,
        "not included": included is not None and info.name not in included,
        "not a matrix": len(info.shape) < 2,
        f"fewer than {options.min_weights} weights": info.numel < max(options.min_weights, 1),
        "expert router (name it with --include to compress it)": included is None and _ROUTER.search(info.name),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _matrices_in(info: TensorInfo, config: Mapping[str, object]) -> int:
    """How many matrices of experts [rows, columns] are: DBRX has them one above the other, and no third axis."""
    if len(info.shape) != 2 or config.get("model_type") != "dbrx" or not _DBRX_EXPERTS.search(info.name):
        return 1
    settings = config.get("ffn_config")
    count = settings.get("moe_num_experts", _DBRX_USUAL) if isinstance(settings, dict) else _DBRX_USUAL
    return count if isinstance(count, int) and count > 0 and info.shape[0] % count == 0 else 1


def _planned(info: TensorInfo, tile: int, matrices: int) -> PlannedTensor:
    columns = info.shape[-1]
    height = info.numel // columns // matrices  # rows that must stay together: all, or one expert
    if len(info.shape) > 2 and (_EXPERT.search(info.name) or _is_stack(info.shape)):
        height = info.shape[-2]
    elif len(info.shape) > 2:
        columns = info.numel // info.shape[0]  # a convolution kernel is [O, I * kh * kw]
        height = info.shape[0]
    rows = info.numel // columns
    frame = rows_per_frame(columns, tile)
    step = max(1, PART_WEIGHTS // (frame * columns)) * frame
    parts = tuple(
        (start, min(start + step, block + height))
        for block in range(0, rows, height)
        for start in range(block, block + height, step)
    )
    axes = (1,) if _EMBEDDING.search(info.name) else (0, 1)
    return PlannedTensor(info, rows, columns, axes, parts)


def _is_stack(shape: Sequence[int]) -> bool:
    """Whether it is some matrices, one above the other, and no convolution: fewer of them than a side of each."""
    return len(shape) == 3 and shape[0] <= min(shape[1:])


def find_tied(index: CheckpointIndex) -> dict[str, str]:
    """Tensors stored twice: output heads and embeddings of equal shape, dtype and bytes.

    Returns second name -> first name. Bytes are compared, so that a head of the shape of an embedding is not an alias.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[TensorInfo]] = {}
    for info in index.tensors.values():
        if len(info.shape) == 2 and (_EMBEDDING.search(info.name) or _HEAD.search(info.name)):
            groups.setdefault((info.dtype, info.shape), []).append(info)
    aliases: dict[str, str] = {}
    for group in groups.values():
        group.sort(key=lambda info: not _EMBEDDING.search(info.name))  # stored under the name of the embedding
        for position, info in enumerate(group):
            for other in group[:position]:
                if other.name not in aliases and same_bytes(info, other):
                    aliases[info.name] = other.name
                    break
    return aliases
