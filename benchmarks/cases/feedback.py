"""How far calibrated codes are from the bound: Gaussian weights, and inputs whose moments fall as 1/f.

With H the second moment of the inputs, no code of R bits leaves outputs with a relative error below
``sqrt(g / m) 2^-R`` at high rates, g and m being the geometric and the arithmetic mean of the eigenvalues of H. Bits
are the entropy of the codes, given the words of the lattice, so steps of columns and tables are not in them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.case import Row, require
from benchmarks.cases.coding import information_of
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import Codes, feedback_factor, output_error, stored_codes
from spectral_surgery.codec.feedback_rate import codes_at
from spectral_surgery.codec.quantizers import QUANTIZERS

GAPS = {3.8: 0.14, 2.8: 0.14, 2.0: 0.16, 1.4: 0.19}  # of the lattice, in bits, at most
DAMPING = 0.01  # of the mean of the diagonal of H, in the codes and in the bound
_ROWS, _COLUMNS = 2048, 256
_BASIS = Basis("identity", 64)


def run(quick: bool) -> list[Row]:
    """Entropy, output error and gap at each rate, for each quantiser."""
    weight = torch.randn(_ROWS // 4 if quick else _ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0))
    moment = falling_moment(_COLUMNS)
    return [_row(name, bits, weight, moment) for name in QUANTIZERS for bits in GAPS]


def falling_moment(columns: int) -> Tensor:
    """H with eigenvalues in proportion to 1, 1/2, 1/3, ...: [I, I] float64, of mean diagonal 1 before it is damped."""
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    moment: Tensor = (turn / torch.arange(1, columns + 1)) @ turn.T
    moment = (moment + moment.T) / (2 * moment.diagonal().mean())
    return moment + DAMPING * torch.eye(columns, dtype=torch.float64)


def gap(codes: Codes, weight: Tensor, moment: Tensor) -> tuple[float, float, float]:
    """Entropy of codes in bits a weight, relative error of the outputs, and bits above the bound.

    Raises:
        CheckFailedError: when other codes come back from what is stored.
    """
    back = stored_codes(codes, _BASIS).decode().codes
    require(torch.equal(back.to(torch.int32), codes.values), "other codes came back than were stored")
    entropy = information_of(codes.values.numpy()) / codes.values.numel()
    error = output_error(weight, codes.coefficients(), moment)
    spectrum = torch.linalg.eigvalsh(moment)
    bound = 0.5 * math.log2(float(spectrum.log().mean().exp() / spectrum.mean()))
    return entropy, error, entropy + math.log2(error) - bound


def _row(name: str, bits: float, weight: Tensor, moment: Tensor) -> Row:
    factor = feedback_factor((moment - DAMPING * torch.eye(len(moment))).float(), _BASIS, DAMPING)
    entropy, error, above = gap(codes_at(weight, factor, bits, _BASIS, quantizer=name), weight, moment)
    aimed = name == "lattice"
    return {
        "quantiser": name,
        "bits asked": bits,
        "entropy": entropy,
        "output error": error,
        "bits above the bound": above,
        "target": f"<= {GAPS[bits]}" if aimed else "",
        "met": above <= GAPS[bits] if aimed else "",
    }
