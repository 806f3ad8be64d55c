"""Adapters that PEFT wrote, with every number changed, and what PEFT makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
IDS = torch.arange(3, 27).reshape(2, 12)


@dataclass(frozen=True)
class Merged:
    """A base, an adapter of it, and what PEFT answers.

    Attributes:
        base: folder of the base.
        adapter: folder of the adapter.
        weights: of PEFT's merged model, by name.
        tied: tie_word_embeddings of its configuration.
        live: output of the model with the adapter beside it.
        merged: output of the merged model.
    """

    base: Path
    adapter: Path
    weights: dict[str, Tensor]
    tied: object
    live: Tensor
    merged: Tensor


def build(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A tiny model of transformers, ``Name`` of NameForTask, all its numbers other than zero and one."""
    import transformers

    config = getattr(transformers, f"{kind.partition('For')[0].removesuffix('LMHeadModel')}Config")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(config(**{**SIZES, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model.to(dtype)


def answer(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """The logits, or the last hidden state."""
    with torch.no_grad():
        out = model(**(inputs or {"input_ids": IDS}))
    return (out.logits if "logits" in out else out.last_hidden_state).float()


def adapted(
    folder: Path, model: nn.Module, inputs: Mapping[str, Tensor] | None, lora: Mapping[str, Any], grow: int = 0
) -> Merged:
    """Save a model and an adapter of it, and merge it with PEFT.

    Args:
        folder: to write to.
        model: the base.
        inputs: of the model; None for token ids.
        lora: settings of PEFT's LoraConfig.
        grow: tokens that are added to the base before the adapter is made.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base)

    def loaded() -> Any:
        again = type(model).from_pretrained(base)
        if grow:
            torch.manual_seed(3)
            again.resize_token_embeddings(SIZES["vocab_size"] + grow)
        return again

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = get_peft_model(loaded(), LoraConfig(**{"r": 2, "init_lora_weights": False, **lora}))
        with torch.no_grad():
            for parameter in fresh.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape))
        fresh.save_pretrained(adapter)
        peft = PeftModel.from_pretrained(loaded(), adapter).eval()
        live = answer(peft, inputs)
        merged = peft.merge_and_unload().eval()
    weights = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    return Merged(
        base, adapter, weights, getattr(merged.config, "tie_word_embeddings", None), live, answer(merged, inputs)
    )
