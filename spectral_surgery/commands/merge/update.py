"""What adapters make of a stored tensor: s (W + Δ), with Δ from rows of the updates of parameters.

A stored tensor may hold rows of several parameters, and a parameter may lie in several stored tensors, as stacked
experts do: updates are computed row by row where they can be.
Source: PEFT 0.21.2, `tuners/lora/layer.py` (ParamWrapper), `tuners/lora/variants.py` (DoRA).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from spectral_surgery.adapters.base import Adapter, AdapterState
from spectral_surgery.errors import NotMergeableError
from spectral_surgery.files.merge_record import Source
from spectral_surgery.hf.tensor_names import as_rows, rows_of


@dataclass(frozen=True)
class Change:
    """W becomes scale (W + delta).

    Attributes:
        delta: of the shape of W, float64.
        scale: float64, broadcasts to it; None for 1.
        factors: of every DoRA in it, by which it cannot be computed again from the result.
    """

    delta: Tensor
    scale: Tensor | None = None
    factors: tuple[Tensor, ...] = ()


def change_of(
    sources: Sequence[Source],
    states: Mapping[int, AdapterState],
    weights: Sequence[float],
    shape: Sequence[int],
    *,
    base: Tensor | None = None,
    factors: Sequence[Tensor] = (),
) -> Change:
    """The sum of the updates of a stored tensor, adapter after adapter as PEFT merges them.

    Args:
        base: the tensor before; only DoRA needs it, once.
        factors: those of `Change`, instead of base.

    Raises:
        NotMergeableError: when an adapter is not one weight update.
    """
    total: Tensor | None = None
    scale: Tensor | None = None
    known, used = iter(factors), []
    for source in sources:
        state, resolved = states[source.number], source.resolved(shape)
        delta = _placed(state, resolved, shape).mul_(weights[resolved.number])
        part = delta if scale is None else delta / scale
        total = part if total is None else total + part
        magnitude = state.layers[resolved.layer].get("magnitude")
        if magnitude is None or len(resolved.shape) == 1:
            continue
        factor = next(known, None) if base is None else _factor(state, resolved, magnitude, base, delta)
        if factor is None:
            raise NotMergeableError(
                f"{resolved.layer}: expected the file that merge wrote, got a record that lacks a factor of DoRA."
            )
        used.append(factor)
        spread = _spread(state, resolved, factor, shape)
        scale = spread if scale is None else scale * spread
    return Change(cast(Tensor, total), scale, tuple(used))


def factor_sizes(
    sources: Sequence[Source], states: Mapping[int, AdapterState], shape: Sequence[int]
) -> tuple[int, ...]:
    """How many numbers each of `Change.factors` has."""
    resolved = [source.resolved(shape) for source in sources]
    rows = [
        (states[source.number], source)
        for source in resolved
        if "magnitude" in states[source.number].layers[source.layer]
    ]
    return tuple(_factor_size(state, source) for state, source in rows if len(source.shape) > 1)


def update_rows(state: AdapterState, source: Source, start: int, count: int) -> Tensor:
    """Rows of the update of a parameter, laid out as the parameter is.

    Args:
        source: its layer, and the shape of the parameter.
        start: the first row of the matrix [numel / columns, columns], where columns are the last dimension.

    Returns:
        [count, columns] float64.

    Raises:
        NotMergeableError: when the adapter is not one weight update.
    """
    tensors, shape = state.layers[source.layer], source.shape
    lora = state.spec.method.peft_type == "LORA"
    settings = state.spec.config.for_layer(source.layer)
    scaling = settings.lora_alpha / settings.r if lora else 1.0
    if len(shape) == 1:
        return scaling * tensors["bias"].double()[start : start + count, None]
    if lora and len(shape) == 3 and source.layer not in state.kernels:
        return torch.cat(list(_expert_rows(tensors, source, start, count))).mul_(scaling)
    if lora:
        up, down = tensors["B"].double(), tensors["A"].double()
        left, right = (down.T, up.T) if source.transposed else (up, down)
        per_row = rows_of(shape) // len(left)
        first, last = start // per_row, -(-(start + count) // per_row)
        rows = (left[first:last] * scaling @ right).reshape(-1, shape[-1])
        return rows[start - first * per_row :][:count]
    with torch.no_grad():
        adapter = copy.deepcopy(state.build(source.layer, *source.out_in)).double()
        delta = cast(Adapter, adapter).delta_weight().double()
    return as_rows((delta.T if source.transposed else delta).reshape(shape))[start : start + count]


def _expert_rows(tensors: Mapping[str, Tensor], source: Source, start: int, count: int) -> Iterator[Tensor]:
    """Rows of stacked experts: A [E R, I] is expert after expert, B [O, R E] has the expert as its last index."""
    experts, height, _ = source.shape
    down = tensors["A"].double().reshape(experts, -1, tensors["A"].shape[1])  # [E, R, I]
    up = tensors["B"].double().reshape(len(tensors["B"]), -1, experts)  # [O, R, E]
    for expert in range(start // height, -(-(start + count) // height)):
        left, right = up[..., expert], down[expert]
        left, right = (right.T, left.T) if source.transposed else (left, right)
        first, last = max(start - expert * height, 0), min(start + count - expert * height, height)
        yield left[first:last] @ right


def _placed(state: AdapterState, source: Source, shape: Sequence[int]) -> Tensor:
    """The update, in the rows of the stored tensor that it changes: of shape, float64."""
    turned = (*shape[:-2], shape[-1], shape[-2]) if source.turned else tuple(shape)
    if source.spans == ((0, 0, rows_of(turned)),):
        whole = update_rows(state, source, 0, rows_of(turned)).reshape(turned)
        return whole.mT if source.turned else whole
    placed = torch.zeros(turned, dtype=torch.float64)
    matrix = as_rows(placed)
    for row, stored, count in source.spans:
        matrix[stored : stored + count] = update_rows(state, source, row, count)
    return placed.mT if source.turned else placed


def _factor(state: AdapterState, source: Source, magnitude: Tensor, base: Tensor, delta: Tensor) -> Tensor:
    """What the rows of a DoRA, or the columns of an embedding, are multiplied by: m / ‖W + ΔW‖."""
    summed = base.double() + delta
    _check_whole(state, source, summed.shape)
    if source.layer in state.embeddings or source.transposed:
        return magnitude.double() / _norm(summed, 0)
    if _is_whole(source, summed.shape):
        return magnitude.double() / _norm(summed.flatten(1), 1)
    parts = [
        magnitude.double()[row : row + count] / _norm(summed[stored : stored + count], 1)
        for row, stored, count in source.spans
    ]
    return torch.cat(parts)


def _norm(matrix: Tensor, along: int) -> Tensor:
    return matrix.square().sum(along).sqrt()


def _spread(state: AdapterState, source: Source, factor: Tensor, shape: Sequence[int]) -> Tensor:
    """Factors in a shape that broadcasts to that of the stored tensor."""
    if source.layer in state.embeddings or source.transposed:
        return factor[None]
    if _is_whole(source, shape):
        return factor.reshape(-1, *(1,) * (len(shape) - 1))
    spread = torch.ones(shape[0], 1, dtype=torch.float64)
    parts = factor.split([count for _, _, count in source.spans])
    for (_, stored, count), part in zip(source.spans, parts, strict=True):
        spread[stored : stored + count, 0] = part
    return spread


def _factor_size(state: AdapterState, source: Source) -> int:
    if source.layer in state.embeddings or source.transposed or len(source.shape) > 2:
        return state.layers[source.layer]["magnitude"].numel()
    return sum(count for _, _, count in source.spans)


def _is_whole(source: Source, shape: Sequence[int]) -> bool:
    return source.spans == ((0, 0, rows_of(shape)),) and source.shape == tuple(shape)


def _check_whole(state: AdapterState, source: Source, shape: Sequence[int]) -> None:
    rowwise = len(source.shape) == 2 and source.layer not in state.embeddings and not source.transposed
    if source.turned or not (rowwise or _is_whole(source, shape)):
        raise NotMergeableError(
            f"{source.layer}: expected a weight stored whole for an adapter with DoRA, got parts that do not hold"
            " what a norm is taken over. Merge it with PEFT."
        )
