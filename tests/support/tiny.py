"""Tiny models of several architectures, the same at every call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon")


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


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of WORDS, for models of 12 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
