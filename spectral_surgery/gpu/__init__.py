"""Kernels for GPUs, in Triton; imported when one is first needed, since Triton comes with torch for CUDA and ROCm only.

Each file is a kernel. What calls it, beside a plain reference, is in the room it serves; `benchmarks gpu_static`
compiles all of them for chips that need not be there.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch

_LEAST_TRITON = (3, 6)  # 3.4 does not compile few_tokens; 3.6 and 3.9 do
_LEAST_CHIP = (8, 0)  # the first with bfloat16 in its matrix units

_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether kernels run on every GPU here; a warning says once what is in the way."""
    if find_spec("triton") is None:
        return False
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _LEAST_TRITON:
        _log.warning("GPU kernels need Triton 3.6 or newer, got %s. Products take slower ways.", triton.__version__)
        return False
    chips = range(torch.cuda.device_count() if torch.version.hip is None else 0)
    old = [torch.cuda.get_device_name(chip) for chip in chips if torch.cuda.get_device_capability(chip) < _LEAST_CHIP]
    if old:
        _log.warning("GPU kernels need compute capability 8.0, which %s lacks. Products take slower ways.", old[0])
    return not old
