"""Quantising a matrix so that its outputs stay right: rounding errors are fed forward into later columns.

What counts is tr(D H Dᵀ), with D the error of the weight and H the second moment of the inputs. In an orthonormal basis
of the inputs, C = W Tᵀ and H' = T H Tᵀ, nothing changes, so the codes of the spectrum are chosen column by column, and
every column takes up what its predecessors left. Source: GPTQ (arXiv 2210.17323) and its entropy-coded form, with one
step for the matrix or one for each column (WaterSIC, arXiv 2603.04956), in the domain of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, EncodedSpectrum, EncodingReport, frame_spans
from spectral_surgery.codec.frames import encode_rows
from spectral_surgery.codec.parallel import parallel_map
from spectral_surgery.codec.quantized import dequantize
from spectral_surgery.codec.quantizers import Rounding
from spectral_surgery.errors import ConfigError, ShapeError

_BLOCK = 128  # columns between two updates of all the others
_ROWS = 512  # that share nothing with others: whole blocks of the lattice, worked on by one thread
_COLUMNS = 512  # of H, or rows of a weight, in double precision at once
_TRIANGLE = 256  # rows that are inverted at once
DAMPING = 0.05  # of the mean of the diagonal: directions that the text never took are not free; measured on two models


@dataclass(frozen=True)
class Codes:
    """Codes of a spectrum, and what they mean: ``sign(q) (|q| + offset) step``.

    Attributes:
        values: [O, I] int32.
        step: of the reconstruction points.
        offset: of the reconstruction points, in steps.
        columns: [I] float32, the step of each column as a multiple of ``step``; None for one step.
    """

    values: Tensor
    step: float
    offset: float = 0.0
    columns: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        """[1] float32; or [I], numbers of bfloat16, which is how they are stored."""
        return _steps(self.step, self.columns)

    @property
    def T(self) -> Codes:  # noqa: N802 - as tensors have it
        """Of the transposed spectrum. Raises ShapeError when every column has its own step: rows have none."""
        if self.columns is not None:
            raise ShapeError("transpose: every column has its own step; expected codes with one step.")
        return Codes(self.values.T.contiguous(), self.step, self.offset)

    def coefficients(self) -> Tensor:
        """[O, I] float32."""
        return dequantize(self.values, self.steps, self.offset)


def codes_of(values: Tensor, steps: Tensor, offset: float) -> Codes:
    """Codes with the steps that are stored for them, [1] or [I]."""
    one = steps.numel() == 1
    return Codes(values.to(torch.int32), float(steps) if one else 1.0, offset, None if one else steps)


def _steps(step: float, columns: Tensor | None) -> Tensor:
    return torch.tensor([step], dtype=torch.float32) if columns is None else (step * columns).bfloat16().float()


def feedback_factor(moment: Tensor, basis: Basis, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor of the inverse of H in the domain of the codes.

    Returns U, [I, I] float32, with H'⁻¹ = Uᵀ U.

    Args:
        moment: H = Xᵀ X, [I, I] of any scale, symmetric.
        damping: added to the diagonal, relative to its mean; columns that are never used get the mean.

    Raises:
        ShapeError: when H is not square.
        ConfigError: when H is not finite, or zero.
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ShapeError(f"moment: is {tuple(moment.shape)}; expected a square matrix.")
    mean = float(moment.diagonal().double().mean())
    if not mean > 0 or mean == float("inf"):
        raise ConfigError("moment: inputs are zero or not finite; expected some text that reaches this layer.")
    turned = Basis(basis.transform, basis.tile, (0, 1)).forward(moment) if 1 in basis.axes else moment.float()
    root = turned.clone() if turned.data_ptr() == moment.data_ptr() else turned
    root.div_(mean).diagonal().add_(damping)
    _factorize(root)
    _invert_upper(root)
    return root


def _factorize(matrix: Tensor) -> None:
    """The upper triangle R with R Rᵀ = H, in the place of H, [n, n] float32.

    A panel of columns is found in double precision, from the last one to the first. What is rounded on the way is small
    beside the damping, since no eigenvalue of H exceeds n times the mean of its diagonal. Raises
    torch.linalg.LinAlgError when H is not positive definite.
    """
    for stop in range(len(matrix), 0, -_TRIANGLE):
        start = max(stop - _TRIANGLE, 0)
        corner, above = matrix[start:stop, start:stop], matrix[:start, start:stop]
        root = torch.linalg.cholesky(corner.double().flip(0, 1)).flip(0, 1)
        panel = torch.linalg.solve_triangular(root.T, above.double(), upper=False, left=False)
        corner.copy_(root)
        above.copy_(panel)
        for row in range(0, start, _COLUMNS):
            end = min(row + _COLUMNS, start)
            matrix[row:end, row:start] -= (panel[row:end] @ panel[row:].T).float()
    matrix.triu_()


def _invert_upper(triangle: Tensor) -> None:
    """Invert an upper triangular matrix [n, n] with zeros below, in place: both halves, and what is between them."""
    if len(triangle) <= _TRIANGLE:
        identity = torch.eye(len(triangle), dtype=torch.float64, device=triangle.device)
        triangle.copy_(torch.linalg.solve_triangular(triangle.double(), identity, upper=True))
        return
    half = len(triangle) // 2
    upper, between, lower = triangle[:half, :half], triangle[:half, half:], triangle[half:, half:]
    _invert_upper(upper)
    _invert_upper(lower)
    torch.mm(upper, between @ lower, out=between).neg_()


def feedback_noise(moment: Tensor, basis: Basis) -> float:
    """What errors of variance one leave in the squared outputs when they are fed forward, a weight.

    Returns the mean over columns of the part of H' that those before it do not predict.

    Args:
        moment: H = Xᵀ X, [I, I].

    Raises:
        ShapeError, ConfigError: as `feedback_factor`.
    """
    diagonal = feedback_factor(moment, basis).diagonal().double()
    return float(diagonal.pow(-2).mean() * moment.diagonal().double().mean())


def step_shape(factor: Tensor, power: float) -> Tensor:
    """Steps of columns relative to each other: what a column loses weighs as much as in any other.

    A step s in column j costs s² / U_jj² in the outputs, and saves log s bits. With a coder of its own for each column,
    steps in proportion to U_jj were the best; with one coder for all, a lower power is. Returns [I] float32, with
    geometric mean 1.

    Args:
        factor: from `feedback_factor`.
    """
    logs = factor.diagonal().log() * power
    return (logs - logs.mean()).exp()


def feedback_codes(
    coefficients: Tensor,
    factor: Tensor,
    rounding: Rounding,
    offset: float = 0.0,
    columns: Tensor | None = None,
    *,
    threads: int = 1,
) -> Codes:
    """Codes of a spectrum, chosen column by column.

    Args:
        coefficients: C, [O, I] float32; not changed.
        factor: from `feedback_factor`.
        rounding: quantiser, with its step.
        offset: of the reconstruction points, in steps.
        columns: [I] multiples of the step for each column; None for ones.
        threads: groups of rows worked on at once; the result does not depend on it.
    """
    steps = _steps(rounding.step, columns).expand(coefficients.shape[1]).contiguous()
    codes = torch.empty(coefficients.shape, dtype=torch.int32)

    def feed(span: tuple[int, int]) -> None:
        rest, out = coefficients[slice(*span)].clone(), codes[slice(*span)]
        for start in range(0, rest.shape[1], _BLOCK):
            part = slice(start, min(start + _BLOCK, rest.shape[1]))
            square = factor[part, part].contiguous()
            out[:, part], errors = rounding.feed(rest[:, part].contiguous(), square, steps[part], offset)
            rest[:, part.stop :].addmm_(errors, factor[part, part.stop :], alpha=-1)

    parallel_map(feed, frame_spans(len(coefficients), _ROWS), threads)
    return Codes(codes, rounding.step, offset, columns)


def output_error(weight: Tensor, restored: Tensor, moment: Tensor) -> float:
    """Relative error of the outputs: sqrt(tr(D H Dᵀ) / tr(W H Wᵀ)); 0 for zero outputs.

    Args:
        weight: W, [O, I].
        restored: of the same shape.
        moment: H, [I, I].
    """
    whole = lost = 0.0
    for rows, kept in zip(torch.split(weight, _COLUMNS), torch.split(restored, _COLUMNS), strict=True):
        exact, difference = rows.double(), rows.double() - kept
        for start in range(0, len(moment), _COLUMNS):
            moments, columns = moment[:, start : start + _COLUMNS].double(), slice(start, start + _COLUMNS)
            whole += float(((exact @ moments) * exact[:, columns]).sum())
            lost += float(((difference @ moments) * difference[:, columns]).sum())
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def stored_codes(codes: Codes, basis: Basis, *, threads: int = 1, verify: bool = True) -> EncodedSpectrum:
    """The stored form of codes that were chosen elsewhere.

    Args:
        threads: frames worked on at once; the result does not depend on it.
        verify: as for `encode_rows`.
    """
    height, frames = encode_rows(codes.values, basis.tile, threads=threads, verify=verify)
    rows, columns = codes.values.shape
    return EncodedSpectrum(frames, (rows, columns), height, codes.steps, codes.offset, basis)


def encode_codes(
    coefficients: Tensor, codes: Codes, basis: Basis, *, threads: int = 1
) -> tuple[EncodedSpectrum, EncodingReport]:
    """Store codes that were chosen elsewhere, and measure them by decoding what is stored.

    Returns the stored form, and its report.

    Args:
        coefficients: [O, I] float32, what the codes stand for.
        threads: frames worked on at once; the result does not depend on it.
    """
    encoded = stored_codes(codes, basis, threads=threads)
    spans = frame_spans(len(codes.values), encoded.rows_per_frame)

    def measured(frame: int) -> tuple[float, float, float]:
        exact, values = (whole[slice(*spans[frame])] for whole in (coefficients, codes.values))
        held = dequantize(values, encoded.step, codes.offset)
        return _energy(exact), _energy(exact - held), _energy(held)

    energies = parallel_map(measured, range(len(spans)), threads)
    kept = int(torch.count_nonzero(codes.values))
    whole, lost, stored_energy = (sum(column) for column in zip(*energies, strict=True))
    return encoded, EncodingReport(codes.values.numel(), encoded.stored_bytes, kept, whole, lost, stored_energy)


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
