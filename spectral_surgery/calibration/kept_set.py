"""Which coefficients of a matrix to keep, and what they become, so that its outputs stay right on some text.

What counts is tr(D H Dᵀ), with D the error of the coefficients and H the second moment of the inputs in their domain.
Alternating directions (ADMM, Boyd et al., 2011; for pruning: Meng et al., arXiv 2406.07831) look for the kept set: one
side solves for coefficients that are dense and near to the kept ones, the other keeps the largest of these. Conjugate
gradients then find the values of what is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import Codes
from spectral_surgery.codec.importance import threshold_at

_DAMPING = 0.01  # of the mean of the diagonal
_PENALTIES = 0.03, 0.1, 0.3, 1.0  # in units of the diagonal, each for some rounds: the kept set settles
_ROUNDS = 6
_SOLVING = 20  # steps of conjugate gradients; their error is then far below that of what is dropped
_CHUNK = 8192  # rows at a time
_ROUNDING_SHARE = 0.1  # of what dropping costs, is what rounding may cost: 0.025 takes 0.2 bits more, for 1 % less loss
_ROUNDING_FLOOR = 1e-4  # of the mean square of what is kept


def kept_codes(coefficients: Tensor, moment: Tensor, density: float, rows: Tensor | None = None) -> Codes:
    """Codes of the best kept set, none of them zero, with a step so fine that rounding costs little.

    Args:
        coefficients: C, [O, I] float32.
        moment: H, [I, I] float32 of any scale, in the domain of the coefficients; see `in_domain`.
        density: the fraction to keep.
        rows: [O] float32, positive: what an error of each row counts; None where all count the same.
    """
    weights = torch.ones(len(coefficients)) if rows is None else rows
    values = (
        keep_best(coefficients, moment, density) if rows is None else _kept_rows(coefficients, moment, density, rows)
    )
    dropped, kept = 0.0, float(weights.double() @ ((values != 0).float() @ moment.diagonal()).double())
    for start in range(0, len(values), _CHUNK):
        part = slice(start, start + _CHUNK)
        lost = coefficients[part] - values[part]
        dropped += float(((lost @ moment) * lost).sum(1).double() @ weights[part].double())
    if not kept > 0:
        return Codes(torch.zeros(values.shape, dtype=torch.int32), 1.0)
    floor = _ROUNDING_FLOOR * float(values.square().sum() / torch.count_nonzero(values))  # where nothing is dropped
    step = math.sqrt(12 * max(_ROUNDING_SHARE * dropped / kept, floor))  # rounding leaves step²/12
    levels = (values.abs() / step).round().clamp_(min=1).copysign(values)
    return Codes(torch.where(values != 0, levels, 0.0).to(torch.int32), step)


def _kept_rows(coefficients: Tensor, moment: Tensor, density: float, rows: Tensor) -> Tensor:
    """The same as `keep_best` where rows count differently, some of them at a time.

    How many coefficients a group of rows has is decided by one threshold on what each costs by itself.
    """
    scale, roots = _scaled(moment)[0], rows.sqrt()[:, None]
    starts = range(0, len(coefficients), _CHUNK)
    groups = [slice(start, start + _CHUNK) for start in starts]

    def costs(group: slice) -> Tensor:
        return (coefficients[group] * roots[group] * scale).square()

    threshold = threshold_at((costs(group) for group in groups), density).threshold
    values = torch.zeros_like(coefficients)
    for group in groups:
        kept = float((costs(group) >= threshold).float().mean())
        values[group] = keep_best(coefficients[group] * roots[group], moment, kept) / roots[group]
    return values


def keep_best(coefficients: Tensor, moment: Tensor, density: float) -> Tensor:
    """The coefficients [O, I] float32 with all but a fraction at zero, and the others changed to make up for that.

    Args:
        coefficients: C, [O, I] float32.
        moment: H, [I, I], as for `kept_codes`.
        density: the fraction to keep.
    """
    if not torch.count_nonzero(coefficients):
        return coefficients
    scale, whole = _scaled(moment)
    wanted = coefficients * scale
    kept = _largest(wanted, density)
    place, price = wanted * kept, torch.zeros_like(wanted)
    before = _PENALTIES[0]
    for penalty in _PENALTIES:
        near = torch.linalg.inv(whole + penalty * torch.eye(len(whole)))
        price *= before / penalty
        before = penalty
        for _ in range(_ROUNDS):
            # the dense side: C H + penalty (place - price), over H + penalty
            dense = wanted + penalty * (place - price - wanted) @ near
            kept = _largest(dense + price, density)
            place = (dense + price) * kept
            price += dense - place
    return _solved(place, wanted, whole, kept) / scale


def in_domain(moment: Tensor, basis: Basis) -> Tensor:
    """H of inputs as H of the coefficients."""
    return Basis(basis.transform, basis.tile, (0, 1)).forward(moment) if 1 in basis.axes else moment.float()


def _scaled(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The root of the damped diagonal, [I], and H in units of it: a coefficient then counts by its square."""
    damped = moment.clone()
    mean = float(moment.diagonal().mean())
    damped.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)  # inputs that are zero: the largest are kept
    scale = damped.diagonal().sqrt()
    return scale, damped / (scale[:, None] * scale)


def _largest(values: Tensor, density: float) -> Tensor:
    """Where the largest of all entries are."""
    sizes, count = values.abs(), round(density * values.numel())
    if count >= sizes.numel():
        return torch.ones_like(values, dtype=torch.bool)
    edge = sizes.flatten().kthvalue(sizes.numel() - count).values
    return sizes > edge


def _solved(start: Tensor, wanted: Tensor, whole: Tensor, kept: Tensor) -> Tensor:
    """The kept entries that leave the least error, by conjugate gradients of all rows at once."""
    values = start.clone()
    residual = ((wanted - values) @ whole) * kept
    direction, power = residual.clone(), residual.square().sum(1, keepdim=True)
    for _ in range(_SOLVING):
        turned = (direction @ whole) * kept
        length = power / (direction * turned).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        values += length * direction
        residual -= length * turned
        before, power = power, residual.square().sum(1, keepdim=True)
        direction = residual + power / before.clamp_min(torch.finfo(torch.float32).tiny) * direction
    return values
