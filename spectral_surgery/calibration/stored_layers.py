"""The stored matrices that the linear layers of a block multiply by.

A layer mostly multiplies by one stored matrix, but some models store the matrices of several layers as one (queries,
keys and values), or compute with the rows of several as one.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.layer import is_conv1d
from spectral_surgery.calibration.expert_moments import ExpertMatrix
from spectral_surgery.files.index import TensorInfo
from spectral_surgery.hf.quantizer.fused_experts import expert_matrices
from spectral_surgery.hf.tensor_names import Piece, Span, TensorNames, rows_of


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix of a checkpoint, and the layers that have its rows."""

    tensor: str
    layers: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    first: int = 0

    @property
    def transposed(self) -> bool:
        """Whether it is stored as [I, O]."""
        return any(
            layer.transposed if isinstance(layer, ExpertMatrix) else is_conv1d(layer) for layer in self.layers.values()
        )

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those of the layers that are modules of their own."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Module)}

    @property
    def experts(self) -> dict[str, ExpertMatrix]:
        """Those of the layers that are a matrix of an expert."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, ExpertMatrix)}

    @property
    def weight(self) -> Tensor:
        """The matrix as it is stored, from the layers: their own weight where there is one that is all of it."""
        only: Tensor = next(iter(self.layers.values())).weight.detach()
        if self._whole:
            return only
        rows = sum(count for spans in self.spans.values() for _, _, count in spans)
        whole: Tensor = only.new_empty(rows, only.shape[1])
        for name, layer in self.layers.items():
            for row, stored, count in self.spans[name]:
                whole[stored : stored + count] = layer.weight.detach()[row : row + count]
        return whole

    def put(self, weight: Tensor) -> None:
        """Give the layers another matrix, of the shape that is stored."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                for row, stored, count in self.spans[name]:
                    layer.weight[row : row + count] = weight[stored : stored + count]

    @property
    def _whole(self) -> bool:
        (name, spans), *others = self.spans.items()
        return not others and spans == ((0, 0, len(self.layers[name].weight)),)


def matrices_of(names: TensorNames, wanted: Container[str], prefix: str, block: nn.Module) -> list[StoredMatrix]:
    """The stored matrices of which every row is in a linear layer or an expert of a block, in the order of these."""
    matrices: dict[str, StoredMatrix] = {}
    infos: dict[str, TensorInfo] = {}
    for name, module in block.named_modules():
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        parameter = names.find(_path(prefix, name, "weight")) if linear else None
        for piece in parameter.pieces if parameter else ():
            info = piece.info
            if info.name in wanted and len(info.shape) == 2 and not piece.transposed:
                infos[info.name] = info
                matrix = matrices.get(info.name, StoredMatrix(info.name))
                matrices[info.name] = StoredMatrix(
                    info.name, {**matrix.layers, name: module}, {**matrix.spans, name: piece.spans}
                )
    complete = [matrix for matrix in matrices.values() if _covered(matrix, infos[matrix.tensor])]
    return complete + list(_expert_matrices(names, wanted, prefix, block))


def _expert_matrices(
    names: TensorNames, wanted: Container[str], prefix: str, block: nn.Module
) -> Iterator[StoredMatrix]:
    """Of experts that are fused in the model: stored one by one, or below each other in one tensor."""
    for name, module in block.named_modules():
        for leaf in expert_matrices(module):
            parameter = names.find(_path(prefix, name, leaf))
            for piece in parameter.pieces if parameter else ():
                if piece.info.name in wanted and not piece.transposed:
                    yield from _of_experts(piece, f"{name}.{leaf}", ExpertMatrix(module, leaf, 0))


def _of_experts(piece: Piece, name: str, like: ExpertMatrix) -> Iterator[StoredMatrix]:
    height, count = like.weight.shape[0], rows_of(piece.info.shape)
    if count > height:
        if piece.spans == ((0, 0, count),):
            for expert in range(count // height):
                layers = {f"{name}[{expert}]": ExpertMatrix(like.module, like.leaf, expert)}
                yield StoredMatrix(piece.info.name, layers, dict.fromkeys(layers, ((0, 0, height),)), expert * height)
        return
    experts = {row // height for row, _, _ in piece.spans}
    if len(experts) == 1:
        expert = experts.pop()
        layers = {f"{name}[{expert}]": ExpertMatrix(like.module, like.leaf, expert)}
        spans = tuple((row - expert * height, stored, count) for row, stored, count in piece.spans)
        matrix = StoredMatrix(piece.info.name, layers, dict.fromkeys(layers, spans))
        if _covered(matrix, piece.info):
            yield matrix


def _path(prefix: str, module: str, leaf: str) -> str:
    """The name of a parameter in the model; a block may be a layer itself."""
    return ".".join(part for part in (prefix.removesuffix("."), module, leaf) if part)


def _covered(matrix: StoredMatrix, info: TensorInfo) -> bool:
    rows = torch.zeros(rows_of(info.shape), dtype=torch.bool)
    for spans in matrix.spans.values():
        for _, stored, count in spans:
            rows[stored : stored + count] = True
    return bool(rows.all())
