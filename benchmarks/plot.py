"""Plots of times over lengths, and of perplexities over rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path

from spectral_surgery.plotting import new_figure

_FOOT = 1.001  # the least perplexity drawn, over that of the dense model
_RATIOS = (1.001, 1.003, 1.01, 1.03, 1.1, 1.2, 1.4, 2, 4, 10, 30, 100, 1e3, 1e4, 1e6, 1e8)
_BESIDE = ((6, 5), (6, -11), (-6, 5), (-6, -11))  # where a curve has its names, in points


def plot_lengths(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], file: Path) -> None:
    """Save time over sequence length as an image, both axes logarithmic.

    Args:
        panels: by title, curves by label: (tokens, milliseconds).
        file: where to; the ending decides the format.

    Raises:
        BackendError: when matplotlib is not installed.
    """
    figure = new_figure(7.5 * len(panels), 6)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, curves) in zip(grid[0], panels.items(), strict=True):
        for number, (label, points) in enumerate(curves.items()):
            line = "--" if label.startswith("SDPA") else "-"
            axes.loglog(*zip(*points, strict=True), line, marker="os^Dv"[number % 5], markersize=4, label=label, base=2)
        axes.set(xlabel="tokens", ylabel="milliseconds", title=title)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def plot_rates(curves: Mapping[str, Sequence[tuple[float, float, str]]], level: float, file: Path) -> None:
    """Save perplexity over bits per weight as an image.

    The axis of perplexities is logarithmic in nats above the dense model, so that 1 % and a factor of a million are on
    one picture; a perplexity that is not above it is drawn at the foot.

    Args:
        curves: by method: (bits per weight, perplexity, name of the point).
        level: perplexity of the dense model.
        file: where to; the ending decides the format.

    Raises:
        BackendError: when matplotlib is not installed.
    """
    figure = new_figure(9, 6.5)
    axes = figure.subplots()
    for number, (method, points) in enumerate(curves.items()):
        above = sorted((bits, max(log(perplexity / level), log(_FOOT)), name) for bits, perplexity, name in points)
        ours = method.startswith("spectral")
        axes.plot(
            [bits for bits, _, _ in above],
            [height for _, height, _ in above],
            "os^Dv"[number % 5] + ("-" if ours else ":"),
            linewidth=2 if ours else 1,
            label=method,
        )
        across, up = _BESIDE[number % len(_BESIDE)]
        for bits, height, name in above:
            side = "left" if across > 0 else "right"
            axes.annotate(name, (bits, height), (across, up), textcoords="offset points", fontsize=7, ha=side)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.margins(0.15)
    low, high = axes.get_ylim()
    ratios = [ratio for ratio in _RATIOS if low <= log(ratio) <= high]
    axes.set_yticks([log(ratio) for ratio in ratios], [f"{ratio * level:.3g}" for ratio in ratios])
    title = f"perplexity (of the dense model in bfloat16: {level:.2f})"
    axes.set(xlabel="bits per weight, everything counted", ylabel=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
