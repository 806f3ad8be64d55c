"""What was asked of an encoding is kept: for every shape, transform, axes, float type, scale and kind of matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.parallel import one_torch_thread
from spectral_surgery.codec.quantizers import QUANTIZERS
from spectral_surgery.codec.rate import Target
from spectral_surgery.transforms import TRANSFORMS

WIDE = (torch.float64, torch.float32, torch.bfloat16)
NARROW = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)

BASES = st.builds(
    Basis, st.sampled_from(list(TRANSFORMS)), st.sampled_from([4, 16, 64]), st.sampled_from([(0, 1), (1,), (0,), ()])
)


SIDES = st.integers(1, 90)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Matrices of a few to some thousands of weights, of all floating types and scales."""
    shape = draw(st.tuples(SIDES, SIDES))
    seed, kind = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(list(KINDS)))
    matrix = _matrix(kind, shape, torch.Generator().manual_seed(seed))
    dtype = draw(st.sampled_from(WIDE + NARROW))
    scale = draw(st.sampled_from([1e-20, 1e-3, 1.0, 1e15])) if dtype in WIDE else 1.0
    return (scale * matrix).clamp(-4e4, 4e4).to(dtype) if dtype in NARROW else (scale * matrix).to(dtype)


def _matrix(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return KINDS[kind](noise)


def _one_outlier(noise: Tensor) -> Tensor:
    noise[0, 0] = 1e4
    return noise


VALUES = torch.tensor([1.0, 10.3, 17.1, -4.4], dtype=torch.float64)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda noise: noise,
    "heavy tails": lambda noise: noise.pow(3) * noise.abs().exp(),
    "few values": lambda noise: VALUES[(2 * noise.abs()).long().clamp(max=3)],
    "sparse": lambda noise: noise * (noise > 1),
    "constant": lambda noise: torch.full_like(noise, float(noise[0, 0])),
    "one outlier": _one_outlier,
    "rows of different scale": lambda noise: noise * torch.logspace(-3, 1, len(noise), dtype=torch.float64)[:, None],
    "integers": lambda noise: (20 * noise).round(),
}


def error(weight: Tensor, decoded: Tensor) -> float:
    exact = weight.double()
    return float((exact - decoded.double()).norm() / exact.norm()) if exact.any() else float(decoded.double().norm())


@given(weight=matrices(), basis=BASES, exponent=st.floats(-4, 0), quantizer=st.sampled_from(list(QUANTIZERS)))
def test_an_error_limit_is_never_exceeded(weight: Tensor, basis: Basis, exponent: float, quantizer: str) -> None:
    limit = max(10**exponent, 1e-4)
    encoded, report = encode(weight, Target("max_error", limit), basis, quantizer=quantizer)
    decoded = encoded.to_dense()
    assert decoded.shape == weight.shape
    assert error(weight, decoded) <= limit
    assert report.relative_error <= limit
    assert report.stored_energy == pytest.approx(float(decoded.double().square().sum()), rel=1e-4)


@given(weight=matrices(), basis=BASES, density=st.floats(0.001, 1))
def test_the_largest_coefficients_are_kept_to_the_asked_number(weight: Tensor, basis: Basis, density: float) -> None:
    encoded, report = encode(weight, Target("density", density), basis)
    with one_torch_thread():  # as encode does, to round alike
        sizes = basis.forward(weight).abs().reshape(-1)
    largest = sizes.sort(descending=True).values
    threshold = largest[max(1, round(density * weight.numel())) - 1]
    codes = encoded.decode().codes.reshape(-1).abs()
    kept, expected = codes != 0, sizes >= threshold  # equal ones together
    most = int(codes.max())
    step = float(largest[0]) / (most - 1) if most > 1 else 20 * float(sizes.double().square().mean().sqrt())
    if threshold > 1.01e-3 * step:
        assert torch.equal(kept, expected)
        assert report.kept == int(expected.sum())
    else:  # rounded zeros, less than a thousandth of a step, may be left out
        assert not (kept & ~expected).any()
        assert (sizes[expected & ~kept] <= 1.01e-3 * step).all()


@given(
    kind=st.sampled_from(["gaussian", "heavy tails", "one outlier", "rows of different scale"]),
    shape=st.tuples(st.integers(200, 400), st.integers(200, 400)),  # small ones feel every byte of a table
    seed=st.integers(0, 2**32 - 1),
    basis=BASES,
    bits=st.floats(0.5, 8),
    quantizer=st.sampled_from(list(QUANTIZERS)),
)
def test_bits_are_met(kind: str, shape: tuple[int, int], seed: int, basis: Basis, bits: float, quantizer: str) -> None:
    weight = _matrix(kind, shape, torch.Generator().manual_seed(seed)).float()
    report = encode(weight, Target("bits", bits), basis, quantizer=quantizer)[1]
    assert report.bits_per_weight == pytest.approx(bits, rel=0.005)
