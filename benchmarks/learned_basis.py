"""A matrix coded in the eigenbasis of its inputs, the basis quantised and counted.

With H = V Λ Vᵀ, W = C Vᵀ: errors in the columns of C count by their eigenvalue, so each column has a step in inverse
proportion to its square root, and those of small eigenvalues are dropped at low rates (reverse waterfilling). Columns
of like statistics are coded together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.codec.coding import choose_layout, encode_frame
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import Codes, feedback_codes, feedback_factor, output_error
from spectral_surgery.codec.rate import Quantizer, Target

BASIS_BITS = (4.0, 6.0)  # of an entry of the basis; the better one is taken
_GROUP = 32  # columns whose codes are one frame
_DEAD_ZONE = 0.55  # in steps
_DAMPING = 0.01
_ATTEMPTS = 12
_NEAR = 0.01  # of the bytes asked for


@dataclass(frozen=True)
class Coded:
    """A matrix in a learned basis.

    Attributes:
        stored_bytes: of codes, steps and basis.
        basis_bytes: of the basis alone.
        error: relative error of the outputs.
    """

    stored_bytes: int
    basis_bytes: int
    error: float


def in_eigenbasis(
    weight: Tensor, moment: Tensor, budget: int, *, basis_of: Tensor | None = None, free: bool = False
) -> Coded | None:
    """Code a matrix in the eigenbasis of H, at a size.

    Args:
        weight: W, [O, I] float32; the weights of all layers that share the inputs, stacked.
        moment: H, [I, I].
        budget: bytes for all.
        basis_of: [I, I], whose eigenvectors are taken; None for H.
        free: do not count the basis, and do not quantise it.

    Returns:
        The better of the precisions of the basis; None when none leaves room for codes.
    """
    turned = moment if basis_of is None else basis_of
    found = [_coded(weight, moment, turned, budget, bits) for bits in ((0.0,) if free else BASIS_BITS)]
    return min((own for own in found if own is not None), key=lambda own: own.error, default=None)


def _coded(weight: Tensor, moment: Tensor, turned: Tensor, budget: int, bits: float) -> Coded | None:
    ridge = _DAMPING * turned.diagonal().mean() * torch.eye(len(turned))
    vectors = torch.linalg.eigh((turned + ridge).double())[1].flip(1).float()
    size = 0
    if bits:
        stored, report = encode(vectors, Target("bits", bits), Basis("identity", 64, ()))
        size, vectors = report.stored_bytes, stored.to_dense()
    steps = 2 * len(moment)  # in float16
    if budget - size - steps < weight.numel() // 64:
        return None
    coefficients = torch.linalg.solve(vectors.double(), weight.double().T).T.float()
    turned = vectors.T @ moment @ vectors
    scale = turned.diagonal().clamp_min(_DAMPING * float(turned.diagonal().mean())).rsqrt().half().float()
    factor = feedback_factor(turned * scale * scale[:, None], Basis("identity", 64, ()))
    codes, coded = _at_bytes(coefficients / scale, factor, budget - size - steps)
    restored = (codes.coefficients() * scale) @ vectors.T
    return Coded(coded + size + steps, size, output_error(weight, restored, moment))


def _at_bytes(coefficients: Tensor, factor: Tensor, budget: int) -> tuple[Codes, int]:
    low, high = -12.0, 12.0  # powers of two of the step, relative to the coefficients
    unit = float(coefficients.square().mean().sqrt())
    level, best = 0.0, (Codes(torch.zeros_like(coefficients, dtype=torch.int32), unit), 0)
    for _ in range(_ATTEMPTS):
        step = unit * 2.0**level
        codes = feedback_codes(coefficients, factor, Quantizer(_DEAD_ZONE * step, step))
        size = _bytes(codes.values)
        if size <= budget:
            best, high = (codes, size), level
        else:
            low = level
        if (1 - _NEAR) * budget <= size <= budget:
            break
        guess = level + 12 * (size - (1 - _NEAR / 2) * budget) / coefficients.numel()
        level = guess if low < guess < high else (low + high) / 2
    return best


def _bytes(values: Tensor) -> int:
    total = 0
    for start in range(0, values.shape[1], _GROUP):
        flat = values[:, start : start + _GROUP].T.contiguous().reshape(-1).to(torch.int16).numpy()
        total += len(encode_frame(flat, choose_layout(flat))) + 8
    return total
