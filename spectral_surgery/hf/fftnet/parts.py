"""The parts of the FFTNet models that need nothing of transformers: positions, block, cache, and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.mixers import MIXERS, MixerCache, ProjectedMixer

_LONGEST_WAVE = 10_000.0


class FFTNetBlock(nn.Module):
    """Let tokens see each other, then each think for itself: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Any, *, is_causal: bool) -> None:
        """Build mixer and MLP.

        Args:
            is_causal: from left to right, or both ways.

        Raises:
            ConfigError: when a setting is out of range.
        """
        super().__init__()
        width, hidden = config.d_model, config.ff_hidden_dim or 4 * config.d_model
        settings = {"heads": config.num_heads, "mlp_hidden_dim": config.mlp_hidden_dim, "init_std": config.init_std}
        settings["modrelu_bias"] = config.modrelu_bias
        if is_causal:
            mixer = MIXERS["causal_fftnet"].fresh(
                width, {**settings, "kernel_length": config.kernel_length, "chunk": config.chunk}
            )
        else:
            mixer = MIXERS["fftnet"].fresh(width, {**settings, "bins": config.kernel_length // 2 + 1})
        self.mixer_norm = nn.LayerNorm(width) if config.layer_norm else nn.Identity()
        self.mixer = ProjectedMixer(nn.Linear(width, width), mixer, nn.Linear(width, width))  # type: ignore[arg-type]
        self.mlp_norm = nn.LayerNorm(width) if config.layer_norm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """[B, T, D] to [B, T, D]; mask and cache as for `Mixer.__call__`."""
        x = x + self.dropout(self.mixer(self.mixer_norm(x), mask, cache))
        mixed: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return mixed


@dataclass
class FFTNetCache:
    """What the layers remember while text is generated.

    ``columns``: tokens seen of every sequence, padding included.
    """

    layers: list[MixerCache]
    columns: int = 0

    @property
    def lengths(self) -> Tensor:
        """[B] int64 on the CPU, tokens seen of each sequence without padding."""
        return self.layers[0].lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - as transformers calls it
        """Tokens seen, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with other sequences: those that beam search chose."""
        for layer in self.layers:
            layer.replace(layer.select(beam_idx))


def empty_cache(blocks: Iterable[Any], x: Tensor) -> FFTNetCache:
    """What `FFTNetBlock`s remember before the first token. ``x`` is [B, T, D], as it will go in.

    Raises CausalityError when they read both ways.
    """
    return FFTNetCache([block.mixer.new_cache(len(x), x.device, x.dtype) for block in blocks])


def through_blocks(
    blocks: Iterable[Any], x: Tensor, mask: Tensor | None, memory: FFTNetCache | None, run: Callable[..., Tensor] | None
) -> list[Tensor]:
    """Apply one `FFTNetBlock` after the other. Returns x, and what each block gives: [B, T, D] each.

    Args:
        x: [B, T, D].
        mask: [B, T], or None.
        memory: updated, or None.
        run: calls a block so that less is kept for the backward pass; None to call it as it is.
    """
    states = [x]
    for number, block in enumerate(blocks):
        layer = memory.layers[number] if memory is not None else None
        states.append(run(block, states[-1], mask, layer) if run else block(states[-1], mask, layer))
    if memory is not None:
        memory.columns += x.shape[1]
    return states


def check_config(config: Any) -> None:
    """Accept the sizes of a model; mixers check theirs. Raises ConfigError when one is out of range."""
    for name in ("vocab_size", "d_model", "num_layers", "max_seq_length"):
        if getattr(config, name) < 1:
            raise ConfigError(f"FFTNetConfig: expected {name} of at least 1, got {getattr(config, name)}.")
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"FFTNetConfig: expected dropout of at least 0 and less than 1, got {config.dropout}.")


def check_ids(ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """Accept token numbers that the model knows. ``ids`` is [B, T]; ``mask`` is [B, T], or None.

    Raises:
        ShapeError: when ids are not [B, T] with at least one token, or the mask does not fit.
        ConfigError: for a number outside the vocabulary.
    """
    if ids.ndim != 2 or not ids.numel():
        raise ShapeError(
            f"input_ids: expected [B, T] with at least one sequence and one token, got shape {tuple(ids.shape)}."
        )
    if mask is not None and mask.shape != ids.shape:
        raise ShapeError(
            f"attention_mask: expected {tuple(ids.shape)}, the shape of input_ids, got {tuple(mask.shape)}."
        )
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ConfigError(
            f"input_ids: expected 0 to {vocabulary - 1}, got token {low if low < 0 else high}. Use the tokenizer of"
            " the model."
        )


def places(ids: Tensor, mask: Tensor | None, seen: Tensor | None, longest: int) -> Tensor:
    """Where tokens stand in their sequences, padding not counted: [B, T] int64; [1, T] when all sequences are alike.

    Args:
        ids: [B, T].
        mask: [B, T], zero or False at padding; None for none.
        seen: [B], tokens that came before; None for none.

    Raises:
        ShapeError: when a sequence is too long.
    """
    if mask is None:
        steps = torch.arange(ids.shape[1], device=ids.device)[None]
    else:
        steps = (mask.long().cumsum(1) - 1).clamp_min(0)
    positions = steps if seen is None else steps + seen.to(ids.device)[:, None]
    length = int(positions.max()) + 1
    if length > longest:
        raise ShapeError(
            f"input_ids: expected at most {longest} tokens, the model's max_seq_length, got {length}. Cut the text."
        )
    return positions


def sinusoids(at: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions, of geometrically spaced wavelengths.

    Source: arXiv 1706.03762, section 3.5.
    Returns [B, T, D] float32.

    ``at``: [B, T] positions.
    """
    waves = torch.arange((width + 1) // 2, device=at.device, dtype=torch.float32)
    angles = at[..., None] * torch.exp(waves * (-2 * math.log(_LONGEST_WAVE) / width))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :width]


def mean_of_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens that are not padding: [B, T, D] to [B, D]; zero for a sequence of padding alone."""
    if mask is None:
        return x.mean(1)
    real = mask.to(x.dtype)[..., None]
    return (x * real).sum(1) / real.sum(1).clamp_min(1)
