"""Plots, for people who would rather look: the only importer of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spectral_surgery.errors import BackendError
from spectral_surgery.workflows.inspect import DENSITIES, RATES, Spectrum


def plot_spectra(spectra: Sequence[Spectrum], file: Path, title: str) -> None:
    """Save energy compaction and rate-distortion of a checkpoint as one PNG.

    Args:
        spectra: from inspect.
        file: where to; the ending decides the format.
        title: above the plot.

    Raises:
        BackendError: when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError("--plot: matplotlib is not installed. pip install 'spectral-surgery[plot]'") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    weight = np.array([spectrum.weights for spectrum in spectra], float)
    share = weight / weight.sum()

    for spectrum in spectra:
        left.plot(DENSITIES, spectrum.energy_kept, color="tab:blue", alpha=0.15, linewidth=1)
        right.plot(RATES, spectrum.errors, color="tab:blue", alpha=0.15, linewidth=1)
    coefficients = share @ np.array([spectrum.energy_kept for spectrum in spectra])
    plain = share @ np.array([spectrum.energy_kept_weights for spectrum in spectra])
    left.plot(DENSITIES, coefficients, "o-", color="tab:blue", label="DCT coefficients (mean; each tensor faint)")
    left.plot(DENSITIES, plain, "s--", color="tab:orange", label="weights (mean)")
    left.set(xlabel="fraction kept, largest first", ylabel="energy kept", ylim=(0, 1.02), title="energy compaction")
    left.legend(loc="lower right")

    errors = share @ np.array([spectrum.errors for spectrum in spectra])
    rates = np.linspace(min(RATES), max(RATES), 50)
    right.plot(RATES, errors, "o-", color="tab:blue", label="quantised spectrum (mean; each tensor faint)")
    right.plot(rates, 2.0**-rates, ":", color="black", label=r"Gaussian bound $2^{-R}$")
    right.set(xlabel="bits per weight", ylabel="relative error", yscale="log", title="rate and distortion")
    right.legend(loc="upper right")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def plot_training(
    train: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, dict[str, float]]],
    measure: str,
    best_step: int,
    file: Path,
) -> bool:
    """Save the course of a training as a PNG: loss of both sides, and the measure that decides.

    Args:
        train: (step, loss) of training batches.
        held_out: (step, measures) of the held-out examples, "loss" among them.
        measure: which of them decides.
        best_step: marked.
        file: where to.

    Returns:
        Whether it was: without matplotlib there is no plot.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11 if measure != "loss" else 6.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if measure != "loss" else 1, squeeze=False)[0]
    if train:
        panels[0].plot(*zip(*train, strict=True), color="tab:blue", alpha=0.6, label="training batches")
    steps = [step for step, _ in held_out]
    panels[0].plot(steps, [m["loss"] for _, m in held_out], "o-", color="tab:orange", label="held out")
    panels[0].set(xlabel="step", ylabel="loss", title="loss")
    if measure != "loss":
        panels[1].plot(steps, [m[measure] for _, m in held_out], "o-", color="tab:orange", label="held out")
        panels[1].set(xlabel="step", ylabel=measure, title=measure)
    for axes in panels:
        axes.axvline(best_step, color="black", linestyle=":", label=f"kept: step {best_step}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)
    return True


def plot_lengths(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], file: Path) -> None:
    """Save time over sequence length as an image, both axes logarithmic.

    Args:
        panels: by title, curves by label: (tokens, milliseconds).
        file: where to; the ending decides the format.

    Raises:
        BackendError: when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError("--plot: matplotlib is not installed. pip install 'spectral-surgery[plot]'") from None
    figure = Figure(figsize=(7.5 * len(panels), 6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, curves) in zip(grid[0], panels.items(), strict=True):
        for number, (label, points) in enumerate(curves.items()):
            line = "--" if label.startswith("SDPA") else "-"
            axes.loglog(*zip(*points, strict=True), line, marker="os^Dv"[number % 5], markersize=4, label=label, base=2)
        axes.set(xlabel="tokens", ylabel="milliseconds", title=title)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
