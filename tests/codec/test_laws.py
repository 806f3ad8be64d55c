"""Laws that relate one encoding to another: of a scaled matrix, of what was encoded, and with nothing calibrated."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum
from spectral_surgery.codec.feedback import feedback_codes, feedback_factor
from spectral_surgery.codec.quantizers import QUANTIZERS
from spectral_surgery.codec.quantizers.lattice import LatticePoints
from spectral_surgery.codec.quantizers.scalar import DeadZone
from spectral_surgery.codec.rate import Target
from spectral_surgery.transforms import TRANSFORMS

Kind = Literal["bits", "max_error", "density"]
SIDES = st.integers(1, 50)
BASES = st.builds(
    Basis, st.sampled_from(list(TRANSFORMS)), st.sampled_from([4, 16, 64]), st.sampled_from([(0, 1), (1,), (0,), ()])
)
# kind of target, value, quantiser; a density is kept by the scalar one alone
ASKED = st.one_of(
    st.tuples(st.just("bits"), st.floats(0.6, 7), st.sampled_from(list(QUANTIZERS))),
    st.tuples(st.just("max_error"), st.floats(0.005, 0.9), st.sampled_from(list(QUANTIZERS))),
    st.tuples(st.just("density"), st.floats(0.01, 1), st.just("scalar")),
)


def noise(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def frames(encoded: EncodedSpectrum) -> list[bytes]:
    return [bytes(frame) for frame in encoded.frames]


@settings(max_examples=25)
@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 999), power=st.integers(-40, 40), basis=BASES, asked=ASKED)
def test_a_power_of_two_scales_the_steps_and_nothing_else(
    rows: int, columns: int, seed: int, power: int, basis: Basis, asked: tuple[Kind, float, str]
) -> None:
    kind, value, quantizer = asked
    weight, factor = noise(rows, columns, seed), 2.0**power
    one, _ = encode(weight, Target(kind, value), basis, quantizer=quantizer)
    other, report = encode(factor * weight, Target(kind, value), basis, quantizer=quantizer)
    assert frames(other) == frames(one)
    assert torch.equal(other.to_dense(), factor * one.to_dense())
    assert torch.equal(other.step, factor * one.step) or not one.to_dense().any()  # of nothing, the step is 1
    assert report.weights == rows * columns


@given(seed=st.integers(0, 999), step=st.floats(1e-3, 3), ratio=st.floats(0.5, 1), scale=st.floats(1e-20, 1e20))
def test_rounding_what_was_rounded_changes_nothing(seed: int, step: float, ratio: float, scale: float) -> None:
    rounding = DeadZone(scale * step * ratio, scale * step)
    codes, _ = rounding.quantize(scale * noise(20, 30, seed))
    again, _ = rounding.quantize(scale * step * codes.float())
    assert torch.equal(again, codes.to(again.dtype))


@pytest.mark.parametrize("value", [0.8, 2.0])
@pytest.mark.parametrize("transform", ["dct", "hadamard", "identity"])
def test_what_the_scalar_quantiser_left_has_the_same_codes_again(value: float, transform: str) -> None:
    """At usual rates; above, it finds that the codes can be said with another step."""
    first, report = encode(noise(200, 256, 1), Target("bits", value), Basis(transform), quantizer="scalar")
    again, lost = encode(first.to_dense(), Target("bits", value), Basis(transform), quantizer="scalar")
    assert torch.equal(again.decode().codes, first.decode().codes)
    assert lost.relative_error < 1e-4 * report.relative_error


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
@pytest.mark.parametrize(("kind", "value"), [("bits", 1.0), ("bits", 2.5), ("max_error", 0.05), ("max_error", 0.4)])
def test_a_second_time_loses_no_more_than_the_first(kind: Kind, value: float, quantizer: str) -> None:
    weight = noise(256, 320, 2)
    first, once = encode(weight, Target(kind, value), quantizer=quantizer)
    second, again = encode(first.to_dense(), Target(kind, value), quantizer=quantizer)
    assert again.relative_error <= (value if kind == "max_error" else once.relative_error)
    both = float((second.to_dense() - weight).norm() / weight.norm())
    assert both < 1.01 * math.hypot(once.relative_error, again.relative_error)  # independent, so they do not add up


@settings(max_examples=30)
@given(
    rows=SIDES,
    columns=SIDES,
    seed=st.integers(0, 999),
    scale=st.floats(1e-6, 1e6),
    basis=BASES,
    step=st.floats(0.05, 2.5),
)
def test_inputs_without_correlation_are_as_no_inputs(
    rows: int, columns: int, seed: int, scale: float, basis: Basis, step: float
) -> None:
    """Moments that are the identity leave nothing to feed forward: calibrated codes are the data-free ones."""
    coefficients = basis.forward(noise(rows, columns, seed))
    factor = feedback_factor(scale * torch.eye(columns), basis)
    for rounding in (DeadZone(0.6 * step, step), LatticePoints(step, 0.1, np.arange(1.0, 9.0, dtype=np.float32))):
        fed = feedback_codes(coefficients, factor, rounding)
        plain, _ = rounding.quantize(coefficients)
        differ = fed.values != plain
        # the rounding of the transform of the identity may tip a tie
        assert int(differ.sum()) <= 0.002 * differ.numel() + (32 if isinstance(rounding, LatticePoints) else 1)
