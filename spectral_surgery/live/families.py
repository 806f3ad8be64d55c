"""Where attention is in the models we can operate on: one row for each family of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.layer import is_conv1d
from spectral_surgery.errors import ConfigError, TargetError
from spectral_surgery.live.blocks import find_blocks
from spectral_surgery.registry import Table


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES; names are relative to a block of the model.

    In all families the attention module takes [B, T, D] first or as ``hidden_states``, and returns a tuple whose first
    entry is [B, T, D].

    Attributes:
        name: the model_type of config.json.
        attention: the module to replace.
        value: its value projection; one third of a fused projection of queries, keys and values.
        output: its output projection, inside `attention` or right behind it.
        is_causal: whether a token sees no later one; None where ``is_decoder`` of config.json says it.
        vision: whether it takes images, and no text.
    """

    name: str
    attention: str
    value: str
    output: str
    is_causal: bool | None
    vision: bool = False

    def causal(self, config: Any) -> bool:
        """Whether a model of this family is causal."""
        return bool(getattr(config, "is_decoder", False)) if self.is_causal is None else self.is_causal


_BERT = ("attention.self", "attention.self.value", "attention.output.dense", None)
_LLAMA = ("self_attn", "self_attn.v_proj", "self_attn.o_proj", True)

FAMILIES: Table[Family] = Table(
    "model family",
    [
        Family("bert", *_BERT),
        Family("roberta", *_BERT),
        Family("vit", "attention", "attention.v_proj", "attention.o_proj", is_causal=False, vision=True),
        Family("gpt2", "attn", "attn.c_attn", "attn.c_proj", is_causal=True),
        Family("llama", *_LLAMA),
        Family("qwen2", *_LLAMA),
        Family("qwen3", *_LLAMA),
    ],
)


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a model."""

    family: Family
    name: str
    block: nn.Module
    heads: int

    @property
    def attention(self) -> nn.Module:
        """The module to replace."""
        return self.block.get_submodule(self.family.attention)

    @property
    def output(self) -> nn.Module:
        """The output projection."""
        return self.block.get_submodule(self.family.output)

    def projections(self) -> tuple[nn.Linear, nn.Linear]:
        """Copies of the value projection, with values repeated for grouped queries, and of the output projection."""
        value, value_bias = _dense(self.block.get_submodule(self.family.value), f"{self.name}.{self.family.value}")
        output, output_bias = _dense(self.output, f"{self.name}.{self.family.output}")
        inner = output.shape[1]
        if self.family.value.endswith("c_attn"):
            value = value.chunk(3)[2]
            value_bias = None if value_bias is None else value_bias.chunk(3)[2]
        groups = inner // len(value)
        value = _repeated(value, self.heads // groups, groups)
        value_bias = None if value_bias is None else _repeated(value_bias, self.heads // groups, groups)
        return _linear(value, value_bias), _linear(output, output_bias)


def sites(model: nn.Module) -> list[AttentionSite]:
    """The attentions of a model of transformers, in order."""
    config = cast(Any, model).config
    family = FAMILIES[str(config.model_type)]
    prefix, blocks = find_blocks(model)
    heads = int(config.num_attention_heads)
    return [AttentionSite(family, f"{prefix}.{number}", block, heads) for number, block in enumerate(blocks)]


def sites_at(model: nn.Module, layers: tuple[int, ...]) -> dict[int, AttentionSite]:
    """The attentions of some layers, by number.

    Raises ConfigError when a number is out of range or comes twice, or there is none.
    """
    places = sites(model)
    wrong = [number for number in layers if not 0 <= number < len(places)]
    if wrong:
        raise ConfigError(f"layers: expected 0 to {len(places) - 1} for this model, got {wrong[0]}.")
    if not layers or len(set(layers)) < len(layers):
        raise ConfigError(f"layers: expected one or more different numbers, got {list(layers)}.")
    return {number: places[number] for number in sorted(layers)}


def _dense(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [O, I] and bias of a linear layer."""
    transposed = is_conv1d(module)
    if not transposed and not isinstance(module, nn.Linear):
        raise TargetError(
            f"{name}: expected a dense linear layer, got a {type(module).__name__}. Decompress the model, or merge its"
            " adapters, first."
        )
    weight = cast(Tensor, module.weight)
    return weight.T if transposed else weight, cast("Tensor | None", module.bias)


def _repeated(rows: Tensor, heads: int, times: int) -> Tensor:
    """Rows of each head several times, as the keys and values of grouped queries are."""
    return rows.reshape(heads, -1, *rows.shape[1:]).repeat_interleave(times, 0).flatten(0, 1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
