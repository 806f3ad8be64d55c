"""Products for those who record operations and run them elsewhere: torch.export and torch.jit.trace.

Nothing here looks at a number, or at how many tokens there are, and nothing is called but what torch has: a graph that
was recorded on one machine gives the same on another, without this package. The price is that the levels of a matrix
become floating-point numbers for each product. Gradients keep the levels themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from spectral_surgery.after_import import when_imported
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.activations import transform_matrix
from spectral_surgery.matmul.form import Form, scaled
from spectral_surgery.transforms import IDENTITY, TRANSFORMS


def only_torch() -> bool:
    """Whether products have to be made of torch's operations: who records, or transforms functions, sees no others."""
    return whole_graph() or forward_ad._current_level >= 0 or _is_transformed()


def _is_transformed() -> bool:
    """Whether torch.func, as vmap or grad, is at work; while a graph is made there is an operator for that."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def whole_graph() -> bool:
    """Whether all has to be recorded: torch.export and torch.jit.trace have nobody to leave Python to."""
    return torch.compiler.is_exporting() or _is_tracing()


def left_to_python(function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """Call a function between two graphs of torch.compile."""
    return function(x, *others)


def product(x: Tensor, forms: Sequence[Form], *, transposed: bool = False) -> Tensor:
    """X Wᵀ, with the rows of W in one or more forms, or X W: [..., I] to [..., O], in float32 or wider."""
    into, back = (0, 1) if transposed else (1, 0)  # axes of the matrix
    wide, start, parts = x.to(torch.promote_types(x.dtype, torch.float32)), 0, []
    for form in forms:
        levels, basis = form.recorded_levels(), form.basis
        lengths = constant_shape(levels)
        given = wide.narrow(-1, start, lengths[0]) if transposed else wide
        inside = scaled(_along(given, lengths[into], basis, into, inverse=False), form, into)
        y = scaled(_times(inside, levels, x.dtype, turned=not transposed), form, back)
        parts.append(_along(y, lengths[back], basis, back, inverse=True))
        start += lengths[0]
    if len(parts) == 1:
        return parts[0]
    return reduce(torch.add, parts) if transposed else torch.cat(parts, -1)


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def rows(ids: Tensor, forms: Sequence[Form]) -> Tensor:
    """Rows of W: [...] integers to [..., I] float32; what becomes of others than its rows is left to torch."""
    whole: Tensor | None = None
    start = 0
    for form in forms:
        levels = form.recorded_levels()
        height, columns = constant_shape(levels)
        local = ids - start if len(forms) > 1 else ids
        inside = local.clamp(0, height - 1) if len(forms) > 1 else local
        found = _along(_row_levels(inside, levels, form) * form.scale, columns, form.basis, 1, inverse=True)
        whole = found if whole is None else torch.where((local >= 0).unsqueeze(-1), found, whole)
        start += height
    return cast(Tensor, whole)


def constant_shape(weight: Tensor) -> tuple[int, int]:
    """(O, I) of a matrix that is not an input, so that a trace needs no warning about it."""
    if not _is_tracing():
        return weight.shape[0], weight.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(weight.shape[0]), int(weight.shape[1])


class _Product(Function):
    """X M, with M as it is held for the gradient: torch would keep its floating-point copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(levels)
        return x @ levels.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (levels,) = ctx.saved_tensors
        return grads[0] @ levels.to(grads[0].dtype).mT, None


def _times(x: Tensor, levels: Tensor, accuracy: torch.dtype, *, turned: bool) -> Tensor:
    matrix = levels.mT if turned else levels
    narrow = x if x.is_cpu or accuracy == torch.float64 else x.to(accuracy)  # 16 bits hold levels, and CPUs are slow
    if whole_graph() or _is_transformed() or not (torch.is_grad_enabled() and x.requires_grad):
        return (narrow @ matrix.to(narrow.dtype)).to(x.dtype)
    return cast(Tensor, _Product.apply(narrow, matrix)).to(x.dtype)


def _along(x: Tensor, length: int, basis: Basis, axis: int, *, inverse: bool) -> Tensor:
    """Transform tiles of the last dimension, which has a known length, if the axis of the matrix was transformed."""
    if axis not in basis.axes or basis.transform == IDENTITY.name:
        return x
    rest = length % basis.tile
    count, parts = length // basis.tile, []
    if count:
        tiles = x.narrow(-1, 0, length - rest).unflatten(-1, (count, basis.tile))
        parts.append((tiles @ _matrix(basis.transform, basis.tile, x, inverse=inverse)).flatten(-2))
    if rest:
        last = x.narrow(-1, length - rest, rest)
        taken = TRANSFORMS[basis.transform].accepts(rest)
        parts.append(last @ _matrix(basis.transform, rest, x, inverse=inverse) if taken else last)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _row_levels(ids: Tensor, levels: Tensor, form: Form) -> Tensor:
    """Rows of the spectrum but for ``scale``, [..., I] float32, transformed back along rows: from those of its tile."""
    basis = form.basis
    if 0 not in basis.axes or basis.transform == IDENTITY.name:
        return _scaled(levels, ids, form)
    height, tile = constant_shape(levels)[0], basis.tile
    first = ids // tile * tile
    inside = torch.arange(tile, device=ids.device)
    rows_of_tile = (first.unsqueeze(-1) + inside).clamp(max=height - 1)
    like, rest = levels.new_empty(0, dtype=torch.float32), height % tile
    share = _matrix(basis.transform, tile, like, inverse=False)[ids - first]  # [..., tile]
    if rest:
        short = torch.eye(rest, device=ids.device)
        if TRANSFORMS[basis.transform].accepts(rest):
            short = _matrix(basis.transform, rest, like, inverse=False)
        short = torch.nn.functional.pad(short, (0, tile - rest, 0, tile - rest))
        share = torch.where((first == height - rest).unsqueeze(-1), short[ids - first], share)
    return (share.unsqueeze(-2) @ _scaled(levels, rows_of_tile, form)).squeeze(-2)


def _scaled(levels: Tensor, rows: Tensor, form: Form) -> Tensor:
    values = levels[rows].to(torch.float32)
    return values * form.row_scale[rows].unsqueeze(-1) if form.row_scale.nbytes else values


def _matrix(transform: str, points: int, like: Tensor, *, inverse: bool) -> Tensor:
    return _constant_matrix(transform, points, like.dtype, like.device, inverse)


def _constant_matrix(transform: str, points: int, dtype: torch.dtype, device: torch.device, inverse: bool) -> Tensor:
    return transform_matrix(transform, points, dtype, device, inverse)


def mark() -> None:
    """Tell torch.compile which function it cannot record, and which is constant."""
    globals()["left_to_python"] = torch.compiler.disable(left_to_python)
    torch.compiler.assume_constant_result(_constant_matrix)


# Not before someone compiles: to mark a function imports torch.compile, which takes seconds and needs a cache to write.
when_imported("torch._dynamo", __name__, mark.__name__)
