"""A random language model on disk, of any size, with a tokenizer; no library is needed to make it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from spectral_surgery.files.writer import Entry, tensor_bytes, write_checkpoint

POSITIONS, EPSILON = 2048, 1e-6
_HEAD = 64  # width of an attention head


@dataclass(frozen=True)
class Size:
    """Of a model in Llama's layout.

    Attributes:
        hidden: width D.
        inner: width inside the feed-forward layers.
        layers: number of them.
        words: of the vocabulary.
        key_heads: heads of keys and values; None for as many as of queries.
        tied: whether the output layer is the embedding.
    """

    hidden: int
    inner: int
    layers: int
    words: int
    key_heads: int | None = None
    tied: bool = True

    @property
    def heads(self) -> int:
        """Of queries."""
        return self.hidden // _HEAD

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its name."""
        wide, inner, keys = self.hidden, self.inner, _HEAD * (self.key_heads or self.heads)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.words, wide)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found |= {f"{prefix}.self_attn.{name}_proj.weight": (wide, wide) for name in "qo"}
            found |= {f"{prefix}.self_attn.{name}_proj.weight": (keys, wide) for name in "kv"}
            found |= {f"{prefix}.mlp.{name}_proj.weight": (inner, wide) for name in ("gate", "up")}
            found[f"{prefix}.mlp.down_proj.weight"] = (wide, inner)
            found |= {f"{prefix}.{name}_layernorm.weight": (wide,) for name in ("input", "post_attention")}
        found["model.norm.weight"] = (wide,)
        return found if self.tied else found | {"lm_head.weight": (self.words, wide)}


def write_model(folder: Path, size: Size) -> Path:
    """Write a model with Gaussian weights in bfloat16, the same at every call.

    Args:
        folder: to be made.
        size: of it.
    """
    folder.mkdir(parents=True)

    def chunks(shape: tuple[int, ...], seed: int) -> Iterator[memoryview]:
        values = torch.ones(shape)
        if len(shape) > 1:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
        yield tensor_bytes(values.to(torch.bfloat16))

    shapes = size.shapes().items()
    write_checkpoint(
        folder, [Entry(name, "BF16", shape, partial(chunks, shape, n)) for n, (name, shape) in enumerate(shapes)]
    )
    for file, body in {"config.json": _config(size), **_tokenizer(size.words)}.items():
        (folder / file).write_text(json.dumps(body), encoding="utf-8")
    return folder


def prompt(tokens: int, words: int) -> str:
    """A text of so many tokens."""
    return " ".join(f"w{1 + 7 * n % (words - 1)}" for n in range(tokens))


def _config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads or size.heads,
        "vocab_size": size.words,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": EPSILON,
        "tie_word_embeddings": size.tied,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,  # it never stops by itself
    }


def _tokenizer(words: int) -> dict[str, dict[str, object]]:
    """One token a word, as a SentencePiece of llama.cpp can hold them too."""
    unknown, space = (
        "\u2581w0",
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    )
    inner: dict[str, object] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": space,
        "decoder": space,
        "model": {
            "type": "BPE",
            "vocab": {f"\u2581w{n}": n for n in range(words)},
            "merges": [],
            "unk_token": unknown,
            "byte_fallback": True,
            "ignore_merges": True,
        },
    }
    outer: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": unknown,
        "unk_token": unknown,
    }
    return {"tokenizer.json": inner, "tokenizer_config.json": outer}
