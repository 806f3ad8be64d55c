"""Where the coefficients of a spectrum meet the halves of spectra that real FFTs compute.

With X = rfft(x), a coefficient at (r, q) adds c Re(e^{2πi r o / O} X[-q]) to output o, and (-r, -q) does the same. So
each is taken at that one of the two places whose column lies in the half of X that exists, and its row, where it is not
in the half that an inverse real FFT reads, is mirrored, at the price of a conjugation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Folded places of K coefficients.

    Attributes:
        indices: [8, K] int64. Rows 0-2 for x -> y: order of the coefficients, bin of x, bin of y, sorted by the last;
            3-5 for dy -> dx: order, bin of dy, bin of dx, sorted likewise; 6-7 for `short_dft`: bin of x, bin of y.
        factors: [3, K, 2] float32: what to multiply the real and the imaginary part by, for each of the three.
    """

    indices: Tensor
    factors: Tensor


# the arguments of an operator that make a Delta
SCHEMA = "Tensor coefficients, Tensor indices, Tensor factors, int out_features, int in_features, float scaling"


class Delta(NamedTuple):
    """A weight update ΔW [O, I].

    Attributes:
        coefficients: [K] real.
        places: where they are.
        shape: (O, I).
        scaling: as in `reference.delta_weight`.
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
    """Fold positions.

    Args:
        positions: [K] integers, row * I + column.
        out_features: O.
        in_features: I.

    Returns:
        Places on the device of the positions.
    """
    positions = positions.long()
    rows, columns = positions // in_features, positions % in_features
    row, column, sign = _halves(rows, columns, (out_features, out_features), (in_features, in_features))
    into_y, into_x = row.argsort(stable=True), column.argsort(stable=True)
    short_row, short_column, short_sign = _halves(
        rows, columns, (out_features, factor(out_features)), (in_features, factor(in_features))
    )
    indices = torch.stack(
        (into_y, column[into_y], row[into_y], into_x, row[into_x], column[into_x], short_column, short_row)
    )
    factors = torch.stack(
        (
            _parts(sign * share(row, out_features))[into_y],
            _parts(sign * share(column, in_features))[into_x],
            _parts(short_sign),
        )
    )
    return Places(indices, factors)


def unfolded_rows(delta: Delta) -> Tensor:
    """Rows of the spectrum, [K] int64, to go with the bins of x and in the order of `Places.indices[0]`."""
    row = delta.places.indices[2]
    return torch.where(delta.places.factors[0, :, 1] < 0, -row % delta.shape[0], row)


@lru_cache(maxsize=256)
def factor(length: int) -> int:
    """The divisor a of a length next to its square root, from above: `short_dft` splits it into a and length / a."""
    root = next(b for b in range(int(length**0.5), 0, -1) if length % b == 0)
    return length // root


def _halves(
    rows: Tensor, columns: Tensor, out_split: tuple[int, int], in_split: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    # bins of the halves, and -1 where the row had to be mirrored; a split (n, a) keeps k with k mod a <= a / 2
    (out_features, out_first), (in_features, in_first) = out_split, in_split
    columns = -columns % in_features
    flip = columns % in_first > in_first // 2
    columns = torch.where(flip, -columns % in_features, columns)
    rows = torch.where(flip, -rows % out_features, rows)
    mirrored = rows % out_first > out_first // 2
    rows = torch.where(mirrored, -rows % out_features, rows)
    sign = 1.0 - 2.0 * mirrored.float()
    return _bin(rows, out_first), _bin(columns, in_first), sign


def _bin(frequencies: Tensor, first: int) -> Tensor:
    return frequencies // first * (first // 2 + 1) + frequencies % first


def share(bins: Tensor, length: int) -> Tensor:
    """What to multiply bins by, since an inverse real FFT counts all twice but the first and an even length's last.

    Args:
        bins: [K] int64.
        length: of the signal.

    Returns:
        [K] float32: 1 or 1/2.
    """
    return torch.where((bins == 0) | (2 * bins == length), 1.0, 0.5)


def _parts(signs: Tensor) -> Tensor:
    return torch.stack((signs.abs(), signs), -1)
