"""The architectures that GGUF files are written of: what llama.cpp is told, and how tensors differ there.

Names of tensors are the package gguf's. Source of the rest: llama.cpp's conversion scripts and graphs, in 2026.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError, required
from spectral_surgery.registry import Table

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One row of ARCHITECTURES.

    Attributes:
        name: model_type of transformers.
        there: what llama.cpp calls it.
        parameters: (writer of gguf, configuration) -> None: tells llama.cpp the sizes.
        activations: names of hidden_act that it computes.
        biases: those that it adds, by their names there.
        left_out: tensors that it does not use.
        prefix: of names, which gguf does not know.
        pairs: whether the two numbers that a rotation turns lie beside each other in queries and keys.
        norms: added to the weights of norms.
    """

    name: str
    there: str
    parameters: Callable[[Any, Config], None]
    activations: tuple[str, ...]
    biases: re.Pattern[str]
    left_out: re.Pattern[str]
    prefix: str = ""
    pairs: bool = False
    norms: float = 0.0


def _sizes(writer: Any, config: Config) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])


def _decoder(writer: Any, config: Config) -> None:
    _sizes(writer, config)
    size = head_size(config)
    writer.add_head_count_kv(key_heads(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    rope = rotation(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        gguf: Any = required("gguf", "write GGUF files")
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def _gemma2(writer: Any, config: Config) -> None:
    _decoder(writer, config)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _gemma3(writer: Any, config: Config) -> None:
    _decoder(writer, config)
    writer.add_sliding_window(config["sliding_window"])


def _encoder(writer: Any, config: Config) -> None:
    _sizes(writer, config)
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_token_type_count(config["type_vocab_size"])


_NOTHING = re.compile(r"rotary_emb\.inv_freq$")
_BERT = re.compile(r"^(bert\.)?(pooler|cls)\.|^classifier\.|embeddings\.position_ids$")
_ANY, _NONE = re.compile(""), re.compile(r"(?!)")
_OF_LLAMA, _OF_QUERIES = re.compile(r"\.(attn_(q|k|v|output)|ffn_\w+)\."), re.compile(r"\.attn_[qkv]\.")
_GELU = ("gelu_pytorch_tanh", "gelu_tanh")
ARCHITECTURES = Table(
    "architecture of GGUF",
    (
        Architecture("llama", "llama", _decoder, ("silu",), _OF_LLAMA, _NOTHING, pairs=True),
        Architecture("mistral", "llama", _decoder, ("silu",), _OF_LLAMA, _NOTHING, pairs=True),
        Architecture("qwen2", "qwen2", _decoder, ("silu",), _OF_QUERIES, _NOTHING),
        Architecture("qwen3", "qwen3", _decoder, ("silu",), _NONE, _NOTHING),
        Architecture("gemma", "gemma", _decoder, _GELU, _NONE, _NOTHING, norms=1.0),
        Architecture("gemma2", "gemma2", _gemma2, _GELU, _NONE, _NOTHING, norms=1.0),
        Architecture("gemma3_text", "gemma3", _gemma3, _GELU, _NONE, _NOTHING, norms=1.0),
        Architecture("bert", "bert", _encoder, ("gelu",), _ANY, _BERT, prefix="bert."),
    ),
)


def architecture_of(config: Config) -> Architecture:
    """The row of a model.

    Raises:
        ConfigError: when there is none, or the model has something that llama.cpp does not compute.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ConfigError(f"model_type {kind}: is none that is written as GGUF; expected {', '.join(ARCHITECTURES)}.")
    row, activation = ARCHITECTURES[kind], config.get("hidden_activation") or config.get("hidden_act")
    if activation not in row.activations:
        raise ConfigError(f"hidden_act {activation}: expected {' or '.join(row.activations)}, as llama.cpp has it.")
    if config.get("position_embedding_type", "absolute") not in ("absolute", None):
        raise ConfigError(f"position_embedding_type {config['position_embedding_type']}: expected absolute.")
    if row.there != "bert":
        rotation(config)
    scale = config.get("query_pre_attn_scalar")
    usual = [head_size(config)] + ([config["hidden_size"] // config["num_attention_heads"]] if _is_27b(config) else [])
    if scale is not None and scale not in usual:
        raise ConfigError(f"query_pre_attn_scalar {scale}: expected {usual[-1]}, which llama.cpp takes for this size.")
    return row


def _is_27b(config: Config) -> bool:
    """The Gemmas whose queries llama.cpp scales in another way; it knows them by their layers."""
    return config["num_hidden_layers"] in (46, 62)


def head_size(config: Config) -> int:
    """Numbers of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def key_heads(config: Config) -> int:
    """Heads of keys and values."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def rotation(config: Config) -> dict[str, Any]:
    """How positions turn queries and keys, of layers with full attention where others have a way of their own.

    Raises:
        ConfigError: when llama.cpp has no such way.
    """
    rope = dict(config.get("rope_parameters") or {})
    rope = dict(rope.get("full_attention") or rope)
    rope.setdefault("rope_type", "default")
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        raise ConfigError(f"rope_type {rope['rope_type']}: expected default, linear, yarn or llama3 for GGUF.")
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor {rope['partial_rotary_factor']}: expected 1 for GGUF.")
    return rope


def rotation_factors(config: Config) -> Tensor | None:
    """Of Llama 3: what the frequencies are divided by, [head_size / 2] float32; None for the other ways.

    Waves longer than the context that the model was trained on first are slowed down, short ones are not, with a linear
    passage between. Source: transformers, `modeling_rope_utils.py`.
    """
    rope = rotation(config)
    if rope["rope_type"] != "llama3":
        return None
    size, factor = head_size(config), float(rope["factor"])
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = (float(rope["original_max_position_embeddings"]) / waves - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
