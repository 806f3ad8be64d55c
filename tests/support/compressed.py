"""Tiny models of several families, compressed on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.files.compressed.settings import CompressOptions

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = TEXT | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 72, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64} | {
    name: TEXT[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "AutoModelForCausalLM", LLAMA | {"tie_word_embeddings": False}),
    "llama_tied": ("llama", "AutoModelForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "bert": ("bert", "AutoModelForMaskedLM", TEXT),
    "gpt2": ("gpt2", "AutoModelForCausalLM", GPT2),
    "vit": ("vit", "AutoModelForImageClassification", TEXT | {"image_size": 32, "patch_size": 8}),
    "qwen3_moe": ("qwen3_moe", "AutoModelForCausalLM", LLAMA | EXPERTS),
}


def dense_model(family: str) -> Any:
    """A random model in eval mode, always the same."""
    import transformers

    kind, auto, settings = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **settings)).eval()


def compressed_folder(family: str, folder: Path, *, bits: float = 4.0, min_weights: int = 1000) -> Path:
    """Save a model of a family under a folder and compress it: the compressed folder."""
    dense_model(family).save_pretrained(folder / "source")
    compress(folder / "source", folder / "compressed", CompressOptions(Target("bits", bits), min_weights=min_weights))
    return folder / "compressed"


def output(model: Any) -> Tensor:
    """Logits of a fixed batch."""
    inputs: dict[str, Tensor] = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    if model.config.model_type == "vit":
        inputs = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one word a token, w3 to w95, for the text models of FAMILIES."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[BOS]", "[EOS]", *(f"w{number}" for number in range(3, 96))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]").save_pretrained(folder)
