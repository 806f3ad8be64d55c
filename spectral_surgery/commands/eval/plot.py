"""Plots of tables of models: what was lost over what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spectral_surgery.commands.eval.table import ModelRow
from spectral_surgery.errors import ConfigError
from spectral_surgery.plotting import new_figure

# measures of a table of models, the first that there is: how it becomes a distortion, and what that is called
_DISTORTIONS: dict[str, tuple[Callable[[float], float], str]] = {
    "kl": (lambda kl: kl, "KL divergence from the original, nats per token"),
    "cosine": (lambda cosine: 1 - cosine, "1 - cosine of sentence embeddings with the original's"),
    "relative_error": (lambda error: error, "relative error of the weights"),
}
# colour, marker and name in the legend of what a point may belong to; ours are the others
_FAMILIES = {
    "gptq": ("tab:red", "s", "GPTQ"),
    "hqq": ("tab:green", "^", "HQQ"),
    "int": ("tab:gray", "v", "round to nearest"),
    "nf4": ("tab:brown", "D", "NormalFloat"),
    "sparsegpt": ("tab:orange", "P", "SparseGPT"),
    "wanda": ("tab:purple", "X", "Wanda"),
    "prune": ("tab:pink", "p", "magnitude pruning"),
    "svd": ("tab:olive", "d", "truncated SVD"),
}
_OURS = {"calibrated": "tab:blue", "healed": "tab:cyan", "calibrated and healed": "navy", "data-free": "steelblue"}


def plot_rate_distortion(rows: Sequence[ModelRow], file: Path, title: str) -> None:
    """Save what each model of a table lost over what it takes, as one PNG; models of one method are joined.

    Raises:
        ConfigError: when no model lost anything.
    """
    rows = [row for row in rows if row.cost.relative_error > 0]
    measure = next((name for name in _DISTORTIONS if any(name in row.measures for row in rows)), "relative_error")
    distort, label = _DISTORTIONS[measure]
    lost = [(row, distort(row.measures.get(measure, row.cost.relative_error))) for row in rows]
    points = [(row, value) for row, value in lost if np.isfinite(value) and value > 0]
    if not points:
        raise ConfigError(
            "--plot: expected models that differ from the first, got none. Add compressed models or baselines."
        )
    figure = new_figure(10, 7)
    axes: Any = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    texts, lines = [], []
    for family in dict.fromkeys(row.family for row, _ in points):
        members = sorted(((row, value) for row, value in points if row.family == family), key=lambda p: _bits(p[0]))
        ours = family not in _FAMILIES
        colour, marker, name = _FAMILIES.get(family, (_OURS.get(family, "black"), "o", f"spectral_surgery, {family}"))
        at = np.array([(_bits(row), value) for row, value in members])
        width, size, above = (2.5, 9, 3) if ours else (1.2, 6, 2)
        axes.plot(*at.T, "-", marker=marker, color=colour, label=name, linewidth=width, markersize=size, zorder=above)
        lines.append(at)
        texts += [(row.short, xy, colour, ours) for (row, _), xy in zip(members, at, strict=True)]
    ticks = [bits for bits in (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 16, 32) if _within(bits, lines)]
    axes.set_xticks(ticks, [f"{bits:g}" for bits in ticks])
    axes.minorticks_off()
    axes.set(xlabel="stored bits per weight, everything counted", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    _put_labels(figure, axes, texts, lines)
    figure.savefig(file, dpi=130)


def _bits(row: ModelRow) -> float:
    return row.cost.bits_per_weight


def _within(bits: float, lines: Sequence[np.ndarray[Any, Any]]) -> bool:
    every = np.concatenate(lines)[:, 0]
    return bool(every.min() * 0.9 <= bits <= every.max() * 1.1)


def _put_labels(
    figure: Any,
    axes: Any,
    texts: Sequence[tuple[str, np.ndarray[Any, Any], str, bool]],
    lines: Sequence[np.ndarray[Any, Any]],
) -> None:
    """Name each point beside it, where the name covers least of other names, points and lines."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # where things are in pixels is known only then
    figure.set_layout_engine("none")
    renderer, per_point = figure.canvas.get_renderer(), figure.dpi / 72
    taken = [axes.get_legend().get_window_extent(renderer)]
    for line in map(axes.transData.transform, lines):
        taken += [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in line]
        taken += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for a, b in pairwise(line) for x, y in np.linspace(a, b, 20)]
    for name, at, colour, bold in sorted(texts, key=lambda text: not text[3]):
        weight = "bold" if bold else "normal"
        text = axes.annotate(
            name, at, (0, 0), textcoords="offset points", color=colour, fontsize=8, weight=weight, zorder=4,
            ha="center", va="center", arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5},
        )  # fmt: skip
        here = axes.transData.transform(at)
        size = text.get_window_extent(renderer)
        candidates = []
        for x, y in _places(size.width, size.height, per_point):
            box = Bbox.from_bounds(here[0] + x - size.width / 2, here[1] + y - size.height / 2, size.width, size.height)
            covered = sum(_shared(box, other) for other in taken) + 10 * _outside(box, axes.bbox)
            candidates.append((covered + 0.1 * float(np.hypot(x, y)), (x / per_point, y / per_point), box))
        _, offset, box = min(candidates, key=lambda place: place[0])
        text.set_position(offset)
        taken.append(box)


def _places(width: float, height: float, per_point: float) -> Iterator[tuple[float, float]]:
    """Centres that a name may have around its point, in pixels: on rings, the closest first."""
    for gap in (7, 16, 28, 42):
        for turn in np.arange(16) * np.pi / 8:
            x, y = float(np.cos(turn)), float(np.sin(turn))
            yield x * (width / 2 + gap * per_point), y * (height / 2 + gap * per_point)


def _shared(one: Any, other: Any) -> float:
    """Pixels that both boxes cover."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0) * max(height, 0))


def _outside(box: Any, frame: Any) -> float:
    """Pixels of a box that are not in the frame."""
    return float(box.width * box.height) - _shared(box, frame)
