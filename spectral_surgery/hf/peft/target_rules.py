"""Where PEFT reads target_modules otherwise than they are written, or refuses them: told before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

_FUSED = "PEFT takes this name for experts"
_READ_PAST = {("falcon_mamba", "dt_proj"), ("jamba", "dt_proj"), ("mamba", "dt_proj"), ("zamba", "dt_proj")}


def misread_by_peft(model_type: object, peft_type: str, layers: Iterable[str]) -> dict[str, str]:
    """The layers that PEFT does not adapt as they are named.

    Some models multiply by the weight of a layer without running it, so that an adapter has no effect. For LoRA, in
    models whose experts were layers before transformers 5, names such as gate_proj mean those experts, also where a
    dense layer has one of them; and layers that fused kernels of state space models read past are refused. Returns
    Reason by name; without PEFT, of the first kind alone.
    """
    leaves = {name: name.rpartition(".")[2] for name in layers}
    reasons = {
        name: "the model multiplies by its weight without running the layer"
        for name, leaf in leaves.items()
        if (model_type, leaf) in _READ_PAST
    }
    if peft_type != "LORA":
        return reasons
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return reasons
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    experts = conversion._MOE_TARGET_MODULE_MAPPING.get(pattern or "", {})
    settings = LoraConfig()
    for name, leaf in leaves.items():
        if leaf in experts:
            reasons[name] = _FUSED
        try:
            _check_lora_target_modules_mamba(settings, model, leaf)
        except ValueError:
            reasons[name] = "PEFT refuses LoRA on it, since fused kernels read its weight alone"
    return reasons
