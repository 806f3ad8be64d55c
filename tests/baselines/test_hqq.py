"""HQQ as published: the solver beside a plain one, better than plain rounding where weights have outliers."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.baselines.hqq import hqq, shrink
from spectral_surgery.baselines.rounding import int_groups


def heavy_tailed(rows: int = 64, columns: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal, other = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    return 0.02 * normal / other.abs().clamp_min(0.1).sqrt()


def published(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The zero points as the paper writes the iteration, a matrix being one list of groups; scales are inverted."""
    groups, top = weight.reshape(-1, 64).double(), 2**bits - 1
    low, high = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
    scale = 1 / ((high - low) / top).half().double()
    zero = before = -low * scale
    beta, last = 10.0, float("inf")
    for _ in range(20):
        codes = torch.round(groups * scale + zero).clamp(0, top)
        left = groups - (codes - zero) / scale
        if float(left.abs().mean()) >= last:
            return before
        last, before = float(left.abs().mean()), zero
        kept = torch.sign(left) * torch.relu(left.abs() - left.abs() ** (0.7 - 1) / beta)
        zero = torch.mean(codes - (groups - kept) * scale, dim=1, keepdim=True)
        beta *= 1.01
    return before


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1.0, 50.0])  # large weights have outliers at this beta, small ones have none
def test_zero_points_are_those_of_the_plain_iteration(bits: int, size: float) -> None:
    weight = size * heavy_tailed()
    groups, top = weight.reshape(-1, 64), 2**bits - 1
    scale = ((groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / top).half().float()
    zero = published(weight, bits).half().float()
    wanted = ((groups / scale + zero).round().clamp(0, top) - zero) * scale
    own = hqq(weight, bits=bits)
    same = torch.isclose(own.weight.reshape(-1, 64), wanted, atol=float(scale.max()) * 1e-2)
    assert float(same.double().mean()) > 0.99  # a zero point or a code at a tie falls either way in float32
    assert own.stored_bytes == weight.numel() * bits // 8 + 4 * weight.numel() // 64


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_with_outliers_are_rounded_better_than_to_the_nearest(bits: int) -> None:
    weight = heavy_tailed()
    own, nearest = hqq(weight, bits=bits).weight, int_groups(weight, bits=bits, group=64).weight
    assert float((own - weight).abs().mean()) < float((nearest - weight).abs().mean())


def test_the_proximal_point() -> None:
    x = torch.tensor([-2.0, -0.01, 0.0, 0.5])
    wanted = [-(2 - 2**-0.3 / 10), 0.0, 0.0, 0.5 - 0.5**-0.3 / 10]
    torch.testing.assert_close(shrink(x, 10.0), torch.tensor(wanted))


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-6, 700.0])
def test_groups_of_one_value(value: float) -> None:
    weight = torch.full((3, 70), value)
    torch.testing.assert_close(hqq(weight, bits=3).weight, weight, rtol=2e-3, atol=1e-5)


def test_a_short_last_group_is_rounded_as_if_it_were_alone() -> None:
    weight = heavy_tailed(8, 70)
    alone, together = hqq(weight[:, 64:], bits=8).weight, hqq(weight, bits=8).weight
    assert float((alone - together[:, 64:]).abs().max()) < float(weight[:, 64:].abs().max()) / 100
