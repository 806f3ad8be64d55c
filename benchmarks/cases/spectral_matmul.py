"""Layers that multiply by spectra, beside dense ones and torch's int8 kernel without any transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.case import Row, require
from benchmarks.timing import interleaved
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.layers import SpectralLinear

TOKENS = {1: 40, 8: 30, 64: 10, 512: 5}  # rounds for each
THREADS = 2
EXACT, ROUNDED = 1e-5, 1e-2
LIMITS = {  # by form, bits and tokens
    **{("int8", 4.0, 1): 0.4, ("int8", 4.0, 8): 0.7, ("int8", 4.0, 64): 1.15, ("int8", 4.0, 512): 1.1},
    **{("int4", 2.0, 1): 0.25, ("int4", 2.0, 8): 0.7, ("coded", 4.0, 1): 4.0, ("coded", 2.0, 1): 2.5},
}
_FORMS = (("int8", 4.0), ("int5", 3.0), ("int4", 2.0), ("coded", 4.0), ("coded", 3.0), ("coded", 2.0))

_CPU = torch.device("cpu")

_PACKAGE = "bitsandbytes"
_LOSSY = {"nf4": 0.15, "int8": 0.03}  # relative error that its own rounding may leave

Layer = Callable[[Tensor], Tensor]


def run(quick: bool) -> list[Row]:
    """Milliseconds of one layer in bfloat16 by number of tokens, as multiples of a dense layer."""
    size = 512 if quick else 4096
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.inference_mode():
            others, skipped = bitsandbytes_layers(size)
            return [*_measure(size, others), *skipped]
    finally:
        torch.set_num_threads(before)


def weight_of(size: int) -> Tensor:
    """The matrix that is measured: [size, size] float32."""
    return 0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))


def bitsandbytes_layers(size: int) -> tuple[dict[str, Layer], list[Row]]:
    """Layers of bitsandbytes on this processor, and a row for each that cannot be had.

    Args:
        size: O and I.
    """
    if find_spec(_PACKAGE) is None:
        return {}, [{"skipped": _PACKAGE, "reason": f"not installed; pip install {_PACKAGE}"}]
    modules = import_module(f"{_PACKAGE}.nn")
    weight, x = weight_of(size), torch.randn(8, size, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.float() @ weight.T
    layers: dict[str, Layer] = {}
    skipped: list[Row] = []
    for name, kind, settings in (
        ("nf4", "Linear4bit", {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}),
        ("int8", "Linear8bitLt", {"has_fp16_weights": False}),
    ):
        try:
            layer = getattr(modules, kind)(size, size, bias=False, **settings)
            layer.load_state_dict({"weight": weight.bfloat16()})
            layer = layer.requires_grad_(False).to("cpu")
            error = float((layer(x).float() - expected).norm() / expected.norm())
        except (
            RuntimeError,
            AttributeError,
            TypeError,
            ValueError,
            OSError,
        ) as reason:  # builds differ in what they miss
            skipped.append({"skipped": f"{_PACKAGE} {name}", "reason": " ".join(str(reason).split())[:100]})
            continue
        require(error <= _LOSSY[name], f"{_PACKAGE} {name}: relative error {error:.2g}")
        layers[f"{_PACKAGE} {name}"] = layer
    return layers, skipped


def _measure(size: int, others: Mapping[str, Layer]) -> list[Row]:
    weight = weight_of(size)
    spectra = {bits: encode(weight, Target("bits", bits), threads=THREADS)[0] for bits in (2.0, 3.0, 4.0)}
    ours = {_named(resident, bits): check(spectra[bits], resident) for resident, bits in _FORMS}
    nbytes = {name: layer.spectrum.nbytes for name, layer in ours.items()}
    dense = nn.Linear(size, size, bias=False).requires_grad_(False)
    dense.weight.copy_(spectra[4.0].to_dense())
    half = nn.Linear(size, size, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    half.weight.copy_(dense.weight)
    codes = spectra[4.0].decode().codes
    ones = torch.ones(size, dtype=torch.bfloat16)
    layers: dict[str, Layer] = {
        **ours,
        "dense bfloat16": half,
        "dense float32": lambda x: dense(x.float()),
        "torch int8 kernel alone": lambda x: torch._weight_int8pack_mm(x, codes, ones),
        **others,
    }
    nbytes |= {"dense bfloat16": 2 * size**2, "dense float32": 4 * size**2, "torch int8 kernel alone": size**2}
    nbytes |= {f"{_PACKAGE} int8": size**2 + 4 * size, f"{_PACKAGE} nf4": size**2 // 2 + 4 * size**2 // 64}
    limits = {(_named(form, bits), tokens): limit for (form, bits, tokens), limit in LIMITS.items()}
    rows = []
    for tokens, rounds in TOKENS.items():
        x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        timings = interleaved({name: partial(layer, x) for name, layer in layers.items()}, rounds)
        base = timings["dense bfloat16"].median
        for name, timing in timings.items():
            limit = limits.get((name, tokens))
            ratio = timing.median / base
            rows.append(
                {
                    "tokens": tokens,
                    "layer": name,
                    "ms": 1e3 * timing.median,
                    "p20": 1e3 * timing.p20,
                    "p80": 1e3 * timing.p80,
                    "time / bfloat16": ratio,
                    "bytes / bfloat16": nbytes[name] / (2 * size**2),
                    "target": f"<= {limit:g}" if limit else "",
                    "met": ratio <= limit if limit else "",
                }
            )
    return rows


def _named(resident: str, bits: float) -> str:
    return f"{resident}, {bits:g} bits stored"


def check(spectrum: EncodedSpectrum, resident: str, device: torch.device = _CPU) -> SpectralLinear:
    """A layer of a spectrum, once it agrees with the decompressed dense layer."""
    layer = SpectralLinear.from_quantized(spectrum, resident=resident).to(device)
    dense = spectrum.to_dense(threads=THREADS)
    for tokens in TOKENS:
        x = torch.randn(tokens, dense.shape[1], generator=torch.Generator().manual_seed(tokens))
        for dtype, limit in ((torch.float32, EXACT), (torch.bfloat16, ROUNDED)):
            given = x.to(dtype)
            expected = given.float() @ dense.T
            error = float((layer(given.to(device)).float().cpu() - expected).norm() / expected.norm())
            require(error <= limit, f"{resident}: relative error {error:.2g} for {tokens} tokens in {dtype}")
    return layer
