"""Products and look-ups as one operator each, for torch.compile: a compiled model has no break at a layer.

Forms cannot be arguments of an operator. They go in as their tensors, and the rest of each as words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.coded import CodedForm
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.host_offload import HostMatrix
from spectral_surgery.matmul.level_form import LevelForm

Flat = tuple[list[Tensor], list[str]]

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (CodedForm, LevelForm)}
_TENSORS = {name: [field.name for field in fields(kind) if field.type == "Tensor"] for name, kind in _KINDS.items()}

_LIBRARY = torch.library.Library("spectral_surgery", "DEF")
_LIBRARY.define("product(Tensor x, Tensor? bias, Tensor[] tensors, str[] others, bool transposed) -> Tensor")
_LIBRARY.define("rows(Tensor ids, Tensor[] tensors, str[] others) -> Tensor")


def product(x: Tensor, forms: Sequence[Form], bias: Tensor | None, *, transposed: bool) -> Tensor:
    """`form_matmul`, or `form_matmul_transposed`, as an operator."""
    y: Tensor = torch.ops.spectral_surgery.product(x, bias, *_flat(forms), transposed)
    return y


def rows(ids: Tensor, forms: Sequence[Form]) -> Tensor:
    """`SpectralWeight.rows` as an operator."""
    found: Tensor = torch.ops.spectral_surgery.rows(ids, *_flat(forms))
    return found


def _flat(forms: Sequence[Form]) -> Flat:
    tensors: list[Tensor] = []
    others: list[str] = []
    for form in forms:
        kind, basis, layout, host = type(form).__name__, form.basis, "", None
        if isinstance(form, LevelForm):
            layout, host = form.layout, form.host
        tensors += [getattr(form, name) for name in _TENSORS[kind]] + ([] if host is None else [host.codes])
        axes = 2 * (0 in basis.axes) + (1 in basis.axes)
        rows, columns = form.shape
        others.append(f"{kind} {basis.transform} {basis.tile} {axes} {rows} {columns} {layout} {int(host is not None)}")
    return tensors, others


def _forms(tensors: Sequence[Tensor], others: Sequence[str]) -> list[Form]:
    """The inverse of `_flat`."""
    forms, given = [], iter(tensors)
    for words in others:
        kind, transform, tile, axes, rows, columns, layout, hosted = words.split(" ")
        values: dict[str, Any] = {name: next(given) for name in _TENSORS[kind]}
        if layout:
            values |= {"layout": layout, "host": HostMatrix(next(given)) if int(hosted) else None}
        transformed = tuple(axis for axis in (0, 1) if int(axes) & (2 - axis))
        basis = Basis(transform, int(tile), transformed)
        forms.append(_KINDS[kind](**values, basis=basis, shape=(int(rows), int(columns))))
    return forms


def _shape(others: Sequence[str]) -> tuple[int, int]:
    """(O, I) of all forms together."""
    shapes = [[int(word) for word in words.split(" ")[4:6]] for words in others]
    return sum(rows for rows, _ in shapes), shapes[0][1]


@torch.library.impl(_LIBRARY, "product", "CompositeExplicitAutograd")
def _run_product(
    x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], others: Sequence[str], transposed: bool
) -> Tensor:
    from spectral_surgery.matmul.operator import form_matmul, form_matmul_transposed

    return (form_matmul_transposed if transposed else form_matmul)(x, _forms(tensors, others), bias)


@torch.library.impl(_LIBRARY, "rows", "CompositeExplicitAutograd")
def _run_rows(ids: Tensor, tensors: Sequence[Tensor], others: Sequence[str]) -> Tensor:
    from spectral_surgery.matmul.look_up import rows_of

    return rows_of(ids, _forms(tensors, others))


def _fake_product(
    x: Tensor, _bias: Tensor | None, _tensors: Sequence[Tensor], others: Sequence[str], transposed: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _shape(others)[int(transposed)]))


def _fake_rows(ids: Tensor, tensors: Sequence[Tensor], others: Sequence[str]) -> Tensor:
    return tensors[0].new_empty((*ids.shape, _shape(others)[1]), dtype=torch.float32, device=ids.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, bias, tensors, ctx.others, ctx.transposed = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    of_x = torch.ops.spectral_surgery.product(grad, None, tensors, ctx.others, not ctx.transposed)
    of_bias = None if ctx.bias is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias)
    return of_x, of_bias, [None] * len(tensors), None, None


torch.library.register_autograd("spectral_surgery::product", _gradients, setup_context=_keep, lib=_LIBRARY)
torch.library.register_fake("spectral_surgery::product", _fake_product, lib=_LIBRARY)
torch.library.register_fake("spectral_surgery::rows", _fake_rows, lib=_LIBRARY)
