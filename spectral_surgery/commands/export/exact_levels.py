"""The stored codes themselves for vLLM, which multiplies them between two transforms of its activations. Experimental.

A weight is Bₒᵀ (s C) Bᵢ with codes C, a step s, and the matrices B of a tile along outputs and inputs. So
y = Bₒᵀ (s C) (Bᵢ x), tile by tile. The format pack-quantized holds C, and s for each row. A transform_config holds the
two matrices, as type random-matrix whose head_dim is the side of a tile: "input" is x @ M, and "output" is y @ M, for a
stored M. vLLM divides M by the root of its side, so it is stored times that. The package compressed-tensors does not
divide, and transformers does not transform at all: vLLM alone reads such a folder.
Source: vLLM, model_executor/layers/quantization/compressed_tensors/transform, in 2026; compressed-tensors 0.20.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, EncodedSpectrum
from spectral_surgery.codec.quantized import INT8_MAX, dequantize
from spectral_surgery.commands.export.compressed_tensors import (
    QuantizedLayers,
    quantized_layers,
    shape_entry,
    write_quantized,
)
from spectral_surgery.commands.export.integer_groups import packed
from spectral_surgery.commands.export.model import Measure, ModelTarget
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.dense import DenseCheckpoint, DenseTensor
from spectral_surgery.files.reader import DTYPES
from spectral_surgery.files.writer import Entry, reported, tensor_bytes, tensor_entry
from spectral_surgery.matmul.levels import Grid, grid_of
from spectral_surgery.progress import Progress
from spectral_surgery.transforms import TRANSFORMS

_INPUT, _OUTPUT = "spectral_analysis", "spectral_synthesis"  # names of the two transforms in the configuration
_BITS = 8
_TYPE = "int8, codes as stored"
_ADVICE = "Use --to compressed-tensors, which rounds once more."


@dataclass(frozen=True)
class ExactSettings:
    """There is nothing to choose."""


@dataclass(frozen=True)
class ExactPlan:
    """An export of codes, checked but for their size, which only decoding tells."""

    chosen: QuantizedLayers
    checkpoint: CompressedCheckpoint
    basis: Basis

    @property
    def notes(self) -> tuple[str, ...]:
        """Who reads it."""
        notes = [
            "experimental: for vLLM alone. transformers ignores transform_config, and would compute something else.",
            "not run in vLLM; its arithmetic was checked in float32.",
        ]
        if self.basis.transform != "hadamard":
            notes.append(
                f"vLLM keeps the matrices of {self.basis.transform} in the dtype of the model: with bfloat16 they are"
                " rounded. Of hadamard they are exact."
            )
        return tuple(notes)

    @property
    def kept(self) -> Mapping[str, str]:
        """See `QuantizedLayers`."""
        return self.chosen.kept

    @property
    def converted(self) -> Mapping[str, str]:
        """The type of each layer."""
        return dict.fromkeys(self.chosen.layers, _TYPE)

    def write(self, folder: Path, measure: Measure, progress: Progress) -> list[Path]:
        """See `ModelPlan`."""
        source, entries = self.chosen.source, list[Entry]()
        for name, tensor in source.tensors.items():
            if name in self.chosen.layers and tensor.record is not None:
                entries += self._entries(name, tensor, measure)
            else:
                entries.append(source.entry(name))
        weights = {"num_bits": _BITS, "group_size": None, "strategy": "channel"}
        return write_quantized(
            self.chosen, folder, reported(entries, progress), weights, {"transform_config": self._transform()}
        )

    def _transform(self) -> dict[str, object]:
        def scheme(location: str) -> dict[str, object]:
            args = {"targets": ["Linear"], "location": location, "inverse": False, "ignore": list(self.chosen.ignored)}
            fixed = {"randomize": False, "requires_grad": False, "precision": "torch.float32"}
            return {"type": "random-matrix", "head_dim": self.basis.tile, "apply": [args], **fixed}

        return {"config_groups": {_INPUT: scheme("input"), _OUTPUT: scheme("output")}}

    def _entries(self, name: str, tensor: DenseTensor, measure: Measure) -> list[Entry]:
        base, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        code = tensor.dtype if tensor.dtype in ("F32", "F16", "BF16") else "F32"
        dtype, parts = DTYPES[code], range(len(tensor.record.parts if tensor.record else ()))
        matrix = TRANSFORMS[self.basis.transform].matrix(self.basis.tile) * math.sqrt(self.basis.tile)

        def scales() -> Iterator[memoryview]:
            for outline in (self.checkpoint.outline(name, part) for part in parts):
                yield tensor_bytes(_scale(outline, dtype).expand(outline.shape[0]))

        def words() -> Iterator[memoryview]:
            first = 0
            for spectrum in (self.checkpoint.part(name, part) for part in parts):
                for levels, dense in _levels(name, spectrum):
                    after = self.basis.inverse(levels.float() * _scale(spectrum, dtype).float())
                    measure.rows(name, first, dense, after)
                    first += len(levels)
                    yield tensor_bytes(packed(levels, _BITS))
            measure.finish(name, _TYPE, stored)

        width = -(-columns // (32 // _BITS))
        stored = 4 * rows * width + rows * dtype.itemsize + 16 + 2 * matrix.numel() * dtype.itemsize
        return [
            shape_entry(base, tensor.shape),
            Entry(f"{base}.weight_packed", "I32", (rows, width), words),
            Entry(f"{base}.weight_scale", code, (rows, 1), scales),
            tensor_entry(f"{base}.{_INPUT}_input.weight", matrix.T.to(dtype)),
            tensor_entry(f"{base}.{_OUTPUT}_output.weight", matrix.to(dtype)),
        ]


def _grid(spectrum: EncodedSpectrum) -> Grid | None:
    return grid_of(spectrum.offset)


def _scale(spectrum: EncodedSpectrum, dtype: torch.dtype) -> Tensor:
    """[1]: what a level stands for."""
    grid = _grid(spectrum)
    return (spectrum.step / (grid.parts if grid else 1)).to(dtype)


def _levels(name: str, spectrum: EncodedSpectrum) -> Iterator[tuple[Tensor, Tensor]]:
    """Levels [r, I] int8 of each frame, and the weights [r, I] float32 that they stand for.

    Raises:
        ConfigError: when a level does not fit int8.
    """
    grid = _grid(spectrum)
    for number in range(len(spectrum.frames)):
        codes = spectrum.codes(number)
        low, high = (int(value) for value in torch.aminmax(codes))
        if grid is None or not grid.fits(low, high):
            raise ConfigError(
                f"{name}: codes reach {low} to {high}; expected levels from {-INT8_MAX} to {INT8_MAX}, as int8 holds"
                f" them. {_ADVICE}"
            )
        dense = spectrum.basis.inverse(dequantize(codes, spectrum.step, spectrum.offset))
        yield grid.levels(codes.to(torch.int8)), dense


def _plan(source: DenseCheckpoint, settings: Any) -> ExactPlan:
    del settings
    checkpoint = source.checkpoint
    if checkpoint is None:
        raise ConfigError(f"{source.index.root.name}: is not compressed, so that there are no codes to keep. {_ADVICE}")
    chosen = quantized_layers(source)
    bases = {name: checkpoint.outline(name, 0).basis for name in chosen.layers}
    basis = next(iter(bases.values()))
    for name, layer in chosen.layers.items():
        problem = _problem(checkpoint, name, basis, bias=layer.bias)
        if problem:
            raise ConfigError(f"{name}: {problem}. {_ADVICE}")
    return ExactPlan(chosen, checkpoint, basis)


def _problem(checkpoint: CompressedCheckpoint, name: str, basis: Basis, *, bias: bool) -> str:
    """Why the codes of a layer cannot be handed on; empty when they can."""
    record = checkpoint.manifest.tensors[name]
    rows, columns = record.matrix
    outlines = [checkpoint.outline(name, part) for part in range(len(record.parts))]
    reasons = {
        "has a bias, which vLLM does not add after a transform; expected layers without": bias,
        f"has the transform {outlines[0].basis}, and others {basis}; expected one of all layers": any(
            outline.basis != basis for outline in outlines
        ),
        f"is transformed along axes {basis.axes} only; expected both": basis.axes != (0, 1),
        f"is {rows} x {columns}, which tiles of {basis.tile} do not divide; expected multiples": bool(
            rows % basis.tile or columns % basis.tile
        ),
        "has a step for each column; expected one step, as without --calibrate": outlines[0].step.numel() > 1,
        f"has the offset {outlines[0].offset:g}, which no grid of int8 has; expected lattice codes": any(
            _grid(outline) is None for outline in outlines
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


COMPRESSED_TENSORS_EXACT = ModelTarget(
    "compressed-tensors-exact",
    ExactSettings,
    _plan,
    "the very codes and their transform, for vLLM alone; experimental",
)
