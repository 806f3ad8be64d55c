"""SparseSpectralTensor: honest sizes, exact algebra, and clear refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_surgery.errors import CheckpointError, ConfigError, DomainError, LimitError, ShapeError
from spectral_surgery.sparse.tensor import SparseSpectralTensor, sst
from spectral_surgery.transforms import TRANSFORMS

REAL = [pytest.param(name, tile, id=f"{name}-{tile}") for name in TRANSFORMS for tile in (16, 64)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, decoded: Tensor) -> float:
    return float((weight - decoded).norm() / weight.norm())


@pytest.mark.parametrize(("name", "tile"), REAL)
@pytest.mark.parametrize("shape", [(128, 64), (70, 33), (40,), (6, 5, 4, 3)])
def test_keeping_all_reconstructs(name: str, tile: int, shape: tuple[int, ...]) -> None:
    weight = gaussian(*shape)
    spectrum = sst(weight, sparsity=1.0, transform=name, tile=tile)
    assert spectrum.density == 1
    torch.testing.assert_close(spectrum.to_spatial(), weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(64, 48), (65, 48), (64, 47), (65, 47), (1, 5), (5, 1)])
def test_rfft2_keeps_conjugate_pairs_together(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    torch.testing.assert_close(sst(weight, 1.0, transform="rfft2").to_spatial(), weight, atol=1e-5, rtol=1e-4)
    some = sst(weight, 0.3, transform="rfft2")
    assert abs(some.kept - round(0.3 * weight.numel())) <= 1
    dropped = weight - some.to_spatial()
    assert float((dropped * some.to_spatial()).sum()) == pytest.approx(0, abs=1e-3)  # what is kept is orthogonal to it


def test_a_fifth_of_gaussian_weights_loses_what_theory_says() -> None:
    weight = gaussian(512, 512)
    for name in ("dct", "hartley", "hadamard"):
        assert error(weight, sst(weight, 0.2, transform=name).to_spatial()) == pytest.approx(0.592, rel=0.01)
    expected = math.sqrt(1 - 0.2 * (1 - math.log(0.2)))
    assert error(weight, sst(weight, 0.2, transform="rfft2").to_spatial()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("name", "tile"), REAL)
def test_parseval(name: str, tile: int) -> None:
    weight = gaussian(90, 70)
    spectrum = sst(weight, 0.25, transform=name, tile=tile)
    lost = float(weight.square().sum() - spectrum.values.square().sum())
    assert error(weight, spectrum.to_spatial()) ** 2 == pytest.approx(lost / float(weight.square().sum()), rel=1e-4)


def test_selection_is_exact_and_deterministic() -> None:
    spectrum = sst(torch.ones(8, 8), 0.5, transform="identity", tile=4)
    assert spectrum.positions.tolist() == list(range(32))  # ties: the first win
    weight = gaussian(100, 100)
    assert sst(weight, 0.2).kept == 2000
    assert sst(weight, 1e-9).kept == 1


def test_sizes_count_every_stored_byte(tmp_path: Path) -> None:
    weight = gaussian(256, 256)
    spectrum = sst(weight, 0.2, dtype=torch.bfloat16)
    stored = spectrum.values.numel() * 2 + spectrum.positions.numel() * spectrum.positions.element_size()
    assert spectrum.stored_bytes == stored
    assert spectrum.compress_ratio() == pytest.approx(weight.numel() * 4 / stored)
    assert spectrum.memory_mb() == pytest.approx(stored / 1e6, rel=0.05)
    spectrum.save(tmp_path / "s.safetensors")
    assert stored <= (tmp_path / "s.safetensors").stat().st_size <= stored + 1000
    assert sst(weight, 0.2).compress_ratio() < 3  # not "5x": positions are bytes too


@pytest.mark.parametrize("transform", ["dct", "rfft2"])
def test_algebra(transform: str) -> None:
    a, b = gaussian(60, 40), gaussian(60, 40, seed=1)
    x, y = sst(a, 0.3, transform=transform), sst(b, 0.2, transform=transform)
    torch.testing.assert_close((x + y).to_spatial(), x.to_spatial() + y.to_spatial(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((x - y).to_spatial(), x.to_spatial() - y.to_spatial(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((2.5 * x).to_spatial(), 2.5 * x.to_spatial(), atol=1e-5, rtol=1e-4)
    product = sst(a, 1.0, transform=transform) * sst(b, 1.0, transform=transform)
    torch.testing.assert_close(product.to_spatial(), a * b, atol=1e-4, rtol=1e-3)
    assert not set(x.positions.tolist()).symmetric_difference((x + x).positions.tolist())


@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,)])
@pytest.mark.parametrize("shape", [(64, 96), (50, 33)])
def test_matmul_and_its_gradient(axes: tuple[int, ...], shape: tuple[int, int]) -> None:
    spectrum = sst(gaussian(*shape), 0.3, tile=16, axes=axes)
    dense = spectrum.to_spatial()
    x = gaussian(2, 5, shape[1], seed=3).requires_grad_()
    y = spectrum.matmul(x)
    torch.testing.assert_close(y, x @ dense.T, atol=1e-4, rtol=1e-4)
    upstream = gaussian(*y.shape, seed=4)
    (got,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(got, upstream @ dense, atol=1e-4, rtol=1e-4)


def test_matmul_of_rfft2() -> None:
    for shape in ((32, 48), (33, 47)):
        spectrum = sst(gaussian(*shape), 0.3, transform="rfft2")
        x = gaussian(7, shape[1], seed=3)
        torch.testing.assert_close(spectrum.matmul(x), x @ spectrum.to_spatial().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", ["dct", "rfft2"])
def test_save_and_load(tmp_path: Path, transform: str) -> None:
    spectrum = sst(gaussian(30, 20), 0.3, transform=transform)
    spectrum.save(tmp_path / "s.safetensors")
    back = SparseSpectralTensor.load(tmp_path / "s.safetensors")
    assert torch.equal(back.values, spectrum.values)
    assert torch.equal(back.positions, spectrum.positions)
    assert back.domain == spectrum.domain


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["positions"].neg_(),
        lambda t: t["positions"].add_(10**6),
        lambda t: t["positions"].copy_(t["positions"].flip(0)),
        lambda t: t["positions"].fill_(3),
        lambda t: t["values"].fill_(float("nan")),
        lambda t: t.pop("values"),
        lambda t: t.update(values=t["values"][:-1].clone()),
        lambda t: t.update(values=t["values"].to(torch.int64)),
    ],
)
def test_files_that_lie(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "s.safetensors"
    sst(gaussian(30, 20), 0.3).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError):
        SparseSpectralTensor.load(path)
    save_file({"values": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError):
        SparseSpectralTensor.load(path)


def test_domains_do_not_mix() -> None:
    weight = gaussian(64, 64)
    spectrum = sst(weight, 0.2)
    for other in (sst(weight, 0.2, transform="haar"), sst(weight, 0.2, tile=32), sst(weight, 0.2, axes=(1,))):
        with pytest.raises(DomainError, match=r"\+: expected spectra of.*got Domain\(shape=\(64, 64\), tile=128"):
            _ = spectrum + other
    for operation in (
        lambda: spectrum + weight,
        lambda: weight + spectrum,
        lambda: torch.add(weight, spectrum),
        lambda: sst(spectrum),
        lambda: torch.nn.functional.linear(weight, spectrum),
        lambda: np.asarray(spectrum),
        lambda: torch.as_tensor(spectrum),
    ):
        with pytest.raises(DomainError):
            operation()


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: sst(gaussian(4, 4), 0.0), ConfigError, r"sst: expected a sparsity above 0 and up to.*got 0\.0"),
        (lambda: sst(gaussian(4, 4), 1.2), ConfigError, r"sst: expected a sparsity above 0 and up to.*got 1\.2"),
        (lambda: sst(torch.full((4, 4), math.nan)), ConfigError, "not finite"),
        (lambda: sst(torch.zeros(4, 4, dtype=torch.int64)), ConfigError, r"sst: expected a.*got torch\.int64"),
        (lambda: sst(gaussian(4, 4), transform="fft9"), ConfigError, "transform: expected one of.*got 'fft9'"),
        (lambda: sst(torch.zeros(1, 9000), tile=None), LimitError, "8192"),
        (lambda: sst(gaussian(4, 4)).matmul(gaussian(2, 5)), ShapeError, "5"),
        (lambda: sst(gaussian(4)).matmul(gaussian(2, 4)), (ShapeError, DomainError), "."),
        (lambda: sst(gaussian(4, 4)).matmul(torch.zeros(2, 4, dtype=torch.int64)), (ConfigError, DomainError), "int64"),
    ],
)
def test_refusals(call: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
