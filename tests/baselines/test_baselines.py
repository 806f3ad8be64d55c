"""Baselines: bits as published, errors as on Gaussian weights, and parity with the library they stand for."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.baselines import BASELINES
from spectral_surgery.errors import ConfigError, ShapeError


def matrix(rows: int = 512, columns: int = 1024) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "bits", "error"),
    [
        ("int8", 8.03, 0.008),
        ("int4-g128", 4.156, 0.105),
        ("int3-g128", 3.148, 0.225),
        ("int2-g64", 2.281, 0.46),
        ("nf4", 4.127, 0.093),
        ("hqq4", 4.5, 0.09),
        ("hqq3", 3.5, 0.19),
        ("hqq2", 2.5, 0.43),
        ("gptq4", 4.156, 0.1),
        ("gptq3", 3.148, 0.19),
        ("gptq2", 2.141, 0.37),
    ],
)
def test_fixed_rates(name: str, bits: float, error: float) -> None:
    weight = matrix()
    result = BASELINES[name].apply(weight, None, torch.eye(1024))
    assert 8 * result.stored_bytes / weight.numel() == pytest.approx(bits, abs=0.01)
    assert float((result.weight - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("name", [name for name, row in BASELINES.items() if row.budgeted])
@pytest.mark.parametrize("bits", [2.0, 4.0, 8.0])
def test_budgets_are_never_exceeded(name: str, bits: float) -> None:
    weight = matrix()
    result = BASELINES[name].apply(weight, bits, torch.eye(1024))
    assert 0.95 * bits < 8 * result.stored_bytes / weight.numel() <= bits
    with pytest.raises(ConfigError, match=f"{name}: expected finite bits per weight to meet, got None"):
        BASELINES[name].apply(weight, None, torch.eye(1024))


@pytest.mark.parametrize("name", ["prune", "wanda", "sparsegpt"])
def test_pruning_counts_a_bitmap_and_two_bytes_for_each_weight_that_is_kept(name: str) -> None:
    weight = matrix(96, 200)
    result = BASELINES[name].apply(weight, 3.0, torch.eye(200))
    kept = int(result.weight.count_nonzero())
    assert result.stored_bytes == 96 * 200 // 8 + 2 * kept == 3 * 96 * 200 // 8
    assert torch.equal(result.weight, result.weight.bfloat16().float())
    with pytest.raises(
        ConfigError,
        match=rf"{name}: expected more than 1\.\d+ bits per weight, which hold a bitmap and one value, got 1",
    ):
        BASELINES[name].apply(weight, 1.0, torch.eye(200))


@pytest.mark.parametrize("name", [name for name, row in BASELINES.items() if row.calibrated])
def test_inputs_of_calibrated_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: expected H = Xᵀ X, \[4, 4\], got no inputs"):
        BASELINES[name].apply(torch.randn(2, 4), 9.0)
    with pytest.raises(ShapeError, match=rf"{name}: expected H of shape \(4, 4\), got \(3, 3\)"):
        BASELINES[name].apply(torch.randn(2, 4), 9.0, torch.eye(3))
    stand_in = BASELINES[BASELINES[name].without_inputs]
    assert not stand_in.calibrated
    assert stand_in.budgeted == BASELINES[name].budgeted


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (65, 64), (200, 7)])
def test_odd_shapes(name: str, shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    try:
        result = BASELINES[name].apply(weight, 24.0, torch.eye(shape[1]))
    except ConfigError as error:
        assert "bits" in str(error)  # noqa: PT017 - a budget may be too small for any factor
        return
    assert result.weight.shape == shape
    assert bool(torch.isfinite(result.weight).all())


@pytest.mark.parametrize("name", BASELINES)
def test_refusals(name: str) -> None:
    with pytest.raises(ShapeError):
        BASELINES[name].apply(torch.zeros(3), 4.0)
    with pytest.raises(ConfigError):
        BASELINES[name].apply(torch.full((3, 3), float("nan")), 4.0)


@pytest.mark.filterwarnings("ignore")
def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(256, 512)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    ours = BASELINES["nf4"].apply(weight, None).weight
    assert float((ours - theirs).norm() / weight.norm()) < 0.01
