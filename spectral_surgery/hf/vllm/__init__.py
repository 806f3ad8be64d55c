"""Compressed folders in vLLM, which calls `register` in each of its processes: an entry point of this package.

Two of its registries are used: one for the layers, one for the loader. The loader gives each compressed matrix under
the name of its weight, as a `LazyWeight`. A layer of ours takes the spectrum out; whatever else loads weights gets
a decoded tensor. So nothing here knows the models of vLLM, nor how they rename and pack what is stored.
Source: vLLM 0.32, `plugins`, `model_executor/layers/quantization` and `model_executor/model_loader`.
"""

from __future__ import annotations

from spectral_surgery.files.compressed.manifest import QUANT_METHOD
from spectral_surgery.hf.vllm.classes import STEM, classes

__all__ = ["register"]


def register() -> None:
    """Make vLLM know compressed folders; once more changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    made = classes()
    register_quantization_config(QUANT_METHOD)(made[f"{STEM}Config"])
    register_model_loader(QUANT_METHOD)(made[f"{STEM}Loader"])
