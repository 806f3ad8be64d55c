"""Figures of matplotlib that need no display."""

from __future__ import annotations

from typing import Any

from spectral_surgery.errors import required


def new_figure(width: float, height: float) -> Any:
    """An empty figure with a canvas; its sides are in inches."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def require_matplotlib() -> None:
    """Say before long work that there will not be a plot. Raises BackendError when matplotlib is not installed."""
    required("matplotlib.figure", "draw plots", "'spectral-surgery[plot]'")
