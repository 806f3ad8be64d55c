"""Which product suits a device, a number of tokens and an accuracy: measured crossovers, no environment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from spectral_surgery import gpu

Way = Literal["planes", "blocks", "triton"]

_MAX_INT32_TERMS = (1 << 31) // (128 * 128)  # products of two int8 summed without overflow
_NATIVE_TOKENS = 16  # above: 16-bit transforms where the processor has them
_ONE_CALL = {2: 256, 4: 128}  # tokens, by bytes of a number: faster up to these at 384 to 4096, AVX2 and AVX-512
_SMALL, _MANY = 1 << 20, 4096  # weights whose digits take longer than one call, by Zen 4: .6 to .8 at 512 tokens
_BESIDE_TILES = 1 << 24  # multiplications, which take a kernel as long as the calls around blocks take


@dataclass(frozen=True)
class Processor:
    """What the instruction set has; all that a choice may depend on, beside what it chooses for.

    Attributes:
        int8: dot products of int8 into int32; without them int8 products may saturate.
        bfloat16: dot products of bfloat16; without them, bfloat16 products are slower than float32 ones.
        tiles: products of whole tiles of bfloat16, which no vector instruction reaches.
    """

    int8: bool
    bfloat16: bool
    tiles: bool = False


@lru_cache(maxsize=1)
def processor() -> Processor:
    """This one: torch is asked once, and what it cannot tell is taken as missing.

    Nothing else asks it, and nobody keeps the answer: to replace this function is to be on another processor.
    """

    def has(name: str) -> bool:
        return bool(getattr(torch.cpu, name, bool)())

    tiles = has("_is_amx_tile_supported")
    return Processor(has("_is_vnni_supported"), has("_is_avx512_bf16_supported") or tiles, tiles)


def most_tokens(weights: int, accuracy: torch.dtype) -> int:
    """Tokens up to which `few_tokens` takes the product with a matrix of so many weights on a CPU."""
    has = processor()
    if has.tiles:
        return min(_ONE_CALL[4], max(_NATIVE_TOKENS, _BESIDE_TILES // max(weights, 1)))
    small = has.int8 and accuracy == torch.float32 and weights <= _SMALL
    return _MANY if small else _ONE_CALL[accuracy.itemsize]


def way(device: str, terms: int, accuracy: torch.dtype) -> Way:
    """How to multiply activations by an int8 matrix, where `few_tokens` does not.

    Returns ``planes``: activations as several int8 digits, exact int8 products. ``blocks``: blocks of rows converted to
    floating point. ``triton``: a kernel that converts in registers, on GPUs.

    Args:
        terms: summed per output.
    """
    if device == "cuda" and accuracy != torch.float64 and gpu.available():
        return "triton"
    if device != "cpu" or accuracy == torch.float64:
        return "blocks"
    has = processor()
    if accuracy == torch.bfloat16 and has.bfloat16:
        return "blocks"
    return "planes" if has.int8 and terms <= _MAX_INT32_TERMS else "blocks"


def block_dtype(device: str, accuracy: torch.dtype) -> torch.dtype:
    """Floating type that ``blocks`` multiplies in."""
    if accuracy == torch.bfloat16 and (device != "cpu" or processor().bfloat16):
        return torch.bfloat16
    if accuracy == torch.float16 and device != "cpu":
        return torch.float16
    return torch.float64 if accuracy == torch.float64 else torch.float32


def transform_dtype(device: str, tokens: int, accuracy: torch.dtype) -> torch.dtype:
    """Floating type that activations are transformed in."""
    if accuracy == torch.float64:
        return torch.float64
    native = accuracy == torch.bfloat16 and tokens > _NATIVE_TOKENS
    return block_dtype(device, accuracy) if native else torch.float32
