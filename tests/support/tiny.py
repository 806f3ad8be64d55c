"""Tiny models of several architectures, the same at every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tiny:
    """How to build one: class names in transformers, settings, and modules that usually carry adapters."""

    config: str
    model: str
    settings: dict[str, object]
    targets: tuple[str, ...]


MODELS = {
    "llama": Tiny(
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2},
        ("q_proj", "k_proj", "mlp.down_proj"),
    ),
    "bert": Tiny(
        "BertConfig",
        "BertForSequenceClassification",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32},
        ("query", "value"),
    ),
    "gpt2": Tiny(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
        ("c_attn", "c_fc"),
    ),
}


def tiny(kind: str) -> nn.Module:
    """One of MODELS in eval mode, always with the same weights."""
    import transformers

    own = MODELS[kind]
    settings = {"vocab_size": 64, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, own.model)(
            getattr(transformers, own.config)(**{**settings, **own.settings})
        )
    return model.eval()


def outputs(kind: str, model: nn.Module) -> Tensor:
    """Logits of a fixed batch."""
    del kind
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits
