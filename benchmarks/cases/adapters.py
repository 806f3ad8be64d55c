"""FourierFT, and FouRA at one token, beside the bare layer, PEFT's FourierFT and LoRA: time, memory, many layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.case import Row, require
from benchmarks.peft_control import peft_layer
from benchmarks.timing import interleaved
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.foura import Foura, FouraConfig
from spectral_surgery.adapters.fourierft import FOURIERFT, FourierFT, FourierFTConfig
from spectral_surgery.adapters.layer import AdaptedLayer
from spectral_surgery.fourier import reference
from spectral_surgery.live.attach import inject
from spectral_surgery.targets import ModuleTargets

THREADS = 2
MEMORY, INJECTION = 16e6, 5.0  # bytes; seconds
EXACT = 1e-5
LAYERS = 224
_OURS, _FOURA, _BASE, _LORA, _PEFT = "ours", "ours, FouRA r=8", "base", "PEFT LoRA r=8", "PEFT FourierFT"
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Load:
    """One line of the table.

    Attributes:
        side: O = I.
        tokens: T.
        trains: forward and backward with the gradient of x and of the adapter; the base's weight is frozen. Otherwise
            inference.
        rounds: calls of each layer.
        limit: highest accepted time as a multiple of the base's; None for that of LoRA.
    """

    side: int
    tokens: int
    trains: bool
    rounds: int
    limit: float | None


LOADS = (
    Load(4096, 1, False, 200, None),
    Load(4096, 1024, False, 9, 1.04),
    Load(4096, 128, True, 21, 1.08),
    Load(4096, 1024, True, 7, 1.12),
    Load(1024, 1024, True, 41, 1.35),
)
QUICK = (Load(256, 1, False, 20, None), Load(256, 64, True, 10, None))


def run(quick: bool) -> list[Row]:
    """Milliseconds of one float32 layer with 1000 coefficients, as multiples of the layer without an adapter."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        rows = [row for load in (QUICK if quick else LOADS) for row in measure(load)]
        return [*rows, memory(256 if quick else 4096, 64), injection(256 if quick else 4096)]
    finally:
        torch.set_num_threads(before)


def measure(load: Load) -> list[Row]:
    """Time one line of the table, once ours is right."""
    base, ours = layers(load.side)
    x, dy = signal(load.tokens, load.side, 1), signal(load.tokens, load.side, 2)
    check(ours, x, dy)
    providers: dict[str, nn.Module] = {_BASE: base, _OURS: ours}
    if load.tokens == 1 and not load.trains:
        providers[_FOURA] = foura_layer(base, x)
    if find_spec("peft") is not None:
        providers |= {_LORA: peft_layer(_linear(base), "lora"), _PEFT: peft_layer(_linear(base), "fourierft")}
    step = partial(_train, x=x.requires_grad_(), dy=dy) if load.trains else partial(_infer, x=x)
    timings = interleaved({name: partial(step, layer) for name, layer in providers.items()}, load.rounds)
    limit = load.limit or (timings[_LORA].median / timings[_BASE].median if _LORA in timings else None)
    rows: list[Row] = []
    for name, timing in timings.items():
        ratio = timing.median / timings[_BASE].median
        judged = name in (_OURS, _FOURA) and limit is not None
        rows.append(
            {
                "case": f"{'train step' if load.trains else 'inference'}, d={load.side}, T={load.tokens}",
                "layer": name,
                "ms": 1e3 * timing.median,
                "p20": 1e3 * timing.p20,
                "p80": 1e3 * timing.p80,
                "time / base": ratio,
                "target": f"<= {limit:.3g}" if judged else "",
                "met": ratio <= cast(float, limit) if judged else "",
            }
        )
    return rows


def layers(side: int) -> tuple[nn.Linear, AdaptedLayer]:
    """A frozen layer, and one that shares its weight and carries a FourierFT adapter that acts."""
    torch.manual_seed(0)
    base = nn.Linear(side, side, bias=False).requires_grad_(False)
    ours = AdaptedLayer(_linear(base))
    ours.add("default", FourierFT(FourierFTConfig(n_frequency=1000, init_weights=False), side, side))
    ours.set_active({"default": 1.0})
    return base, ours


