"""Numbers coded without loss, and their pieces, for ever: files in tests/codec/planes.

``python -m tests.codec.golden_planes`` writes the files of new cases, and never changes one that is there.
Those in its folder ``long`` have frames with states of 64 bits, which are no longer written.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.codec.byte_planes import Centres, Layout, centres_of, encode_planes, layout_of, split
from tests.support.checkpoints import gaussian

FOLDER = Path(__file__).parent / "planes"
LONG = FOLDER / "long"


class Golden(NamedTuple):
    """A frame, how it is laid out, and the numbers that it decodes to."""

    pieces: list[bytes]
    layout: Layout
    centres: Centres
    numbers: np.ndarray


CASES: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "bfloat16": (lambda: gaussian(50, 41, dtype=torch.bfloat16), True),
    "float16": (lambda: gaussian(50, 41, dtype=torch.float16), True),
    "float32": (lambda: gaussian(30, 41), True),
    "float64": (lambda: gaussian(30, 21).double(), True),
    "float8": (lambda: (100 * gaussian(50, 41)).to(torch.float8_e4m3fn), True),
    "int64": (lambda: torch.arange(900), False),
}


def numbers_of(case: str) -> np.ndarray:
    tensor = CASES[case][0]().reshape(-1)
    return tensor.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")


def read(file: Path) -> Golden:
    """One file."""
    body = json.loads(file.read_text(encoding="utf-8"))
    pieces = [base64.b64decode(piece) for piece in body["pieces"]]
    layout = Layout(**body["layout"])
    numbers = np.frombuffer(base64.b64decode(body["numbers"]), f"<u{layout.size}")
    return Golden(pieces, layout, tuple(body["centres"]), numbers)


def write(file: Path, case: str) -> None:
    """A new file. Raises FileExistsError where there is one."""
    numbers, turned = numbers_of(case), CASES[case][1]
    layout, centres = layout_of(numbers.itemsize, len(numbers), turned=turned), centres_of(split(numbers, turned))
    pieces = encode_planes(numbers, layout, centres)
    body = {
        "layout": vars(layout),
        "centres": centres,
        "pieces": [base64.b64encode(piece).decode() for piece in pieces],
        "numbers": base64.b64encode(numbers.tobytes()).decode(),
    }
    with file.open("x", encoding="utf-8") as out:
        out.write(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        if not (FOLDER / f"{name}.json").exists():
            write(FOLDER / f"{name}.json", name)
            print(f"{name}: written")
