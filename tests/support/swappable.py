"""Tiny models of all families that can be swapped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.compressed import GPT2, LLAMA, TEXT

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("AutoModelForMaskedLM", TEXT),
    "roberta": ("AutoModelForSequenceClassification", TEXT),
    "vit": ("AutoModelForImageClassification", TEXT | {"image_size": 16, "patch_size": 8}),
    "gpt2": ("AutoModelForCausalLM", GPT2),
    "llama": ("AutoModelForCausalLM", LLAMA),
    "qwen2": ("AutoModelForCausalLM", LLAMA),
    "qwen3": ("AutoModelForCausalLM", LLAMA | {"head_dim": 8}),
}
CAUSAL = ("gpt2", "llama", "qwen2", "qwen3")


def model_of(family: str, **settings: Any) -> Any:
    """A random model in eval mode, always the same."""
    import transformers

    auto, own = MODELS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **own, **settings)
        return getattr(transformers, auto).from_config(config).eval()


def mixer_of(family: str) -> str:
    """A mixer that starts as the identity and is allowed in a family."""
    return "causal_fftnet" if family in CAUSAL else "fftnet"


def shake(model: Any) -> None:
    """Random values for the parameters of all mixers, which start as the identity and would hide what is wrong."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".mixer." in name:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def inputs_of(family: str, tokens: int = 12) -> dict[str, Tensor]:
    """A fixed batch of two."""
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}
    return {"input_ids": torch.randint(3, 96, (2, tokens), generator=torch.Generator().manual_seed(2))}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of a batch."""
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found
