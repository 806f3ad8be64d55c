"""Plots of times over lengths, and of perplexities over rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from spectral_surgery.plotting import new_figure


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
    """Save perplexity over bits per weight as an image; the perplexities, which may be huge, on a logarithmic axis.

    Args:
        curves: by method: (bits per weight, perplexity, name of the point).
        level: perplexity of the dense model.
        file: where to; the ending decides the format.

    Raises:
        BackendError: when matplotlib is not installed.
    """
    figure = new_figure(9, 6.5)
    axes = figure.subplots()
    axes.axhline(level, color="black", linestyle="--", linewidth=1, label=f"dense bfloat16, {level:.2f}")
    for number, (method, points) in enumerate(curves.items()):
        ordered = sorted(points)
        bits, perplexities = [point[0] for point in ordered], [point[1] for point in ordered]
        ours = method.startswith("spectral")
        axes.semilogy(
            bits, perplexities, "os^Dv"[number % 5] + ("-" if ours else ":"), linewidth=2 if ours else 1, label=method
        )
        for x, y, name in ordered:
            axes.annotate(name, (x, y), (5, 5), textcoords="offset points", fontsize=7)
    axes.set(xlabel="bits per weight, everything counted", ylabel="perplexity")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
