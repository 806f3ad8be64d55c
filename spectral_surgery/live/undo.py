"""Adding an update to a weight so that the weight can be given back bit for bit.

merged = round(s (W + Δ)) loses low bits of W, where s is 1 but for DoRA. What is known of them is guess =
round(merged / s - Δ); the record holds how many representable numbers lie between the guess and W. That is zero for
nearly all weights that keep their exponent, and takes about log2 |merged / guess| bits for the others, so the
differences are sorted by that ratio, cut into bit planes and compressed. Both sides must know the same Δ to the last
bit on any machine: it is computed in float64 and rounded to a grid that is coarse against float64's noise and fine
against the weights. The factors are stored.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor

from spectral_surgery.errors import ConfigError, NotMergeableError, UnmergeError

Integers = npt.NDArray[np.int64]

_GRID_BITS = 20  # the grid of Δ is max |Δ| / 2^20; noise of float64 transforms is 2^-50, so a flip is one in 10^9
_CLASSES = 13  # by difference of exponents; the last one is open
_BLOCK = 1 << 22  # elements coded at a time
_MAX_WIDTH = 34  # bits of a zigzag difference of two float32 numbers
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_MANTISSA = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


@dataclass(frozen=True)
class Undo:
    """What gives a weight back.

    Attributes:
        step: of the grid Δ was rounded to.
        data: the coded differences.
        base: SHA-256 of the bytes of the weight before.
        merged: SHA-256 of the bytes after.
    """

    step: float
    data: bytes
    base: str
    merged: str


def merge_weight(base: Tensor, delta: Tensor, where: str, scale: Tensor | None = None) -> tuple[Tensor, Undo]:
    """S (W + Δ), added in float32 and cast once; in float64 with factors.

    Args:
        base: W, of any shape, float32, bfloat16 or float16; not changed.
        delta: Δ of the same shape, float64.
        scale: s, float64, of a shape that broadcasts to that of base; None for 1.

    Raises:
        ConfigError: when base is of another dtype.
        NotMergeableError: when base, Δ or the sum is not finite.
    """
    if base.dtype not in _INTEGERS:
        expected, got = (", ".join(str(t).removeprefix("torch.") for t in types) for types in (_INTEGERS, [base.dtype]))
        raise ConfigError(f"{where}: expected one of {expected}, got {got}. Merge into a model that is not quantised.")
    for tensor, what in ((base, "the weight"), (delta, "the update"), (scale, "a factor of it")):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NotMergeableError(f"{where}: expected finite numbers, got NaN or infinity in {what}.")
    step = grid_step(delta)
    update = on_grid(delta, step)
    merged = base.float() + update if scale is None else (base.double() + update.double()) * scale
    merged = merged.to(base.dtype)
    if not bool(torch.isfinite(merged).all()):
        limit = torch.finfo(base.dtype).max
        raise NotMergeableError(
            f"{where}: expected sums up to {limit:.4g}, the largest number of {base.dtype}, got larger ones."
        )
    guess = _guess(merged, update, scale)
    undo = Undo(step, _encode(base, merged, guess), digest(base), digest(merged))
    if digest(_decode(undo.data, merged, guess, where)) != undo.base:
        raise NotMergeableError(f"{where}: cannot be given back; this is a fault of the program, please report it.")
    return merged, undo


def unmerge_weight(merged: Tensor, delta: Tensor, undo: Undo, where: str, scale: Tensor | None = None) -> Tensor:
    """The weight before `merge_weight`, bit for bit.

    Args:
        delta: Δ as it was given to `merge_weight`, up to rounding of its computation.
        scale: the factors that merge_weight was given, to the last bit.

    Raises:
        UnmergeError: when the merged weight was changed, the record is damaged, or Δ is another one.
    """
    if digest(merged) != undo.merged:
        raise UnmergeError(
            f"{where}: expected the weight as merge wrote it, got one that was changed since. Use an untouched copy."
        )
    base = _decode(undo.data, merged, _guess(merged, on_grid(delta, undo.step), scale), where)
    if digest(base) != undo.base:
        raise _unfit(where)
    return base


def grid_step(delta: Tensor) -> float:
    """A power of two, about max |Δ| / 2^20; 1 for zero."""
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    return float(2.0 ** (np.frexp(largest)[1] - _GRID_BITS)) if largest else 1.0


def on_grid(delta: Tensor, step: float) -> Tensor:
    """Δ rounded to multiples of step: float32, exact."""
    return delta.double().div(step).round_().mul_(step).float()


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _encode(base: Tensor, merged: Tensor, guesses: Tensor) -> bytes:
    compressor = zstandard.ZstdCompressor(level=3)
    flat = [tensor.detach().cpu().reshape(-1) for tensor in (base, merged, guesses)]
    blocks = []
    for start in range(0, base.numel(), _BLOCK):
        before, after, guess = (tensor[start : start + _BLOCK] for tensor in flat)
        difference = _rank(before) - _rank(guess)
        zigzag = np.asarray((difference << 1) ^ (difference >> 63))
        order, counts = _by_class(after, guess)
        widths, planes = [], []
        for values in np.split(zigzag[order], np.cumsum(counts)[:-1]):
            widths.append(int(values.max(initial=0)).bit_length())
            planes += [np.packbits((values >> bit & 1).astype(np.uint8)) for bit in range(widths[-1])]
        payload = compressor.compress(b"".join(plane.tobytes() for plane in planes))
        blocks.append(struct.pack(f"<{_CLASSES}BI", *widths, len(payload)) + payload)
    return b"".join(blocks)


def _decode(data: bytes, merged: Tensor, guesses: Tensor, where: str) -> Tensor:
    flat, guesses = merged.detach().cpu().reshape(-1), guesses.detach().cpu().reshape(-1)
    base = torch.empty_like(flat)
    head = struct.calcsize(f"<{_CLASSES}BI")
    offset = 0
    for start in range(0, flat.numel(), _BLOCK):
        after = flat[start : start + _BLOCK]
        if len(data) < offset + head:
            raise _unfit(where)
        *widths, size = struct.unpack_from(f"<{_CLASSES}BI", data, offset)
        payload, offset = data[offset + head : offset + head + size], offset + head + size
        guess = guesses[start : start + _BLOCK]
        order, counts = _by_class(after, guess)
        zigzag = np.empty(len(order), np.int64)
        zigzag[order] = _unpacked(payload, widths, counts, where)
        difference = (zigzag >> 1) ^ -(zigzag & 1)
        base[start : start + _BLOCK] = _from_rank(_rank(guess) + torch.from_numpy(difference), flat.dtype)
    if offset != len(data):
        raise _unfit(where)
    return base.reshape(merged.shape).to(merged.device)


def _unpacked(payload: bytes, widths: list[int], counts: Integers, where: str) -> Integers:
    """The differences, class after class."""
    sizes = [(int(count) + 7) // 8 for count in counts]
    total = sum(width * size for width, size in zip(widths, sizes, strict=True))
    if max(widths) > _MAX_WIDTH:
        raise _unfit(where)
    try:
        raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(payload, max_output_size=total), np.uint8)
    except zstandard.ZstdError:
        raise _unfit(where) from None
    if len(raw) != total:
        raise _unfit(where)
    parts, offset = [], 0
    for width, size, count in zip(widths, sizes, counts, strict=True):
        values = np.zeros(int(count), np.int64)
        for bit in range(width):
            values |= np.unpackbits(raw[offset : offset + size], count=len(values)).astype(np.int64) << bit
            offset += size
        parts.append(values)
    return np.concatenate(parts)


def _unfit(where: str) -> UnmergeError:
    return UnmergeError(
        f"{where}: expected the adapter and the record as merge wrote them, got others: the base does not come out. One"
        " of them was changed, or is damaged."
    )


def _guess(merged: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    limit = torch.finfo(merged.dtype).max  # an infinite guess would have no neighbours
    before = merged.double()
    if scale is not None:
        before = torch.where(scale == 0, 0.0, before / scale)
    return (before - update.double()).clamp_(-limit, limit).to(merged.dtype)


def _by_class(merged: Tensor, guess: Tensor) -> tuple[Integers, Integers]:
    """(order that sorts by how many exponents the merged weight is above the guess, members of each class)."""
    shift = _MANTISSA[merged.dtype]
    exponents, other = ((t.abs().view(_INTEGERS[t.dtype]) >> shift).to(torch.int16) for t in (merged, guess))
    classes = (exponents - other).clamp_(0, _CLASSES - 1).to(torch.uint8).numpy()
    return np.argsort(classes, kind="stable"), np.bincount(classes, minlength=_CLASSES)


def _rank(tensor: Tensor) -> Tensor:
    """Position among the numbers of the dtype, in order: int64; -0 comes right before 0."""
    integers = tensor.contiguous().view(_INTEGERS[tensor.dtype])
    bits = 8 * integers.element_size()
    return (integers ^ ((integers >> (bits - 1)) & ((1 << (bits - 1)) - 1))).to(torch.int64)


def _from_rank(rank: Tensor, dtype: torch.dtype) -> Tensor:
    integers = rank.to(_INTEGERS[dtype])
    bits = 8 * integers.element_size()
    return (integers ^ ((integers >> (bits - 1)) & ((1 << (bits - 1)) - 1))).view(dtype)
