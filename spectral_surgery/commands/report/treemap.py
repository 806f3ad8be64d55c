"""A treemap: rectangles whose areas are bytes, in groups, as square as they can be.

Source: Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spectral_surgery.commands.report.drawing import CHARACTER, Box, Drawing, Shape, both, box, shortened, text

_HEADER = 17  # pixels for the name of a group
_GAP = 2
_CUT = 7  # letters below which a cut name says nothing


@dataclass(frozen=True)
class Tile:
    """A rectangle: its name, bytes, class of the style sheet, and what pointing at it says."""

    name: str
    nbytes: int
    kind: str
    tip: str


def treemap(groups: Mapping[str, Sequence[Tile]]) -> tuple[Drawing, ...]:
    """Tiles in groups, the largest first; those without bytes are left out."""
    sizes = {name: float(sum(tile.nbytes for tile in tiles)) for name, tiles in groups.items()}
    names = sorted((name for name in groups if sizes[name]), key=lambda name: _rank(sizes[name]))

    def draw(width: int) -> Drawing:
        height = 420 if width > 500 else 460
        shapes: list[Shape] = []
        places = squarified([sizes[name] for name in names], (0.0, 0.0, float(width), float(height)))
        for name, place in zip(names, places, strict=True):
            shapes += _group(name, groups[name], place)
        return Drawing(width, height, tuple(shapes))

    return both(draw)


def _group(name: str, tiles: Sequence[Tile], place: Box) -> list[Shape]:
    x, y, width, height = place[0], place[1], place[2] - 2 * _GAP, place[3] - 2 * _GAP
    header = _HEADER if height > 3 * _HEADER and width > 40 else 0
    shapes = [text(x + 2, y + 12, shortened(name, int((width - 4) / CHARACTER)), "group")] if header else []
    ordered = sorted((tile for tile in tiles if tile.nbytes), key=lambda tile: _rank(tile.nbytes))
    last = Counter(tile.name.rpartition(".")[2] for tile in tiles)
    inner = (x, y + header, max(width, 1.0), max(height - header, 1.0))
    for tile, (left, top, wide, high) in zip(
        ordered, squarified([float(tile.nbytes) for tile in ordered], inner), strict=True
    ):
        shapes.append(box((left, top, wide - 1, high - 1), f"tile {tile.kind}", tile.tip))
        letters = int((wide - 10) / CHARACTER)
        if high > 18 and (label := _label(tile.name, letters, last)):
            shapes.append(text(left + 5, top + 14, label, f"on {tile.kind}"))
    return shapes


def _rank(nbytes: float) -> int:
    """Larger ones first, but those of nearly one size, such as equal layers, in their order."""
    return -round(8 * math.log2(nbytes))


def _label(name: str, letters: int, last: Mapping[str, int]) -> str:
    """As much of the end of a dotted name as fits, if that says which one it is; else its beginning, if that does."""
    parts = name.split(".")
    ends = [".".join(parts[n:]) for n in range(len(parts))]
    cut = shortened(name, letters) if letters >= _CUT else ""
    return next((end for end in ends if len(end) <= letters and last[end] <= 1), cut)


def squarified(sizes: Sequence[float], place: Box) -> list[Box]:
    """Rectangles that fill a place, with areas in proportion to the sizes. ``sizes``: positive, about falling."""
    total = sum(sizes)
    areas = [size * place[2] * place[3] / total for size in sizes]
    places: list[Box] = []
    start = 0
    while start < len(areas):
        shorter = min(place[2], place[3])
        stop = start + 1
        while stop < len(areas) and _worst(areas[start : stop + 1], shorter) <= _worst(areas[start:stop], shorter):
            stop += 1
        row, place = _row(areas[start:stop], place)
        places += row
        start = stop
    return places


def _worst(row: Sequence[float], side: float) -> float:
    """The largest ratio of sides in a row along a side."""
    whole = sum(row)
    return max(side**2 * max(row) / whole**2, whole**2 / (side**2 * min(row)))


def _row(areas: Sequence[float], place: Box) -> tuple[list[Box], Box]:
    """Rectangles along the shorter side of a place, and what is left of it."""
    x, y, width, height = place
    whole, boxes = sum(areas), []
    if width >= height:
        thick = whole / height
        for area in areas:
            boxes.append((x, y, thick, area / thick))
            y += area / thick
        return boxes, (place[0] + thick, place[1], max(width - thick, 1e-9), height)
    thick = whole / width
    for area in areas:
        boxes.append((x, y, area / thick, thick))
        x += area / thick
    return boxes, (place[0], place[1] + thick, width, max(height - thick, 1e-9))
