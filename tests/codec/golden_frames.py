"""Frames of every kind with the codes that they decode to, for ever: files in tests/codec/golden.

Those in its folder ``long`` have states of 64 bits, as frames had at first, and are no longer written.

``python -m tests.codec.golden_frames`` writes the files of new cases. It never changes one that is there: what old
frames decode to must not change, and a new kind of frame gets new cases.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spectral_surgery.codec.frame_bytes import encode_frame
from tests.support.codes import Codes, integers, lattice_points

FOLDER = Path(__file__).parent / "golden"
LONG = FOLDER / "long"


class Golden(NamedTuple):
    """A frame and what it decodes to."""

    frame: bytes
    codes: Codes


def _random() -> np.random.Generator:
    return np.random.default_rng(0)


def _far(codes: Codes) -> Codes:
    """Some codes that are too large for the symbols; points of the lattice stay points of it."""
    codes[5, ::7] = codes[5, ::7] % 4 + 40000
    return codes


def _tiled(codes: Codes, times: int) -> Codes:
    """The codes side by side: a large frame whose codes take few bytes here."""
    return np.tile(codes, (1, times))


CASES: dict[str, Callable[[], Codes]] = {
    "zeros-int8": lambda: np.zeros((64, 9), np.int8),
    "zeros-int16": lambda: np.zeros((7, 3), np.int16),
    "integers-int8": lambda: integers(_random(), (70, 9), 2, np.int8),
    "integers-int16-low-bits": lambda: integers(_random(), (33, 7), 500, np.int16),
    "integers-int32-low-bits": lambda: integers(_random(), (20, 11), 1e8),
    "integers-int32-list": lambda: _far(integers(_random(), (40, 17), 1)),
    "integers-int8-4-lanes": lambda: integers(_random(), (97, 88), 2, np.int8),
    "integers-int8-16-lanes": lambda: _tiled(integers(_random(), (97, 16), 12, np.int8), 21),
    "integers-int8-64-lanes": lambda: _tiled(integers(_random(), (97, 48), 5, np.int8), 41),
    "one-row": lambda: integers(_random(), (1, 60), 5, np.int8),
    "one-symbol": lambda: np.full((35, 40), -3, np.int8),
    "lattice-int8": lambda: lattice_points(_random(), (64, 21), 1, np.int8),
    "lattice-int8-shorter-blocks": lambda: lattice_points(_random(), (51, 21), 1, np.int8),
    "lattice-int8-short-blocks-alone": lambda: lattice_points(_random(), (13, 40), 1, np.int8),
    "lattice-int16-low-bits": lambda: lattice_points(_random(), (37, 19), 500, np.int16),
    "lattice-int32-low-bits": lambda: lattice_points(_random(), (32, 19), 1e6),
    "lattice-int32-list": lambda: _far(lattice_points(_random(), (70, 29), 1)),
    "lattice-int8-4-lanes": lambda: lattice_points(_random(), (129, 128), 0.6, np.int8),
    "lattice-int8-16-lanes": lambda: _tiled(lattice_points(_random(), (97, 16), 6, np.int8), 21),
    "lattice-int8-64-lanes": lambda: _tiled(lattice_points(_random(), (97, 36), 12, np.int8), 31),
    "turned-int8": lambda: np.ascontiguousarray(lattice_points(_random(), (70, 37), 1, np.int8).T),
}


def read(file: Path) -> Golden:
    """One file."""
    body = json.loads(file.read_text(encoding="utf-8"))
    frame, codes = (zlib.decompress(base64.b64decode(body[name])) for name in ("frame", "codes"))
    return Golden(frame, np.frombuffer(codes, body["dtype"]).reshape(body["shape"]))


def write(file: Path, codes: Codes) -> None:
    """A new file. Raises FileExistsError where there is one."""
    dtype = codes.dtype.newbyteorder("<")
    body = {"shape": codes.shape, "dtype": dtype.str}
    for name, data in (("frame", encode_frame(codes)), ("codes", codes.astype(dtype).tobytes())):
        body[name] = base64.b64encode(zlib.compress(data, 9)).decode()
    with file.open("x", encoding="utf-8") as out:
        out.write(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case, make in CASES.items():
        if not (FOLDER / f"{case}.json").exists():
            write(FOLDER / f"{case}.json", make())
            print(f"{case}: written")
