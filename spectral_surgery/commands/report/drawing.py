"""Charts as shapes of SVG: geometry is here, colours are classes of the style sheet, the template writes the tags."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

WIDTHS = (880, 360)  # pixels of the drawing for a wide window or paper, and of that for a telephone
CHARACTER = 6.2  # pixels that one takes in a label, on the average
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 26, 42  # margins of a plane
_LOG_TICKS = ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,))  # in each decade, the first that are not too many
_LABEL_PLACES = ((8, 4), (8, -9), (8, 17), (-8, 4), (-8, -9), (-8, 17))  # beside a point, the best first

Box = tuple[float, float, float, float]  # x, y, width, height
Corners = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Shape:
    """One element of a drawing.

    Attributes:
        tag: rect, circle, path or text.
        tip: what pointing at it says.
    """

    tag: str
    attributes: Mapping[str, object]
    text: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Drawing:
    """Shapes on a canvas, in pixels."""

    width: int
    height: int
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Point:
    """A value in a chart: where it is, what pointing at it says, and the name beside it, if any."""

    x: float
    y: float
    tip: str = ""
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one kind: a class of the style sheet, and whether a line joins them."""

    name: str
    kind: str
    points: tuple[Point, ...]
    joined: bool = True
    dotted: bool = True


@dataclass(frozen=True)
class Axis:
    """Values from low to high on pixels from start to stop."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    ticks: tuple[float, ...] = field(default=())

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)


def axis(
    values: Sequence[float], start: float, stop: float, *, log: bool = False, zero: bool = False, span: float = 0.0
) -> Axis:
    """An axis with round numbers at its ticks, and a little room beyond the values.

    Args:
        values: to be shown, at least one; positive on a logarithmic axis.
        start: pixel of the least one.
        stop: pixel of the largest one.
        span: it covers at least, of a logarithmic axis as a ratio, so that noise does not look like a difference.
    """
    low, high = min(values), max(values)
    if log:
        room = 1.15 * max(1.0, math.sqrt(span * low / high))
        low, high = low / room, high * room
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in _LOG_TICKS:
            ticks = tuple(tick for power in powers for m in digits if low <= (tick := m * 10.0**power) <= high)
            if 1 < len(ticks) <= 7:
                return Axis(low, high, start, stop, log=True, ticks=ticks)
    room = max(0.04 * (high - low), (span - high + low) / 2) or 0.05 * abs(high) or 0.5
    low, high = (0.0 if zero else low if log else low - room), high + room
    return Axis(low, high, start, stop, log=log, ticks=_ticks(low, high, max(4, int(abs(stop - start) // 80))))


def _ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    least = (high - low) / count
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= least * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return tuple(round((first + n) * step, 12) for n in range(int(high / step - first + 1e-9) + 1))


def box(place: Box, kind: str, tip: str = "") -> Shape:
    """A rectangle."""
    x, y, width, height = place
    sides = {"x": x, "y": y, "width": max(width, 0.5), "height": max(height, 0.5)}
    return Shape("rect", {"class": kind, **{name: round(value, 1) for name, value in sides.items()}}, tip=tip)


def text(x: float, y: float, words: str, kind: str = "tick", anchor: str = "start") -> Shape:
    """A line of text: it begins, ends or has its middle at x."""
    return Shape("text", {"class": kind, "x": round(x, 1), "y": round(y, 1), "text-anchor": anchor}, words)


def line(points: Sequence[tuple[float, float]], kind: str) -> Shape:
    """A line through points."""
    return Shape("path", {"class": kind, "d": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)})


def dot(x: float, y: float, kind: str, tip: str, radius: float = 3.5) -> Shape:
    """A filled circle."""
    return Shape("circle", {"class": kind, "cx": round(x, 1), "cy": round(y, 1), "r": radius}, tip=tip)


def number(value: float) -> str:
    """A number for people: thousands are marked, fractions have four digits at most."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def both(draw: Callable[[int], Drawing]) -> tuple[Drawing, ...]:
    """A chart drawn for each of WIDTHS."""
    return tuple(map(draw, WIDTHS))


def chart(
    series: Sequence[Series],
    names: tuple[str, str],
    *,
    curve: Callable[[float], float] | None = None,
    log: bool = False,
    spans: tuple[float, float] = (0.0, 0.0),
    mark: tuple[float, str] | None = None,
    level: tuple[float, str] | None = None,
) -> tuple[Drawing, ...]:
    """Points and lines over two numbers.

    Args:
        series: with at least one point in all.
        names: of the axes, with units.
        curve: drawn over all of x.
        spans: that the axes cover at least; see `axis`.
        mark: an x to be marked by a vertical line, and its name.
        level: a y to be marked by a horizontal line, and its name.
    """

    def draw(width: int) -> Drawing:
        height = 340 if width > 500 else 280
        xs = [p.x for s in series for p in s.points] + ([mark[0]] if mark else [])
        ys = [p.y for s in series for p in s.points] + ([level[0]] if level else [])
        x = axis(xs, _LEFT, width - _RIGHT, span=spans[0])
        across = [x.low + (x.high - x.low) * step / 60 for step in range(61)]
        if curve is not None:
            ys += [curve(value) for value in across]
        y = axis(ys, height - _BOTTOM, _TOP, log=log, span=spans[1])
        shapes = [*_grid(x, y, width, height, names), *_marks(x, y, mark, level)]
        if curve is not None:
            shapes.append(line([(x.at(value), y.at(curve(value))) for value in across], "curve"))
        for drawn in series:
            shapes += _drawn(drawn, x, y)
        return Drawing(width, height, (*shapes, *_labels(series, x, y)))

    return both(draw)


