"""Plots of what spectra promise: energy compaction, rate and distortion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spectral_surgery.commands.inspect import DENSITIES, RATES, Spectrum
from spectral_surgery.plotting import new_figure


def plot_spectra(spectra: Sequence[Spectrum], file: Path, title: str) -> None:
    """Save energy compaction and rate-distortion of a checkpoint as one PNG."""
    figure = new_figure(11, 4.5)
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
