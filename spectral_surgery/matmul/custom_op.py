"""Products and look-ups as one operator each, for torch.compile: a compiled model has no break at a layer.

Forms cannot be arguments of an operator. They go in as their tensors, and the rest of them as words and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.coded import CodedForm
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.host_offload import HostMatrix, StreamedForm
from spectral_surgery.matmul.int4 import Int4Form
from spectral_surgery.matmul.int5 import Int5Form
from spectral_surgery.matmul.int8 import Int8Form
from spectral_surgery.matmul.int12 import Int12Form

Flat = tuple[list[Tensor], list[str], list[int]]

_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (CodedForm, Int4Form, Int5Form, Int8Form, Int12Form, StreamedForm)
}
_TENSORS = {  # in the order of the fields; then come the basis, and a size or columns
    "CodedForm": ("data", "ends", "scale", "row_scale", "offset", "starts"),
    "Int4Form": ("codes", "scale", "row_scale", "grid", "places", "beyond"),
    "Int5Form": ("codes", "lowest", "scale", "row_scale", "grid", "places", "beyond"),
    "Int8Form": ("codes", "scale", "row_scale", "places", "beyond"),
    "Int12Form": ("codes", "nibbles", "scale", "row_scale", "grid", "places", "beyond"),
    "StreamedForm": ("scale", "row_scale", "grid", "places", "beyond"),
}
_NUMBERS = 5  # of a form: rows, columns, tile, and whether rows and columns are transformed

_LIBRARY = torch.library.Library("spectral_surgery", "DEF")
_LIBRARY.define(
    "product(Tensor x, Tensor? bias, Tensor[] tensors, str[] words, int[] numbers, bool transposed) -> Tensor"
)
_LIBRARY.define("rows(Tensor ids, Tensor[] tensors, str[] words, int[] numbers) -> Tensor")


def product(x: Tensor, forms: Sequence[Form], bias: Tensor | None, *, transposed: bool) -> Tensor:
    """`form_matmul`, or `form_matmul_transposed`, as an operator."""
    tensors, words, numbers = _flat(forms)
    y: Tensor = torch.ops.spectral_surgery.product(x, bias, tensors, words, numbers, transposed)
    return y


def rows(ids: Tensor, forms: Sequence[Form]) -> Tensor:
    """`SpectralWeight.rows` as an operator."""
    tensors, words, numbers = _flat(forms)
    found: Tensor = torch.ops.spectral_surgery.rows(ids, tensors, words, numbers)
    return found


def _flat(forms: Sequence[Form]) -> Flat:
    tensors: list[Tensor] = []
    words: list[str] = []
    numbers: list[int] = []
    for form in forms:
        kind, basis = type(form).__name__, form.basis
        if isinstance(form, StreamedForm):
            tensors.append(form.host.codes)
        tensors += [getattr(form, name) for name in _TENSORS[kind]]
        words += [kind, basis.transform]
        numbers += [*form.shape, basis.tile, int(0 in basis.axes), int(1 in basis.axes)]
    return tensors, words, numbers


def _forms(tensors: Sequence[Tensor], words: Sequence[str], numbers: Sequence[int]) -> list[Form]:
    """The inverse of `_flat`."""
    forms, given = [], iter(tensors)
    for number in range(len(words) // 2):
        kind, transform = words[2 * number : 2 * number + 2]
        height, columns, tile, by_rows, by_columns = numbers[_NUMBERS * number : _NUMBERS * (number + 1)]
        axes = tuple(axis for axis, there in ((0, by_rows), (1, by_columns)) if there)
        first = [HostMatrix(next(given))] if kind == "StreamedForm" else []
        fields = [*first, *(next(given) for _ in _TENSORS[kind]), Basis(transform, tile, axes)]
        if kind not in ("Int8Form", "Int12Form"):
            fields.append((height, columns) if kind == "CodedForm" else columns)
        forms.append(_KINDS[kind](*fields))
    return forms


def _shape(numbers: Sequence[int]) -> tuple[int, int]:
    """(O, I) of all forms together."""
    return sum(numbers[::_NUMBERS]), numbers[1]


@torch.library.impl(_LIBRARY, "product", "CompositeExplicitAutograd")
def _run_product(  # noqa: PLR0917 (as the operator has them)
    x: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    words: Sequence[str],
    numbers: Sequence[int],
    transposed: bool,
) -> Tensor:
    from spectral_surgery.matmul.operator import form_matmul, form_matmul_transposed

    return (form_matmul_transposed if transposed else form_matmul)(x, _forms(tensors, words, numbers), bias)


@torch.library.impl(_LIBRARY, "rows", "CompositeExplicitAutograd")
def _run_rows(ids: Tensor, tensors: Sequence[Tensor], words: Sequence[str], numbers: Sequence[int]) -> Tensor:
    from spectral_surgery.matmul.look_up import rows_of

    return rows_of(ids, _forms(tensors, words, numbers))


def _fake_product(
    x: Tensor,
    _bias: Tensor | None,
    _tensors: Sequence[Tensor],
    _words: Sequence[str],
    numbers: Sequence[int],
    transposed: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _shape(numbers)[int(transposed)]))


def _fake_rows(ids: Tensor, tensors: Sequence[Tensor], _words: Sequence[str], numbers: Sequence[int]) -> Tensor:
    return tensors[0].new_empty((*ids.shape, _shape(numbers)[1]), dtype=torch.float32, device=ids.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, bias, tensors, ctx.words, ctx.numbers, ctx.transposed = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    of_x = torch.ops.spectral_surgery.product(grad, None, tensors, ctx.words, ctx.numbers, not ctx.transposed)
    of_bias = None if ctx.bias is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias)
    return of_x, of_bias, [None] * len(tensors), None, None, None


torch.library.register_autograd("spectral_surgery::product", _gradients, setup_context=_keep, lib=_LIBRARY)
torch.library.register_fake("spectral_surgery::product", _fake_product, lib=_LIBRARY)
torch.library.register_fake("spectral_surgery::rows", _fake_rows, lib=_LIBRARY)