def _grid(x: Axis, y: Axis, width: int, height: int, names: tuple[str, str]) -> list[Shape]:
    shapes = []
    for tick in y.ticks:
        shapes.append(line([(x.start, y.at(tick)), (x.stop, y.at(tick))], "grid"))
        shapes.append(text(x.start - 7, y.at(tick) + 4, number(tick), anchor="end"))
    shapes += [text(x.at(tick), y.start + 17, number(tick), anchor="middle") for tick in x.ticks]
    shapes.append(line([(x.start, y.start), (x.stop, y.start)], "axis"))
    shapes.append(text(width - _RIGHT, height - 6, names[0], "name", "end"))
    return [*shapes, text(4, 13, names[1], "name")]


def _marks(x: Axis, y: Axis, mark: tuple[float, str] | None, level: tuple[float, str] | None) -> list[Shape]:
    shapes = []
    if mark is not None:
        at = x.at(mark[0])
        late = at > (x.start + x.stop) / 2
        shapes.append(line([(at, y.start), (at, y.stop)], "mark"))
        shapes.append(text(at + (-5 if late else 5), y.stop + 9, mark[1], "name", "end" if late else "start"))
    if level is not None:
        shapes.append(line([(x.start, y.at(level[0])), (x.stop, y.at(level[0]))], "mark"))
        shapes.append(text(x.stop, y.at(level[0]) - 5, level[1], "name", "end"))
    return shapes


def _drawn(series: Series, x: Axis, y: Axis) -> list[Shape]:
    at = [(x.at(point.x), y.at(point.y), point) for point in series.points]
    shapes = [line([(px, py) for px, py, _ in at], f"line {series.kind}")] if series.joined and len(at) > 1 else []
    if series.dotted or len(at) == 1:
        shapes += [dot(px, py, f"dot {series.kind}", point.tip) for px, py, point in at]
    return shapes


def _labels(series: Sequence[Series], x: Axis, y: Axis) -> list[Shape]:
    """Names beside their points, where they cover neither each other nor the points if there is such a place."""
    points = [point for curve in series for point in curve.points if point.label]
    taken = [(x.at(p.x) - 5, y.at(p.y) - 5, x.at(p.x) + 5, y.at(p.y) + 5) for p in points]
    shapes = []
    for point in points:
        width, px, py = CHARACTER * len(point.label), x.at(point.x), y.at(point.y)
        costs: list[tuple[float, int, Corners]] = []
        for right, down in _LABEL_PLACES:
            left = px + right if right > 0 else px + right - width
            place = (left, py + down - 10, left + width, py + down + 2)
            outside = max(0.0, x.start - left) + max(0.0, left + width - x.stop)
            costs.append((100 * outside + sum(_shared(place, other) for other in taken), len(costs), place))
        _, best, place = min(costs)
        taken.append(place)
        right, down = _LABEL_PLACES[best]
        shapes.append(text(px + right, py + down, point.label, "label", "start" if right > 0 else "end"))
    return shapes


def _shared(one: Corners, other: Corners) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True)
class Group:
    """A bar: its name, its height, and the values of its parts, which are drawn as points on it."""

    name: str
    value: float
    tip: str
    parts: tuple[tuple[float, str], ...] = ()


def bars(groups: Sequence[Group], name: str) -> tuple[Drawing, ...]:
    """A bar for each group, from 0, in their order.

    Args:
        groups: at least one.
        name: of the values, with their unit.
    """

    def draw(width: int) -> Drawing:
        height = 240
        y = axis([v for g in groups for v in (g.value, *(part for part, _ in g.parts))], 200, _TOP, zero=True)
        x = Axis(0, len(groups), _LEFT, width - _RIGHT)
        each = (x.stop - x.start) / len(groups)
        shapes = _grid(x, y, width, height, ("", name))
        every = math.ceil(max(CHARACTER * len(group.name) + 8 for group in groups) / each)
        turned = every > 1 and any(not group.name.isdigit() for group in groups)
        for place, group in enumerate(groups):
            middle, wide = x.at(place + 0.5), min(0.72 * each, 46)
            top = y.at(group.value)
            shapes.append(box((middle - wide / 2, top, wide, 200 - top), "bar", group.tip))
            shapes += [dot(middle, y.at(value), "dot part", tip, 2.5) for value, tip in group.parts]
            if turned and not group.name.isdigit():  # a long name beside numbers: its first letters will do
                letters = max(3, int(each / CHARACTER))
                shapes.append(text(middle, 217, shortened(group.name, letters), anchor="middle"))
            elif turned or place % every == 0:
                shapes.append(text(middle, 217, group.name, anchor="middle"))
        return Drawing(width, height, tuple(shapes))

    return both(draw)


def shortened(words: str, letters: int) -> str:
    """Words, cut to a number of letters."""
    return words if len(words) <= letters else words[: max(letters - 1, 0)] + "…"
