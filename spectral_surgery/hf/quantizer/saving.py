"""save_pretrained and dequantize of a compressed model.

What was compressed is written as the very bytes it was loaded from, so that the new folder decompresses to the same
bits; everything else is written as it is in memory. transformers does not say where it writes to: the manifest travels
in the headers of the weight files.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.manifest import QUANT_METHOD, SUFFIXES, Manifest
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.quantizer.class_swap import SpectralLayer
from spectral_surgery.hf.quantizer.fill_weights import Loading, decoded, retie
from spectral_surgery.hf.quantizer.fused_experts import Held, held_parameters
from spectral_surgery.hf.quantizer.loading_plan import Plan
from spectral_surgery.live.trained_copy import HoldsSpectra, decode


def spectral_layers(model: nn.Module) -> Iterator[tuple[str, SpectralLayer]]:
    """The layers of ours in a model, by every name that they have."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SpectralLayer):
            yield name, module


def spectral_experts(model: nn.Module) -> dict[str, Held]:
    """Parameters of other modules that are spectra, as fused experts, by the name of the parameter."""
    return {
        f"{name}.{leaf}" if name else leaf: part
        for name, module in model.named_modules()
        for leaf, (_, part) in held_parameters(module).items()
    }


def compressed_state(model: Any, load: Loading, plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What save_pretrained should write: (tensors under the names of the checkpoint, metadata of the files).

    Raises CheckpointError when the folder is gone or incomplete.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    layers, experts = dict(spectral_layers(model)), spectral_experts(model)
    spectral = {id(part) for part in (*(layer.spectrum for layer in layers.values()), *experts.values())}
    inside = tuple(f"{name}." for name, part in model.named_modules(remove_duplicate=False) if id(part) in spectral)
    dense = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    spectra, replaced = _still_compressed(model, load, plan, layers, experts)
    gone = {name for target in replaced for name in plan.made[target]}
    gone |= {one for one, other in model.all_tied_weights_keys.items() if other in gone}
    dense = {name: value for name, value in dense.items() if name not in gone and name not in plan.tied}
    apart = (name for target in plan.divided if target not in replaced for name in plan.made[target])
    dense |= {
        name: layers[layer].spectrum.to_dense() for name in apart if (layer := name.removesuffix(".weight")) in layers
    }
    names = _checkpoint_names(model, load, {*spectra, *plan.aliases, *plan.aliases.values()})
    state = _reverted(model, load, remove_tied_weights_from_state_dict(dense, model))
    renamed = {stored: names.get(target, stored) for target, by in replaced.items() for stored in by}
    renamed |= {stored: names[target] for target, stored in spectra.items()}
    tensors = {}
    for stored, name in renamed.items():
        if stored in load.checkpoint.manifest.tensors:
            tensors[name] = load.checkpoint.manifest.tensors[stored]
            state |= {f"{name}.{suffix}": _copied(load, f"{stored}.{suffix}") for suffix in SUFFIXES}
        else:
            state[name] = _copied(load, stored)
    tied = {names[alias]: names[target] for alias, target in plan.aliases.items()}
    tied = {alias: name for alias, name in tied.items() if alias not in state and (name in tensors or name in state)}
    old = load.checkpoint.manifest
    manifest = Manifest(dict(sorted(tensors.items())), dict(sorted(tied.items())), old.options, old.source)
    return state, {QUANT_METHOD: manifest.to_json()}


def _still_compressed(
    model: Any, load: Loading, plan: Plan, layers: Mapping[str, SpectralLayer], experts: Mapping[str, Held]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Stored name by parameter of our layers; stored names by parameter that is decoded, divided or of experts."""
    spectra: dict[str, str] = {}
    others: dict[str, list[str]] = {}
    compressed = {*experts, *(f"{name}.weight" for name in layers)}
    for target in plan.sources:
        group = [name for name in plan.slots.get(target, ()) if name in compressed]
        if group:
            spectra[group[0]] = plan.stored(target)[0]
        elif target in plan.dense:
            if _unchanged(model, load, plan, target):  # what is trained is written as it is
                others[target] = plan.stored(target)
        elif target not in plan.slots and compressed.issuperset(plan.made[target]):
            others[target] = plan.stored(target)
    return spectra, others


def _unchanged(model: Any, load: Loading, plan: Plan, target: str) -> bool:
    """Whether what was decoded is as it was: nobody trains it; of a buffer only its values say so."""
    present = model.state_dict(keep_vars=True)
    tensors = [present[name] for name in plan.made[target] if name in present]
    if len(tensors) < len(plan.made[target]):
        return False
    if all(isinstance(tensor, nn.Parameter) for tensor in tensors):
        return not any(tensor.requires_grad for tensor in tensors)
    (buffer, *others), stored = tensors, plan.stored(target)
    if others or len(stored) > 1 or load.checkpoint.manifest.tensors[stored[0]].shape != tuple(buffer.shape):
        return False
    return torch.equal(decoded(load.checkpoint, stored[0]).to(buffer), buffer)


def _copied(load: Loading, name: str) -> Tensor:
    info = load.checkpoint.index.tensors.get(name)
    if info is None or (isinstance(info.file, Path) and not info.file.exists()):
        raise CheckpointError(
            f"{name}: expected in {load.checkpoint.index.root}, where the model was loaded from, to copy it, got no"
            " such tensor. Put the folder back, or call model.dequantize() first."
        )
    return read_tensor(info)


def _checkpoint_names(model: Any, load: Loading, parameters: Any) -> dict[str, str]:
    """The names that save_pretrained gives to parameters."""
    marks = {name: torch.empty(0) for name in parameters}
    places = {id(mark): name for name, mark in marks.items()}
    return {places[id(mark)]: name for name, mark in _reverted(model, load, marks).items()}


def _reverted(model: Any, load: Loading, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names, and in the shapes, of checkpoints of this architecture."""
    from transformers.core_model_loading import revert_weight_conversion

    conversions, model._weight_conversions = model._weight_conversions, load.conversions
    try:
        reverted: dict[str, Tensor] = revert_weight_conversion(model, state)
    finally:
        model._weight_conversions = conversions
    return reverted


def dequantize(model: Any, load: Loading) -> None:
    """Put dense layers and experts in the place of ours, of the dtypes that they count as."""
    decode(model, {})
    model._weight_conversions = load.conversions
    retie(model, load)


def decode_layers(model: nn.Module, spectra: Container[int]) -> list[str]:
    """Give layers of ours dense weights; tied ones share their parameter again. Returns the names of the layers."""
    chosen = [(name, layer) for name, layer in spectral_layers(model) if id(layer.spectrum) in spectra]
    done: dict[int, nn.Parameter] = {}
    for layer in {id(layer): layer for _, layer in chosen}.values():
        cast(HoldsSpectra, layer).become_dense(done)
    return [name for name, _ in chosen]
