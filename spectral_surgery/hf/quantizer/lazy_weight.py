"""Weights of compressed layers as tensors: products and look-ups use the spectrum, everything else decodes it.

A forward that is not ours multiplies by `weight.T`, takes the matrix of an expert or cuts rows off. Such views stay
what they are, ranges of rows of a spectrum, and a product of one goes to the spectrum. So any forward gives the right
numbers, and those that only multiply never make a dense matrix.
Source: torch 2.15, `torch/utils/_python_dispatch.py`; ATen's native_functions.yaml for the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from spectral_surgery.errors import NotMergeableError
from spectral_surgery.layers import SpectralWeight
from spectral_surgery.matmul import form_matmul, form_matmul_transposed

_aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """A range of rows of a spectrum's matrix: [n, I]; or [I, n], turned.

    Attributes:
        dtype: floating type that it counts as.
        turned: whether it is transposed.
    """

    weight: SpectralWeight
    start: int
    stop: int
    dtype: torch.dtype
    turned: bool = False

    @staticmethod
    def all(weight: SpectralWeight, *, turned: bool = False) -> Rows:
        """The whole matrix."""
        return Rows(weight, 0, weight.shape[0], weight.dtype, turned)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it stands."""
        rows, columns = self.stop - self.start, self.weight.shape[1]
        return (columns, rows) if self.turned else (rows, columns)

    @property
    def device(self) -> torch.device:
        """Where the spectrum is."""
        return self.weight._like.device

    def turn(self) -> Rows:
        """Transposed."""
        return replace(self, turned=not self.turned)

    def cast(self, dtype: torch.dtype) -> Rows:
        """The same in another floating type."""
        return replace(self, dtype=dtype)

    def dense(self) -> Tensor:
        """Decoded."""
        if (self.start, self.stop) == (0, self.weight.shape[0]):
            rows = self.weight.to_dense(self.dtype)
        else:
            rows = self.look_up(torch.arange(self.stop - self.start, device=self.device))
        return rows.T if self.turned else rows

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows by number, [...] integers from 0: [..., I]; it must not be turned."""
        return self.weight.rows(ids + self.start).to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """X times the matrix as it stands: [..., rows] to [..., columns]."""
        forms, first, last = [], 0, 0
        for form in self.weight.forms:
            stop = last + form.shape[0]
            if stop <= self.start:
                first = stop
            elif last < self.stop:
                forms.append(form)
            last = stop
        covered = sum(form.shape[0] for form in forms)
        before, after = self.start - first, first + covered - self.stop
        if self.turned:
            return form_matmul(x, forms)[..., before : covered - after]
        return form_matmul_transposed(functional.pad(x, (before, after)) if before or after else x, forms)


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, one above the other: [E, O, I]."""

    matrices: tuple[Rows, ...]

    @staticmethod
    def of(weights: Sequence[SpectralWeight]) -> Stack:
        """Whole matrices."""
        return Stack(tuple(map(Rows.all, weights)))

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, O, I)."""
        return (len(self.matrices), *self.matrices[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type that they count as."""
        return self.matrices[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the spectra are."""
        return self.matrices[0].device

    def turn(self) -> Stack:
        """Each transposed."""
        return Stack(tuple(matrix.turn() for matrix in self.matrices))

    def cast(self, dtype: torch.dtype) -> Stack:
        """The same in another floating type."""
        return Stack(tuple(matrix.cast(dtype) for matrix in self.matrices))

    def dense(self) -> Tensor:
        """Decoded, one after the other."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for place, matrix in zip(out, self.matrices, strict=True):
            place.copy_(matrix.dense())
        return out

    def product(self, x: Tensor) -> Tensor:
        """Each batch of x, [E, T, O], by its matrix: [E, T, I]."""
        return torch.stack([matrix.product(rows) for rows, matrix in zip(x, self.matrices, strict=True)])


Source = Rows | Stack


class LazyWeight(Tensor):
    """A weight that is decompressed anew by ``.data`` and by whatever computes with it, products excepted.

    Setting its data raises NotMergeableError: adapters that are merged so would be lost without a word.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch says to
    _is_hf_initialized = True  # transformers leaves it alone
    source: Source

    @staticmethod
    def of(source: Source) -> LazyWeight:
        """Make one of a shape, a dtype and a device, and nothing else."""
        *front, rows, columns = source.shape
        turned = (source.matrices[0] if isinstance(source, Stack) else source).turned
        strides = (*(rows * columns for _ in front), *((1, rows) if turned else (columns, 1)))
        weight = Tensor._make_wrapper_subclass(
            LazyWeight, source.shape, strides=strides, dtype=source.dtype, device=source.device
        )
        weight.source = source
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Stay a spectrum in views, products and look-ups; compute with the dense weight otherwise."""
        del types
        operands, named = tree_map_only(LazyWeight, lambda weight: weight.source, (args, dict(kwargs or {})))
        with torch.no_grad():  # torch has recorded the call already
            known = _KNOWN.get(func)
            result = known(*operands, **named) if known is not None else None
            if result is None:
                operands, named = tree_map_only((Rows, Stack), lambda source: source.dense(), (operands, named))
                return func(*operands, **named)
        return tree_map_only((Rows, Stack), LazyWeight.of, result)

    @property
    def data(self) -> Tensor:
        """The dense weight."""
        return self.source.dense()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Refused."""
        del value
        raise NotMergeableError(
            "weight: expected adapters beside a compressed layer, got a write into it. Decompress the model before"
            " you merge into it: model.dequantize(), or `spectral-surgery decompress`."
        )


def _same(of: Source) -> Source:
    return of


def _transposed(of: Source, first: int = 0, second: int = 1) -> Source | None:
    count = len(of.shape)
    return of.turn() if {first % count, second % count} == {count - 2, count - 1} else None


def _permuted(of: Source, order: Sequence[int]) -> Source | None:
    places = [place % len(of.shape) for place in order]
    if places == list(range(len(places))):
        return of
    return of.turn() if places == [*range(len(places) - 2), len(places) - 1, len(places) - 2] else None


def _selected(of: Source, dim: int, index: int) -> Rows | Tensor | None:
    if dim % len(of.shape) != 0 or (isinstance(of, Rows) and of.turned):
        return None
    if isinstance(of, Stack):
        return of.matrices[index]
    return of.look_up(torch.tensor(index % of.shape[0], device=of.device))


def _between(of: Source, start: int, stop: int) -> Source:
    if isinstance(of, Stack):
        return Stack(of.matrices[start:stop])
    return replace(of, start=of.start + start, stop=of.start + stop)


def _sliced(of: Source, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    first, last, _ = slice(start, stop).indices(of.shape[0])
    if dim % len(of.shape) != 0 or step != 1 or last <= first or (isinstance(of, Rows) and of.turned):
        return None
    return _between(of, first, last)


def _split(of: Source, sizes: int | Sequence[int], dim: int = 0) -> list[Source] | None:
    if dim % len(of.shape) != 0 or (isinstance(of, Rows) and of.turned):
        return None
    rows = of.shape[0]
    ends = [0]
    for size in [sizes] * -(-rows // sizes) if isinstance(sizes, int) else sizes:
        ends.append(min(ends[-1] + size, rows))
    return [_between(of, start, stop) for start, stop in pairwise(ends)]


def _unbound(of: Source, dim: int = 0) -> list[Rows] | None:
    return list(of.matrices) if isinstance(of, Stack) and dim % 3 == 0 else None


def _viewed(of: Source, size: Sequence[int]) -> Source | None:
    known = -_count([length for length in size if length != -1])
    shape = tuple(_count(of.shape) // -known if length == -1 else length for length in size)
    if shape == of.shape:
        return of
    fits = isinstance(of, Rows) and not of.turned and len(shape) == 3 and shape[2] == of.shape[1]
    if not fits or not isinstance(of, Rows):
        return None
    return Stack(tuple(_rows(of, number * shape[1], shape[1]) for number in range(shape[0])))


def _expanded(of: Source, size: Sequence[int], *, implicit: bool = False) -> Source | None:
    del implicit
    same = len(size) == len(of.shape) and all(
        length in (-1, there) for length, there in zip(size, of.shape, strict=True)
    )
    return of if same else None


def _rows(of: Rows, start: int, count: int) -> Rows:
    return replace(of, start=of.start + start, stop=of.start + start + count)


def _count(sizes: Sequence[int]) -> int:
    return torch.Size(sizes).numel()


def _stacked(of: Source, dim: int) -> Stack | None:
    return Stack((of,)) if isinstance(of, Rows) and dim in (0, -3) else None


def _copied(of: Source, *, dtype: torch.dtype | None = None, device: Any = None, **_: object) -> Source | None:
    moved = device is not None and torch.device(device) != of.device
    return None if moved or dtype is None or not dtype.is_floating_point else of.cast(dtype)


def _multiplied(x: Tensor | Source, other: Tensor | Source) -> Tensor | None:
    """Of two matrices, a matrix and a vector, or two batches."""
    if isinstance(x, Tensor) and not isinstance(other, Tensor):
        return other.product(x).to(x.dtype)
    if not isinstance(x, Tensor) and isinstance(other, Tensor):
        if other.ndim == 1:
            return x.turn().product(other).to(other.dtype)
        return x.turn().product(other.mT).to(other.dtype).mT
    return None


def _added(bias: Tensor, x: Tensor | Source, other: Tensor | Source, *, beta: float = 1, alpha: float = 1) -> Any:
    if not isinstance(bias, Tensor) or isinstance(other, Tensor) or not isinstance(x, Tensor):
        return None
    return (beta * bias + alpha * other.product(x)).to(x.dtype)


def _linear(x: Tensor, weight: Tensor | Source, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(x, Tensor) or isinstance(weight, Tensor):
        return None
    y = weight.turn().product(x)
    return (y if bias is None else y + bias).to(x.dtype)


def _embedded(of: Source, ids: Tensor, *_: object) -> Tensor | None:
    return of.look_up(ids) if isinstance(of, Rows) and not of.turned else None


def _indexed(of: Source, places: Sequence[Tensor | None]) -> Tensor | None:
    only = places[0] if len(places) == 1 else None
    if only is None or only.dtype not in (torch.int32, torch.int64) or not isinstance(of, Rows) or of.turned:
        return None
    return of.look_up(torch.where(only < 0, only + of.shape[0], only))


_KNOWN: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _same,
    _aten.detach.default: _same,
    _aten.t.default: _transposed,
    _aten.transpose.int: _transposed,
    _aten.permute.default: _permuted,
    _aten.select.int: _selected,
    _aten.slice.Tensor: _sliced,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.unbind.int: _unbound,
    _aten.view.default: _viewed,
    _aten._unsafe_view.default: _viewed,
    _aten.expand.default: _expanded,
    _aten.unsqueeze.default: _stacked,
    _aten._to_copy.default: _copied,
    _aten.mm.default: _multiplied,
    _aten.mv.default: _multiplied,
    _aten.bmm.default: _multiplied,
    _aten.addmm.default: _added,
    _aten.baddbmm.default: _added,
    _aten.linear.default: _linear,
    _aten.embedding.default: _embedded,
    _aten.index.Tensor: _indexed,
}
