"""Scales refitted after the codes of a matrix are chosen, so that its outputs are closest: closed forms against H.

Source: the rescalers of WaterSIC (arXiv 2603.04956); each form is the least-squares solution for its own scales, so the
output error never grows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spectral_surgery.codec.feedback import Codes

_SWEEPS = 3  # of rows and columns in turn
_RIDGE = 1e-6  # of the mean of the diagonal


def refit_step(coefficients: Tensor, codes: Codes, moment: Tensor) -> Codes:
    """The same codes with the best step: tr(D H Dᵀ) is least, with D what the reconstruction misses.

    Args:
        coefficients: C, [O, I] float32.
        codes: of them.
        moment: H in the domain of the codes, [I, I].

    Returns:
        The codes; unchanged when they are all zero.
    """
    held = codes.coefficients().double()
    product = held @ moment.double()
    whole = float((product * held).sum())
    if not whole > 0:
        return codes
    return replace(codes, step=codes.step * float((product * coefficients).sum()) / whole)


def refit_rows_and_columns(coefficients: Tensor, held: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of rows and columns, each in turn the best for the other.

    Args:
        coefficients: C, [O, I] float32.
        held: what the codes of C stand for.
        moment: H in the domain of the codes, [I, I].

    Returns:
        ([O] scales of rows, [I] scales of columns, the scaled matrix [O, I] float32), scales rounded to float16.
    """
    wanted, held, moment = coefficients.double(), held.double(), moment.double()
    rows, columns = torch.ones(held.shape[0], dtype=torch.float64), torch.ones(held.shape[1], dtype=torch.float64)
    right = wanted @ moment
    for _ in range(_SWEEPS):
        own = held * columns
        whole = ((own @ moment) * own).sum(1)
        rows = torch.where(whole > 0, (right * own).sum(1) / whole.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        own = rows[:, None] * held
        system = (own.T @ own) * moment
        system.diagonal().add_(_RIDGE * system.diagonal().mean() + torch.finfo(torch.float64).tiny)
        columns = torch.linalg.solve(system, (right * own).sum(0))
    rows, columns = rows.half(), columns.half()
    return rows, columns, (rows.double()[:, None] * held * columns.double()).float()
