"""Where the coefficients of a spectrum meet the halves of spectra that real FFTs compute.

With X = rfft(x), a coefficient at (r, q) adds c Re(e^{2πi r o / O} X[-q]) to output o, and (-r, -q) does the same. So
each is taken at that one of the two places whose column lies in the half of X that exists, and its row, where it is not
in the half that an inverse real FFT reads, is mirrored, at the price of a conjugation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Folded places of K coefficients.

    Attributes:
        indices: [6, K] int64. Rows 0-2 for x -> y: order of the coefficients, bin of x, bin of y, sorted by the last;
            3-5 for dy -> dx: order, bin of dy, bin of dx, sorted likewise.
        factors: [2, K, 2] float32: what to multiply the real and the imaginary part by, for each of the two.
    """

    indices: Tensor
    factors: Tensor


class Delta(NamedTuple):
    """A weight update ΔW [O, I].

    Attributes:
        coefficients: [K] real.
        places: where they are.
        shape: (O, I).
    """

    coefficients: Tensor
    places: Places
    shape: tuple[int, int]
    scaling: float

    @property
    def scale(self) -> float:
        """Of the sums over coefficients: scaling / (O I)."""
        return self.scaling / (self.shape[0] * self.shape[1])


def fold(positions: Tensor, out_features: int, in_features: int) -> Places:
    """Fold positions. Returns places on the device of the positions.

    ``positions`` is [K] integers, row * I + column.
    """
    positions = positions.long()
    rows, columns = positions // in_features, -positions % in_features
    row, column, sign = halves(rows, columns, out_features, in_features)
    into_y, into_x = row.argsort(stable=True), column.argsort(stable=True)
    y_factors, x_factors = share(row, out_features)[into_y], share(column, in_features)[into_x]
    return Places(
        torch.stack((into_y, column[into_y], row[into_y], into_x, row[into_x], column[into_x])),
        torch.stack((_parts(y_factors, sign[into_y]), _parts(x_factors, sign[into_x]))),
    )


def halves(rows: Tensor, columns: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fold frequencies into the halves that are kept, up to half of a length.

    Returns rows, columns, and [K] float32 signs, -1 where a row was mirrored alone. ``rows`` is [K] int64, frequencies
    of y; ``columns`` is [K] int64, frequencies of x.
    """
    both = columns > in_features // 2
    rows, columns = torch.where(both, -rows % out_features, rows), torch.where(both, -columns % in_features, columns)
    mirrored = rows > out_features // 2
    return torch.where(mirrored, -rows % out_features, rows), columns, 1.0 - 2.0 * mirrored.float()


def unfolded_rows(places: Places, out_features: int) -> Tensor:
    """Rows of the spectrum, [K] int64, to go with the bins of x and in the order of ``indices[0]``."""
    row = places.indices[2]
    return torch.where(places.factors[0, :, 1] < 0, -row % out_features, row)


def share(bins: Tensor, length: int) -> Tensor:
    """What to multiply bins by, since an inverse real FFT counts all twice but the first and an even length's last.

    Returns [K] float32: 1 or 1/2. ``bins`` is [K] int64.
    """
    return torch.where((bins == 0) | (2 * bins == length), 1.0, 0.5)


def _parts(factors: Tensor, signs: Tensor) -> Tensor:
    return torch.stack((factors, factors * signs), -1)
