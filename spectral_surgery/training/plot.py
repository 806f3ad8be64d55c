"""Plots of losses over the steps of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectral_surgery.errors import BackendError
from spectral_surgery.plotting import new_figure


def plot_training(
    train: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, dict[str, float]]],
    measure: str,
    best_step: int,
    file: Path,
) -> bool:
    """Save the course of a training as a PNG: loss of both sides, and the measure that decides.

    Returns whether it was: without matplotlib there is no plot.
    """
    try:
        figure = new_figure(11 if measure != "loss" else 6.5, 4.5)
    except BackendError:
        return False
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
