"""Charts that every kind of folder has: where its bytes are, and values layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add, attrgetter

from spectral_surgery.codec.encoded import EncodingReport
from spectral_surgery.commands.report.drawing import Group, Point, Series, bars, chart, number
from spectral_surgery.commands.report.page import Figure, Legend, size
from spectral_surgery.commands.report.records import layers, short
from spectral_surgery.commands.report.treemap import Tile, treemap

MARKS = 600  # shapes of a chart at most: of more, the largest tensors are drawn
_SHADES = (0.75, 1.5, 2.5, 3.5, 4.5, 6.0)  # bits per weight at which the next colour begins: between usual rates


@dataclass(frozen=True)
class Stored:
    """A tensor, or a layer of an adapter, as it is stored.

    Attributes:
        kind: class of the style sheet.
        said: about it, after its name and bytes.
    """

    name: str
    nbytes: int
    kind: str
    said: str = ""


def shade(bits: float) -> str:
    """The class of a tensor by its bits per weight, the same on every page."""
    return f"q{sum(bits >= edge for edge in _SHADES)}"


def shades(kinds: Sequence[str]) -> Legend:
    """What the classes of `shade` mean, of those that occur."""
    edges = [f"{edge:g}" for edge in _SHADES]
    names = [f"under {edges[0]}", *(f"{a} to {b}" for a, b in pairwise(edges)), f"{edges[-1]} and more"]
    return tuple((f"q{n}", f"{words} bits") for n, words in enumerate(names) if f"q{n}" in kinds)


def bytes_figure(stored: Sequence[Stored], legend: Legend, what: str = "tensor") -> tuple[Figure, ...]:
    """A treemap of what is stored, in groups of layers; none where nothing is."""
    largest = sorted((tensor for tensor in stored if tensor.nbytes), key=lambda tensor: -tensor.nbytes)
    if not largest:
        return ()
    rest = largest[MARKS:]
    of = layers(tensor.name for tensor in largest[:MARKS])
    by_name = {tensor.name: tensor for tensor in largest[:MARKS]}
    groups: dict[str, list[Tile]] = {}
    for name, layer in of.items():
        tensor = by_name[name]
        tip = f"{name}\n{size(tensor.nbytes)}" + (f", {tensor.said}" if tensor.said else "")
        groups.setdefault(layer, []).append(Tile(short(name, layer), tensor.nbytes, tensor.kind, tip))
    if rest:
        left = sum(tensor.nbytes for tensor in rest)
        groups["others"] = [Tile("others", left, "plain", f"{len(rest)} smaller ones\n{size(left)}")]
    total = sum(tensor.nbytes for tensor in largest)
    caption = f"Every {what} is a rectangle, its area the bytes it takes; {size(total)} in all."
    label = f"Treemap of {len(largest)} {what}s; the largest is {largest[0].name} with {size(largest[0].nbytes)}"
    return (Figure(f"Bytes by {what}", label, treemap(groups), caption, legend),)


def layer_figures(measured: Mapping[str, EncodingReport]) -> tuple[Figure, ...]:
    """Bars of bits and of error for each layer, with a point for each of its tensors."""
    drawn = set(sorted(measured, key=lambda name: -measured[name].weights)[:MARKS])
    members: dict[str, list[str]] = {}
    for name, layer in layers(measured).items():
        members.setdefault(layer, []).append(name)
    figures = []
    for title, unit, value in (
        ("Bits by layer", "stored bits per weight", attrgetter("bits_per_weight")),
        ("Error by layer", "relative error", attrgetter("relative_error")),
    ):
        groups = []
        for layer, names in members.items():
            whole = value(reduce(add, (measured[name] for name in names)))
            inside = tuple(
                (value(measured[name]), f"{name}\n{value(measured[name]):.4g} {unit}")
                for name in names
                if name in drawn
            )
            groups.append(Group(layer.removeprefix("layer "), whole, f"{layer}: {whole:.4g} {unit}", inside))
        worst = max(groups, key=lambda group: group.value)
        label = f"Bar chart of {unit} for {len(groups)} layers; the largest is {worst.name} with {worst.value:.4g}"
        figures.append(
            Figure(title, label, bars(groups, unit), f"Bars are layers, points their tensors{_some(measured)}.")
        )
    return tuple(figures)


def _some(marks: Sized) -> str:
    """What a caption adds where not all are drawn."""
    return f", the {MARKS} largest ones" if len(marks) > MARKS else ""


def size_bars(title: str, unit: str, values: Mapping[str, int]) -> tuple[Figure, ...]:
    """Bars of a whole number for each layer, summed over what is in it; none without values."""
    totals: dict[str, int] = {}
    for name, layer in layers(values).items():
        totals[layer] = totals.get(layer, 0) + values[name]
    if not totals:
        return ()
    groups = [
        Group(layer.removeprefix("layer "), total, f"{layer}: {total:,} {unit}") for layer, total in totals.items()
    ]
    label = f"Bar chart of {unit} for {len(groups)} layers, from {min(totals.values()):,} to {max(totals.values()):,}"
    return (Figure(title, label, bars(groups, unit)),)


def rate_figure(points: Sequence[tuple[str, float, float]], *, named: bool, what: str) -> tuple[Figure, ...]:
    """Rate and distortion beside the bound of a Gaussian source; none where nothing has an error.

    Args:
        points: name, bits per weight, relative error; those without an error are left out.
        named: whether names stand beside the points.
        what: a point is.
    """
    lossy = [(name, bits, error) for name, bits, error in points if error > 0][:MARKS]
    if not lossy:
        return ()
    marks = tuple(
        Point(bits, error, f"{name}\n{number(bits)} bits, error {number(error)}", name if named else "")
        for name, bits, error in lossy
    )
    drawings = chart(
        [Series(what, "first", marks, joined=False)],
        ("stored bits per weight", "relative error, logarithmic"),
        curve=lambda bits: 2.0**-bits,
        log=True,
        spans=(1.0, 4.0),
    )
    caption = (
        f"A point for each {what}{_some(points)}. The dashed line is 2 to the power of -R, the least error that R bits"
        " can leave of independent Gaussian numbers of one scale; weights that are not quite so can lie below it."
    )
    label = f"Scatter chart of relative error over bits per weight for {len(marks)} {what}s, with the Gaussian bound"
    legend = (("first", what), ("curve", "Gaussian bound"))
    return (Figure("Rate and distortion", label, drawings, caption, legend),)
