"""Mixers in place of the attention of some layers of a live model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import nn

from spectral_surgery.errors import CausalityError
from spectral_surgery.live.families import AttentionSite, sites_at
from spectral_surgery.live.swapped import SwappedAttention
from spectral_surgery.mixers import MIXERS, Mixer, MixerMethod, ProjectedMixer

ModelT = TypeVar("ModelT", bound=nn.Module)

_ALL_PASS: dict[str, object] = {"init_std": 0.0, "modrelu_bias": 0.0, "dropout": 0.0}


@dataclass(frozen=True)
class SwapSpec:
    """Which attentions make way, and for what.

    Attributes:
        layers: numbers of the layers, from 0.
        settings: of the mixer, by name; those not given start it as the identity where it can.
    """

    mixer: str
    layers: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> MixerMethod[Any]:
        """Row of MIXERS."""
        return MIXERS[self.mixer]


def swap_attention(
    model: nn.Module, mixer: str, layers: Sequence[int], settings: Mapping[str, Any] | None = None
) -> dict[int, SwappedAttention]:
    """Replace the attention of layers, in place; returns the new modules by number of their layer.

    A new layer starts from the value and output projections of the attention: with a mixer that starts as the identity,
    every token gets what attention would give it if it saw itself only. Parameters have the dtype and device of the
    model; random ones come from the current random state.

    Args:
        model: of transformers, of a family in FAMILIES.
        mixer: name in MIXERS; a causal one where the model is causal.

    Raises:
        ConfigError: when the family, the mixer, a setting or a layer is not accepted.
        CausalityError: when the model is causal and the mixer is not.
        TargetError: when the attention is not dense.
    """
    spec = resolved(model, SwapSpec(mixer, tuple(layers), dict(settings or {})))
    return {number: _replace(site, spec, number) for number, site in sites_at(model, spec.layers).items()}


def resolved(model: nn.Module, spec: SwapSpec) -> SwapSpec:
    """A specification with every choice made, so that another program builds the same modules."""
    method, config = spec.method, cast(Any, model).config
    places = sites_at(model, spec.layers)
    family = next(iter(places.values())).family
    if family.causal(config) and not method.is_causal:
        causal = ", ".join(row.name for row in MIXERS.values() if row.is_causal)
        raise CausalityError(
            f"mixer: expected one of {causal}, got {spec.mixer}, which lets a token see later ones: {config.model_type}"
            f" predicts them. Use {method.counterpart}."
        )
    known = method.config.__dataclass_fields__
    start = {**_ALL_PASS, "heads": int(config.num_attention_heads)}
    settings = {name: value for name, value in start.items() if name in known} | dict(spec.settings)
    with torch.device("meta"):
        method.fresh(next(iter(places.values())).projections()[0].out_features, settings)
    return SwapSpec(spec.mixer, tuple(places), asdict(method.config(**settings)))


def shared_copy(model: ModelT) -> ModelT:
    """A model with new modules on the same parameters and buffers, to be swapped while the original still runs."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _replace(site: AttentionSite, spec: SwapSpec, layer: int) -> SwappedAttention:
    value, output = site.projections()
    mixer = spec.method.fresh(value.out_features, dict(spec.settings)).to(value.weight)
    swapped = SwappedAttention(ProjectedMixer(value, cast(Mixer, mixer), output), layer).train(site.block.training)
    outside = not site.family.output.startswith(f"{site.family.attention}.")
    if outside:
        site.block.set_submodule(site.family.output, nn.Identity())
    site.block.set_submodule(site.family.attention, swapped)
    return swapped