def foura_layer(base: nn.Linear, x: Tensor) -> AdaptedLayer:
    """A layer that shares the weight and carries a FouRA adapter that acts, once it is right on x [T, I].

    Raises:
        CheckFailedError: when it is off by more than EXACT, relative to its norm.
    """
    adapter = Foura(FouraConfig(r=8, init_weights=False), base.out_features, base.in_features)
    layer = AdaptedLayer(_linear(base))
    layer.add("default", adapter)
    layer.set_active({"default": 1.0})
    with torch.inference_mode():
        expected = nn.functional.linear(x, base.weight + adapter.delta_weight())
        error = float((layer(x) - expected).norm() / expected.norm())
    require(error < EXACT, f"FouRA: y differs from the definition by {error:.1e}")
    return layer


def check(layer: AdaptedLayer, x: Tensor, dy: Tensor) -> None:
    """Hold output and gradients against the definition.

    Raises:
        CheckFailedError: when one is off by more than EXACT, relative to its norm.
    """
    adapter = cast(FourierFT, layer.adapters["default"])
    x = x.detach().requires_grad_()
    delta = reference.delta_weight(adapter.spectrum, adapter.positions, adapter.shape, adapter.scaling)
    expected = nn.functional.linear(x, layer.weight + delta)
    wanted = (expected, *torch.autograd.grad(expected, (x, adapter.spectrum), dy))
    y = layer(x)
    got = (y, *torch.autograd.grad(y, (x, adapter.spectrum), dy))
    with torch.inference_mode():
        alone = layer(x)
    for name, one, other in zip(("y", "dx", "dc", "y alone"), (*wanted, expected), (*got, alone), strict=True):
        error = float(((one - other).norm() / one.norm()).detach())
        require(error < EXACT, f"{name} of {tuple(x.shape)} differs from the definition by {error:.1e}")


def memory(side: int, tokens: int) -> Row:
    """Peak memory of a training step over that of the same step of the layer without an adapter."""
    base, ours = layers(side)
    x, dy = signal(tokens, side, 1).requires_grad_(), signal(tokens, side, 2)
    peaks: dict[str, int] = {}
    for name, layer in ((_BASE, base), (_OURS, ours)):
        _train(layer, x, dy)  # loads what is loaded once
        peaks[name] = _growth(partial(_train, layer, x, dy))
    extra = max(0, peaks[_OURS] - peaks[_BASE])
    return {
        "case": f"extra memory of a train step, d={side}, T={tokens}",
        "layer": _OURS,
        "MB": extra / 1e6,
        "target": f"< {MEMORY / 1e6:g} MB",
        "met": extra < MEMORY,
    }


def injection(side: int) -> Row:
    """Seconds to put adapters on many layers; they share one weight, to fit into memory."""
    model = nn.Sequential(*[_linear(base) for base in [layers(side)[0]] for _ in range(LAYERS)])
    spec = AdapterSpec(FOURIERFT, FourierFTConfig(n_frequency=1000), ModuleTargets(target_modules="all-linear"))
    started = time.perf_counter()
    inject(model, spec)
    seconds = time.perf_counter() - started
    carried = sum(isinstance(module, AdaptedLayer) for module in model)
    require(carried == LAYERS, f"{carried} of {LAYERS} layers carry an adapter")
    return {
        "case": f"injection into {LAYERS} layers, d={side}",
        "layer": _OURS,
        "s": seconds,
        "target": f"< {INJECTION:g} s",
        "met": seconds < INJECTION,
    }


def signal(tokens: int, side: int, seed: int) -> Tensor:
    """[T, I] of standard normal numbers."""
    return torch.randn(tokens, side, generator=torch.Generator().manual_seed(seed))


def _linear(base: nn.Linear) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(base.in_features, base.out_features, bias=False)
    layer.weight = base.weight
    return layer


def _train(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer(x).backward(dy)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def _infer(layer: nn.Module, x: Tensor) -> Any:
    with torch.inference_mode():
        return layer(x)


def _growth(step: Callable[[], object]) -> int:
    # peak resident bytes over those at the start: the allocator gives back what it kept, and Linux resets the peak
    CDLL(None).malloc_trim(0)
    _RESET.write_text("5", encoding="ascii")
    start = _status("VmRSS")
    step()
    return _status("VmHWM") - start


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
