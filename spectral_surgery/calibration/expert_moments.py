"""What each of fused experts is given: the second moments that calibration needs, one for each expert and matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.hf.quantizer.fused_experts import ExpertsForward, expert_matrices, fused_matrices
from spectral_surgery.hf.quantizer.lazy_weight import LazyWeight, Rows, Stack
from spectral_surgery.layers import SpectralWeight
from spectral_surgery.live.moments import SecondMoment


class ExpertMatrix:
    """The matrix of one expert in a fused parameter, to be read and changed like the weight of a linear layer."""

    def __init__(self, module: nn.Module, leaf: str, expert: int) -> None:
        """Point at it."""
        self.module, self.leaf, self.expert = module, leaf, expert

    @property
    def weight(self) -> Tensor:
        """[O, I], or [I, O] where it is transposed: a view of the parameter."""
        return _stack(self.module, self.leaf)[self.expert]

    @property
    def transposed(self) -> bool:
        """Whether the expert multiplies by its matrix and not by the transposed one."""
        return expert_matrices(self.module)[self.leaf]

    @property
    def width(self) -> int:
        """I, of what it is given."""
        return self.weight.shape[0 if self.transposed else 1]


def _stack(module: nn.Module, leaf: str) -> Tensor:
    """[E, rows, columns]: a parameter, which DBRX has as [E * rows, columns]."""
    whole = cast(Tensor, module._parameters[leaf])
    return whole if whole.ndim == 3 else whole.unflatten(0, (cast(int, module.moe_num_experts), -1))


class _Recording(ExpertsForward):
    """The same forward, that sums the second moments of what each expert is given."""

    _moments: dict[tuple[int, str], SecondMoment]

    def _project(self, name: str, x: Tensor, ids: Tensor, counts: Sequence[int]) -> Tensor:
        for expert, rows in enumerate(torch.split(x, list(counts))):
            if len(rows) and (expert, name) in self._moments:
                self._moments[expert, name].add(rows)
        return super()._project(name, x, ids, counts)


class _Dense:
    """The matrix of one expert in the place of a spectrum, with the sum of the moments of what is multiplied by it."""

    def __init__(self, matrix: Tensor, moment: SecondMoment | None) -> None:
        self.matrix, self.moment = matrix, moment
        self.shape, self.dtype, self._like = matrix.shape, matrix.dtype, matrix


@dataclass(frozen=True)
class _SeenRows(Rows):
    """A matrix that sums the second moments of what is multiplied by it; it is always all of its rows."""

    def dense(self) -> Tensor:
        matrix = cast(_Dense, self.weight).matrix
        return matrix.T if self.turned else matrix

    def product(self, x: Tensor) -> Tensor:
        moment = cast(_Dense, self.weight).moment
        if moment is not None:
            moment.add(x)
        return x @ self.dense()


def _reader(leaf: str) -> Callable[[nn.Module], Tensor]:
    def read(module: nn.Module) -> Tensor:
        sums = cast(dict[tuple[int, str], SecondMoment], module._moments)
        stack = _stack(module, leaf).detach()  # a forward that is given it for [E * rows, columns] views it as this
        matrices = (_Dense(matrix, sums.get((expert, leaf))) for expert, matrix in enumerate(stack))
        return LazyWeight.of(
            Stack(
                tuple(_SeenRows(cast(SpectralWeight, dense), 0, len(dense.matrix), dense.dtype) for dense in matrices)
            )
        )

    return read


@cache
def _recording(kind: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """The class with a forward that records, or with parameters that do where it has a forward of its own."""
    settings: dict[str, Any] = {"__module__": kind.__module__} | {leaf: property(_reader(leaf)) for leaf in leaves}
    return type(kind.__name__, (kind,) if leaves else (_Recording, kind), settings)


@contextmanager
def expert_moments(matrices: Mapping[str, ExpertMatrix]) -> Iterator[dict[str, Tensor]]:
    """Sum the second moments of what experts are given while the block lasts.

    Yields:
        H = Xᵀ X, [I, I] float32, by name; filled when the block ends, without experts that no token came to.
    """
    modules = list({id(matrix.module): matrix.module for matrix in matrices.values()}.values())
    classes = [type(module) for module in modules]
    moments: dict[str, Tensor] = {}
    sums: dict[int, dict[tuple[int, str], SecondMoment]] = {}
    for matrix in matrices.values():
        zero = SecondMoment(matrix.width, matrix.weight.device)
        sums.setdefault(id(matrix.module), {})[matrix.expert, matrix.leaf] = zero
    try:
        for module in modules:
            leaves = () if fused_matrices(module) else tuple(expert_matrices(module))
            module.__class__ = _recording(type(module), leaves)  # type: ignore[arg-type]
            vars(module)["_moments"] = sums[id(module)]
        yield moments
    finally:
        for module, before in zip(modules, classes, strict=True):
            module.__class__ = before
            vars(module).pop("_moments", None)
    for name, matrix in matrices.items():
        moment = sums[id(matrix.module)].pop((matrix.expert, matrix.leaf)).whole()
        if moment.diagonal().any():
            moments[name] = moment
