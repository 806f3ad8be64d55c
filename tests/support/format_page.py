"""The reader of frames that docs/format.md has: plain numpy, after the page and nothing else."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

PAGE = Path(__file__).parents[2] / "docs" / "format.md"


class Reader(Protocol):
    """`read_frame` of the page."""

    def __call__(self, frame: bytes, rows: int, columns: int) -> npt.NDArray[np.signedinteger[Any]]: ...


@cache
def page_reader() -> Reader:
    """`read_frame` as the page has it, without anything of the package."""
    (block,) = (text for text in python_blocks() if "def read_frame(" in text)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    reader: Reader = names["read_frame"]
    return reader


def python_blocks() -> list[str]:
    """All blocks of Python in the page."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
