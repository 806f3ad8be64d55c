"""Plots of times over lengths."""

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
