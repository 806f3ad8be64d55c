"""Mixers against attention over the length of the sequence: time, memory, and how both grow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Row, require
from benchmarks.peak import peak_bytes
from benchmarks.plot import plot_lengths
from benchmarks.timing import interleaved
from spectral_surgery.mixers import MIXERS, leak
from spectral_surgery.mixers.base import refuse_cache
from spectral_surgery.mixers.cache import MixerCache
from spectral_surgery.mixers.spectral_mlp import SpectralMLPBlock

WIDTH, HEADS = 256, 4
LENGTHS = tuple(2**power for power in range(7, 17))  # 128 to 65536
QUICK_WIDTH, QUICK_LENGTHS = 64, LENGTHS[:6]
FAR, NEAR = 65536, 4096  # lengths between which the exponent is measured
EXPONENT, AHEAD_FROM = 1.15, 1024
BUDGET = 20.0  # seconds a call may take; lengths at which it would take longer are left out
ROUNDS, FEW_ROUNDS, SHORT = 5, 2, 0.2  # few where a call takes more than SHORT seconds
FORWARD, BOTH = "forward", "forward + backward"
SDPA, WITH_PROJECTIONS, IN_BLOCK = "SDPA", "SDPA with projections", "SDPA in the same block"
LIKE = {  # what does the same work around attention; for all others that is SDPA alone
    "spectral_mlp": IN_BLOCK,
    "causal_spectral_mlp": IN_BLOCK,
    "hybrid": WITH_PROJECTIONS,
    "causal_hybrid": WITH_PROJECTIONS,
}
LONGEST = 8192  # of the last two


@dataclass(frozen=True)
class Contender:
    """Something that mixes tokens.

    Attributes:
        name: of the mixer, or SDPA.
        is_causal: SDPA comes both ways.
        mix: [1, T, D] to [1, T, D].
        parameters: trained ones.
        longest: length up to which it is measured.
    """

    name: str
    is_causal: bool
    mix: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...] = ()
    longest: int = FAR


@dataclass
class Curve:
    """Milliseconds and peak bytes of a contender by length."""

    ms: dict[int, float]
    peak: dict[int, int]


def run(quick: bool) -> list[Row]:
    """Milliseconds by length, growth, speed beside SDPA of the same direction, and peak memory."""
    width, lengths = (QUICK_WIDTH, QUICK_LENGTHS) if quick else (WIDTH, LENGTHS)
    for name in MIXERS:
        check(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    contenders = [_mixer(name, width, device) for name in MIXERS]
    contenders += [own for causal in (False, True) for own in _attentions(width, causal, device)]
    times: list[Row] = []
    ratios: list[Row] = []
    memory: list[Row] = []
    for passes in (FORWARD, BOTH):
        curves = measure(contenders, lengths, width, passes, device)
        pairs = list(zip(contenders, curves, strict=True))
        attentions = {(own.name, own.is_causal): curve for own, curve in pairs if own.name not in MIXERS}
        times += [_time_row(contender, passes, curve, lengths) for contender, curve in pairs]
        memory += [_memory_row(contender, passes, curve, lengths) for contender, curve in pairs]
        for contender, curve in pairs:
            for beside in _beside(contender.name):
                other = attentions[beside, contender.is_causal]
                ratios.append(_ratio_row(_head(contender, passes) | {"beside": beside}, curve, other, lengths))
    return times + ratios + memory


def check(name: str) -> None:
    """A causal mixer decodes to what it gives at once and sees no future; another gives sequences as without padding.

    Raises:
        CheckFailedError: when it does not.
    """
    row, width, tokens = MIXERS[name], 16, 300
    mixer: Any = row.fresh(width).eval()
    x = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if row.is_causal:
            cache = mixer.new_cache(2, x.device, x.dtype)
            decoded = torch.cat([mixer(x[:, t : t + 1], None, cache) for t in range(tokens)], 1)
            require(bool((decoded - mixer(x)).abs().max() < 1e-4), f"{name}: decoding differs from the whole")
            require(leak(mixer, width).before == 0, f"{name}: the future reaches the past")
        else:
            mask = torch.ones(2, tokens)
            mask[0, 200:] = 0
            alone = mixer(x[:1, :200])
            require(bool((mixer(x, mask)[:1, :200] - alone).abs().max() < 1e-4), f"{name}: padding changes a sequence")


def attention(x: Tensor, is_causal: bool) -> Tensor:
    """Scaled dot-product attention of x [1, T, D] with itself, without projections."""
    heads = x.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=is_causal)


def measure(
    contenders: list[Contender], lengths: tuple[int, ...], width: int, passes: str, device: torch.device
) -> list[Curve]:
    """Time and peak memory of all contenders, interleaved at each length."""
    curves = [Curve({}, {}) for _ in contenders]
    left_out: set[int] = set()
    for length in lengths:
        x = torch.randn(1, length, width, device=device)
        calls: dict[str, Callable[[], object]] = {}
        slowest = 0.0
        for number, contender in enumerate(contenders):
            if number in left_out or length > contender.longest:
                continue
            call = _call(contender, x, passes)
            if length == lengths[0]:
                call()  # what is loaded at the first call is not its memory
            started = time.perf_counter()
            peak = peak_bytes(call, device)
            seconds = time.perf_counter() - started
            if peak is not None:
                curves[number].peak[length] = peak
            calls[str(number)] = call
            slowest = max(slowest, seconds)
            if seconds * (2 if contender.name in MIXERS else 4) > BUDGET:
                left_out.add(number)
        timings = interleaved(calls, ROUNDS if slowest < SHORT else FEW_ROUNDS)
        for index, timing in timings.items():
            curves[int(index)].ms[length] = timing.median * 1e3
    return curves


def _mixer(name: str, width: int, device: torch.device) -> Contender:
    mixer = MIXERS[name].fresh(width).eval().to(device)
    return Contender(name, MIXERS[name].is_causal, mixer, tuple(mixer.parameters()))


def _attentions(width: int, causal: bool, device: torch.device) -> list[Contender]:
    found = [Contender(SDPA, causal, partial(attention, is_causal=causal))]
    layer, block = Attention(width, causal), SpectralMLPBlock(Attention(width, causal, projections=False))
    for name, own in ((WITH_PROJECTIONS, layer), (IN_BLOCK, block)):
        module = own.eval().to(device)
        found.append(Contender(name, causal, module, tuple(module.parameters()), LONGEST))
    return found


class Attention(nn.Module):
    """Attention of x with itself as a mixer without padding or cache."""

    def __init__(self, width: int, is_causal: bool, *, projections: bool = True) -> None:
        """Draw the projections, if any."""
        super().__init__()
        self.width, self.is_causal = width, is_causal
        self.inputs = nn.Linear(width, 3 * width) if projections else None
        self.output = nn.Linear(width, width) if projections else None

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: object = None) -> Tensor:  # noqa: ARG002 - as every mixer
        """[1, T, D] to [1, T, D]."""
        parts = (x, x, x) if self.inputs is None else self.inputs(x).chunk(3, -1)
        query, key, value = (part.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in parts)
        heads = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        y = heads.transpose(1, 2).flatten(2)
        return y if self.output is None else self.output(y)

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:  # noqa: ARG002 - as every mixer
        """It has none.

        Raises:
            CausalityError: always.
        """
        refuse_cache("attention")


def _call(contender: Contender, x: Tensor, passes: str) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            contender.mix(x)
        _wait(x.device)

    grads: list[Tensor] = []  # made by what comes after a mixer

    def both() -> None:
        inputs = (x.detach().requires_grad_(), *contender.parameters)
        y = contender.mix(inputs[0])
        if not grads:
            grads.append(torch.ones_like(y))
        torch.autograd.grad(y, inputs, grads[0])
        _wait(x.device)

    return forward if passes == FORWARD else both


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_row(contender: Contender, passes: str, curve: Curve, lengths: tuple[int, ...]) -> Row:
    row = _head(contender, passes)
    row |= {f"ms at {length}": curve.ms.get(length, "") for length in lengths}
    grown = NEAR in curve.ms and FAR in curve.ms
    exponent = math.log(curve.ms[FAR] / curve.ms[NEAR], FAR / NEAR) if grown else None
    row["exponent"] = "" if exponent is None else exponent
    aimed = exponent is not None and contender.name in MIXERS
    return row | {
        "target": f"<= {EXPONENT}" if aimed else "",
        "met": exponent <= EXPONENT if aimed and exponent is not None else "",
    }


def _beside(name: str) -> dict[str, None]:
    """The attentions that a contender is compared with."""
    return dict.fromkeys((SDPA, LIKE.get(name, SDPA))) if name in MIXERS else {}


def _ratio_row(head: Row, own: Curve, other: Curve, lengths: tuple[int, ...]) -> Row:
    ratios = {
        length: other.ms[length] / own.ms[length] for length in lengths if length in other.ms and length in own.ms
    }
    row = head | {f"times faster at {length}": ratios.get(length, "") for length in lengths}
    if head["beside"] != LIKE.get(str(head["mixer"]), SDPA):
        return row | {"target": "", "met": ""}  # the mixer does more than that attention
    return row | {
        "target": f"> 1 from {AHEAD_FROM}",
        "met": all(ratio > 1 for length, ratio in ratios.items() if length >= AHEAD_FROM),
    }


def _memory_row(contender: Contender, passes: str, curve: Curve, lengths: tuple[int, ...]) -> Row:
    at = {f"MB at {length}": curve.peak[length] / 1e6 if length in curve.peak else "" for length in lengths[::3]}
    return _head(contender, passes) | at


def _head(contender: Contender, passes: str) -> Row:
    return {"mixer": contender.name, "causal": contender.is_causal, "pass": passes}


def plot(rows: list[Row], file: Path) -> None:
    """Draw the times of `run` over the length, both axes logarithmic.

    Args:
        rows: from `run`.
        file: where to; the ending decides the format.

    Raises:
        BackendError: when matplotlib is not installed.
    """
    panels: dict[str, Mapping[str, list[tuple[int, float]]]] = {}
    for passes in (FORWARD, BOTH):
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["pass"] != passes or "exponent" not in row:
                continue
            points = [(length, row.get(f"ms at {length}", "")) for length in LENGTHS]
            name = f"{row['mixer']}{', causal' if row['mixer'] not in MIXERS and row['causal'] else ''}"
            grown = f"  T^{float(str(row['exponent'])):.2f}" if row["exponent"] != "" else ""
            curves[name + grown] = [(length, float(str(ms))) for length, ms in points if ms != ""]
        panels[passes] = curves
    plot_lengths(panels, file)
