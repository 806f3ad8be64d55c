"""The classes that vLLM is given: ours together with its base classes, made when it asks. It pickles some by name."""

from __future__ import annotations

from functools import cache
from typing import Any

from spectral_surgery.hf.vllm.layers import Settings, SpectralMethod
from spectral_surgery.hf.vllm.loader import FolderLoader

STEM = "SpectralSurgeryVllm"


@cache
def classes() -> dict[str, type]:
    """By name: of what a folder says of itself, of the loader, and of what layers compute with."""
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    pairs: dict[str, tuple[type, Any]] = {
        "Config": (Settings, QuantizationConfig),
        "Method": (SpectralMethod, LinearMethodBase),
        "Loader": (FolderLoader, DefaultModelLoader),
    }
    made = {
        f"{STEM}{end}": type(f"{STEM}{end}", bases, {"__doc__": bases[0].__doc__, "__module__": __name__})
        for end, bases in pairs.items()
    }
    made[f"{STEM}Config"].method = made[f"{STEM}Method"]  # type: ignore[attr-defined]
    return made


def __getattr__(name: str) -> type:
    if name.startswith(STEM) and name in classes():
        return classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
