"""Tile-diagonal application against the block-diagonal matrix it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.errors import ConfigError, DomainError, ShapeError
from spectral_surgery.transforms import TRANSFORMS, tiles
from spectral_surgery.transforms.base import Transform


def block_diagonal(transform: Transform, n: int, tile: int) -> torch.Tensor:
    sizes = [stop - start for start, stop in tiles.spans(n, tile)]
    eye = torch.eye
    blocks = [transform.matrix(s) if transform.accepts(s) else eye(s, dtype=torch.float64) for s in sizes]
    return torch.block_diag(*blocks)


@given(
    name=st.sampled_from(list(TRANSFORMS)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tile=st.sampled_from([1, 2, 8, 16]),
    axes=st.sampled_from([(), (0,), (1,), (0, 1)]),
)
def test_equals_the_block_diagonal_product(name: str, shape: tuple[int, int], tile: int, axes: tuple[int, ...]) -> None:
    transform = TRANSFORMS[name]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x
    if 0 in axes:
        expected = block_diagonal(transform, shape[0], tile) @ expected
    if 1 in axes:
        expected = expected @ block_diagonal(transform, shape[1], tile).T
    forward = tiles.forward(x, transform, tile, axes)
    torch.testing.assert_close(forward, expected)
    torch.testing.assert_close(tiles.inverse(forward, transform, tile, axes), x)


def test_spans_cover_an_axis() -> None:
    assert tiles.spans(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert tiles.spans(8, 4) == [(0, 4), (4, 8)]
    assert tiles.spans(0, 4) == []


def test_leading_dimensions_are_independent() -> None:
    x = torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(0))
    whole = tiles.forward(x, TRANSFORMS["dct"], 8, (0, 1))
    for i in range(3):
        torch.testing.assert_close(whole[i], tiles.forward(x[i], TRANSFORMS["dct"], 8, (0, 1)))


@pytest.mark.parametrize(
    ("tile", "axes", "x", "error", "text"),
    [
        (0, (0, 1), torch.zeros(4, 4), ConfigError, "tiles: expected a tile of 1 or more, got 0"),
        (48, (0, 1), torch.zeros(4, 4), ConfigError, "hadamard: expected a tile that is a power of two, got 48"),
        (4, (2,), torch.zeros(4, 4), ConfigError, r"hadamard: expected axes among \(0, 1\), got \(2,\)"),
        (4, (1,), torch.zeros(4), ShapeError, r"hadamard: expected shape \[\.\.\., O, I\], got \(4,\)"),
        (4, (1,), torch.zeros(4, 4, dtype=torch.complex64), DomainError, "complex64"),
    ],
)
def test_errors(tile: int, axes: tuple[int, ...], x: torch.Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        tiles.forward(x, TRANSFORMS["hadamard"], tile, axes)
