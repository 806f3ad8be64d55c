"""A model for vLLM and transformers: linear layers as small integers, in the format of the package compressed-tensors.

Source: compressed-tensors 0.20, the format pack-quantized.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.export.integer_groups import Grouped, in_groups_of, packed
from spectral_surgery.commands.export.model import Measure, ModelTarget
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.dense import DenseCheckpoint
from spectral_surgery.files.compressed.plan import make_plan
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.reader import DTYPES
from spectral_surgery.files.sidecar_files import copy_companions
from spectral_surgery.files.writer import Entry, reported, tensor_bytes, write_checkpoint
from spectral_surgery.hf.linear_layers import (
    LinearLayer,
    initialised_by_weights,
    linear_layers,
    replaced_when_quantized,
)
from spectral_surgery.hf.models import outline_model
from spectral_surgery.progress import Progress

METHOD = "compressed-tensors"
Bits = Literal[4, 8]
_GROUPS = (128, 64, 32, 16, 8)
_EXPERTS = ".experts."


@dataclass(frozen=True)
class IntegerSettings:
    """How weights become integers."""

    bits: Bits = field(default=4, metadata={"help": "Of a weight."})
    group_size: int | None = field(
        default=None, metadata={"help": "Columns that share a scale; unset: 32 of 4 bits, and whole rows of 8."}
    )


@dataclass(frozen=True)
class QuantizedLayers:
    """The linear layers of a model that become integers, and those that do not.

    Attributes:
        source: the checkpoint.
        layers: by the stored name of the weight.
        ignored: names of the other linear layers.
        kept: reason by name of every tensor that keeps its values.
        model: the outline of transformers.
    """

    source: DenseCheckpoint
    layers: Mapping[str, LinearLayer]
    ignored: tuple[str, ...]
    kept: Mapping[str, str]
    model: Any


def quantized_layers(source: DenseCheckpoint) -> QuantizedLayers:
    """Choose the layers: those that compress compresses, without the head.

    Raises:
        ConfigError: when none is left.
    """
    model = outline_model(source.index.root)
    found = linear_layers(model, source.headers)
    if source.checkpoint and source.checkpoint.manifest.tensors:
        wanted = set(source.checkpoint.manifest.tensors)
    else:
        wanted = {tensor.info.name for tensor in make_plan(source.index, CompressOptions(Target("bits", 4.0))).tensors}
    layers = {layer.weight: layer for layer in found if layer.weight in wanted and not layer.head and layer.weight}
    if not layers:
        raise ConfigError(
            f"{source.index.root.name}: has no linear layer of its own to make integers of; expected a model of"
            " transformers with some. Use decompress for a plain checkpoint."
        )
    ignored = [layer.module for layer in found if layer.weight not in layers]
    if any(_EXPERTS in name for name in source.tensors) and not any(_EXPERTS in name for name in layers):
        ignored.append(f"re:.*{_EXPERTS}.*")  # stored as a stack
    heads = {layer.weight for layer in found if layer.head}
    kept = {
        name: "the output layer, or tied to another one" if name in heads else "no linear layer that compress takes"
        for name in source.tensors
        if name not in layers
    }
    return QuantizedLayers(source, layers, tuple(ignored), kept, model)


@dataclass(frozen=True)
class IntegerPlan:
    """An export to integers, checked."""

    chosen: QuantizedLayers
    bits: int
    group_size: int | None
    decoded_at_loading: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """When transformers decodes the weights, where that is unusual."""
        if not self.decoded_at_loading:
            return ()
        name = type(self.chosen.model).__name__
        return (f"transformers initialises a {name} by its weights, and so decodes them as it loads them.",)

    @property
    def kept(self) -> Mapping[str, str]:
        """See `QuantizedLayers`."""
        return self.chosen.kept

    @property
    def converted(self) -> Mapping[str, str]:
        """The type of each layer."""
        return dict.fromkeys(self.chosen.layers, self._type)

    @property
    def _type(self) -> str:
        return f"int{self.bits}, {'rows' if self.group_size is None else f'groups of {self.group_size}'}"

    def write(self, folder: Path, measure: Measure, progress: Progress) -> list[Path]:
        """See `ModelPlan`."""
        entries: list[Entry] = []
        for name in self.chosen.source.tensors:
            if name in self.chosen.layers:
                entries += _Weight(self, name, measure, {}).entries(self._type)
            else:
                entries.append(self.chosen.source.entry(name))
        strategy = {"strategy": "channel"} if self.group_size is None else {"strategy": "group"}
        weights = {"num_bits": self.bits, "group_size": self.group_size, **strategy}
        extra = {"dequantize": True} if self.decoded_at_loading else {}
        return write_quantized(self.chosen, folder, reported(entries, progress), weights, extra)


@dataclass(frozen=True)
class _Weight:
    """A weight on its way to the file; which of its tensors is written first depends on their dtypes."""

    plan: IntegerPlan
    name: str
    measure: Measure
    scales: dict[int, Tensor]  # by first row: found when they are needed first
    written: set[str] = field(default_factory=set)  # when both tensors are, scales are forgotten

    def entries(self, stored_as: str) -> list[Entry]:
        source, base = self.plan.chosen.source, self.name.removesuffix(".weight")
        tensor = source.tensors[self.name]
        rows, columns = tensor.shape
        groups = columns // (self.plan.group_size or columns)
        dtype = "F32" if tensor.dtype in ("F32", "F64") else tensor.dtype if tensor.dtype in ("BF16", "F16") else "BF16"
        words = Entry(
            f"{base}.weight_packed", "I32", (rows, -(-columns * self.plan.bits // 32)), lambda: self._packed(dtype)
        )
        scale = Entry(f"{base}.weight_scale", dtype, (rows, groups), lambda: self._scales(dtype))
        nbytes = words.nbytes + scale.nbytes + 16

        def counted() -> Iterator[bytes | bytearray | memoryview]:
            yield from words.chunks()
            self.measure.finish(self.name, stored_as, nbytes)

        return [shape_entry(base, tensor.shape), Entry(words.name, words.dtype, words.shape, counted), scale]

    def _parts(self, dtype: str) -> Iterator[tuple[int, Tensor, Grouped]]:
        first = 0
        for rows in self.plan.chosen.source.rows(self.name):
            if not bool(torch.isfinite(rows.float()).all()):
                raise CheckpointError(
                    f"{self.name}: has NaN or infinite values; expected finite weights. Repair it, or leave it out of"
                    " compress with --exclude, and export the compressed folder."
                )
            known = self.scales.get(first)
            group = self.plan.group_size or rows.shape[1]
            yield first, rows, in_groups_of(rows, self.plan.bits, group, DTYPES[dtype], scale=known)
            first += len(rows)

    def _packed(self, dtype: str) -> Iterator[memoryview]:
        for first, rows, grouped in self._parts(dtype):
            self.scales[first] = grouped.scale
            self.measure.rows(self.name, first, rows, grouped.dense())
            yield tensor_bytes(packed(grouped.codes, self.plan.bits))
        self._finish("packed")

    def _scales(self, dtype: str) -> Iterator[memoryview]:
        if not self.scales:
            for first, _, grouped in self._parts(dtype):
                self.scales[first] = grouped.scale
        for first in sorted(self.scales):
            yield tensor_bytes(self.scales[first])
        self._finish("scale")

    def _finish(self, what: str) -> None:
        self.written.add(what)
        if len(self.written) == 2:
            self.scales.clear()


def shape_entry(base: str, shape: Sequence[int]) -> Entry:
    """The shape of a packed weight, as loaders ask for it."""
    return Entry(f"{base}.weight_shape", "I64", (2,), lambda: [struct.pack("<2q", *shape)])


def write_quantized(
    chosen: QuantizedLayers,
    folder: Path,
    entries: Sequence[Entry],
    weights: Mapping[str, object],
    extra: Mapping[str, object],
) -> list[Path]:
    """Write a checkpoint and a configuration that say how its linear layers are quantised.

    Args:
        chosen: the layers.
        folder: where to.
        entries: all tensors.
        weights: bits, strategy and group size of the integers.
        extra: what else the configuration of the integers has.
    """
    scheme = {"type": "int", "symmetric": True, "dynamic": False, "observer": "minmax", **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    quantized = {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(chosen.ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **extra,
    }
    files = write_checkpoint(folder, entries)
    config = {**chosen.source.config(), "quantization_config": quantized}
    copy_companions(chosen.source.index, folder, config, without="spectral_surgery.json")
    return files


def _plan(source: DenseCheckpoint, settings: Any) -> IntegerPlan:
    chosen = quantized_layers(source)
    _check_replaced(chosen.model)
    if settings.bits not in get_args(Bits):
        raise ConfigError(f"bits {settings.bits}: expected 4 or 8.")
    usual = 32 if settings.bits == min(get_args(Bits)) else None
    group: int | None = usual if settings.group_size is None else settings.group_size
    if group is not None and group < 1:
        raise ConfigError(f"group_size {group}: expected a number of columns, 1 or more.")
    for name in chosen.layers if group else ():
        columns = source.tensors[name].shape[1]
        if group and columns % group:
            widths = [source.tensors[other].shape[1] for other in chosen.layers]
            fitting = next((size for size in _GROUPS if not any(width % size for width in widths)), None)
            advice = f"Use -o group_size={fitting}" if fitting else "Use -o bits=8, which has whole rows"
            raise ConfigError(
                f"{name}: has {columns} columns, which groups of {group} do not divide; expected a divisor of it."
                f" {advice}."
            )
    modules = [layer.module for layer in chosen.layers.values() if not layer.expert]
    return IntegerPlan(chosen, settings.bits, group, initialised_by_weights(chosen.model, modules))


def _check_replaced(model: Any) -> None:
    for name in replaced_when_quantized(model, METHOD)[:1]:
        raise ConfigError(
            f"{name}: is a {type(model.get_submodule(name)).__name__}, which transformers replaces with other layers"
            f" when it reads {METHOD}; expected layers that it loads by their own names. Use decompress for a plain"
            " checkpoint."
        )


COMPRESSED_TENSORS = ModelTarget(
    METHOD,
    IntegerSettings,
    _plan,
    "4 or 8 bits a weight for vLLM, and for transformers with the package compressed-tensors",
)
