"""Weights as small integers times one scale for each group of a row, with the scale that loses least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_COARSE = torch.linspace(0.4, 1.1, 15)  # of the scale that just reaches the largest weight: a smaller one cuts it
_FINE = torch.linspace(0.95, 1.05, 11)  # of the best of those
_BLOCK = 1 << 20  # weights worked on at a time: they stay in the cache, and memory is bounded


@dataclass(frozen=True)
class Grouped:
    """Weights as integers.

    Attributes:
        codes: [O, I] int8, from -2^(bits - 1) to 2^(bits - 1) - 1.
        scale: [O, G], what a code times stands for its weight; G is the number of groups of a row.
    """

    codes: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        """[O, I] float32."""
        groups = self.codes.float().reshape(*self.scale.shape, -1)
        return (groups * self.scale.float()[..., None]).flatten(1)


def in_groups_of(weight: Tensor, bits: int, group: int, dtype: torch.dtype, scale: Tensor | None = None) -> Grouped:
    """Round weights to integers with a scale for each group, both chosen for the least squared error.

    Scales from 0.4 to 1.1 of the one that reaches the largest weight are tried, and more of them about the best. Each
    is fitted to its codes by least squares, and rounded to its dtype before its error counts.

    Args:
        weight: [O, I] of any float type, finite.
        bits: of a code, 2 to 8.
        group: columns with one scale, which divide I.
        dtype: of the scales as they will be stored.
        scale: [O, G] that was found before; None to look for it.
    """
    if scale is not None:
        groups = weight.float().reshape(len(weight), -1, group)
        codes = _codes(groups, scale.float()[..., None], 2 ** (bits - 1))
        return Grouped(codes.to(torch.int8).flatten(1), scale)
    rows = max(1, _BLOCK // weight.shape[1])
    parts = [_rounded(part.float(), bits, group, dtype) for part in weight.split(rows)]
    return Grouped(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]))


def _rounded(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> Grouped:
    groups = weight.reshape(len(weight), -1, group)  # [O, G, group]
    most = 2 ** (bits - 1)
    widest = groups.abs().amax(-1, keepdim=True) / (most - 0.5)
    best, least = widest, torch.full_like(widest, torch.inf)
    for factors in (_COARSE, _FINE):
        middle = widest if factors is _COARSE else best
        for factor in factors.tolist():
            scale = _fitted(groups, _codes(groups, middle * factor, most), middle * factor)
            scale = scale.to(dtype).float()
            error = (groups - _codes(groups, scale, most) * scale).square().sum(-1, keepdim=True)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    best = best.to(dtype).float()
    codes = _codes(groups, best, most)
    return Grouped(codes.to(torch.int8).flatten(1), best[..., 0].to(dtype))


def _codes(groups: Tensor, scale: Tensor, most: int) -> Tensor:
    """The nearest codes; zeros where a scale is zero, or has no inverse."""
    inverse = torch.where(scale > torch.finfo(torch.float32).tiny, 1 / scale, torch.zeros_like(scale))
    return (groups * inverse).round_().clamp_(-most, most - 1)


def _fitted(groups: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The scale of least squared error for codes; that given where there are none but zeros."""
    energy = codes.square().sum(-1, keepdim=True)
    product = (groups * codes).sum(-1, keepdim=True)
    return torch.where(energy > 0, product / energy.clamp_min(1), scale)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes in int32 words as compressed-tensors packs them: [O, I] int8 to [O, ceil(I bits / 32)] int32.

    A code is stored plus 2^(bits - 1), the first one of a row in the lowest bits; ``bits`` is 4 or 8. Source:
    compressed-tensors 0.20, `compressors/pack_quantized`.
    """
    held = 32 // bits
    codes = torch.nn.functional.pad(codes.to(torch.int32) + 2 ** (bits - 1), (0, -codes.shape[1] % held))
    places = torch.arange(0, 32, bits, dtype=torch.int32)
    words = codes.reshape(len(codes), -1, held) << places
    return words.sum(-1, dtype=torch.int32)
