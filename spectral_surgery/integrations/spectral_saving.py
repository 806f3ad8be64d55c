"""save_pretrained and dequantize of a compressed model.

What was compressed is written as the very bytes it was loaded from, so that the new folder decompresses to the same
bits; everything else is written as it is in memory. transformers does not say where it writes to: the manifest travels
in the headers of the weight files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.checkpoint.manifest import QUANT_METHOD, SUFFIXES, Manifest
from spectral_surgery.checkpoint.reader import read_tensor
from spectral_surgery.errors import CheckpointError
from spectral_surgery.integrations.experts import put_experts
from spectral_surgery.integrations.spectral_loading import Loading, Plan
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralExperts, SpectralLinear

SpectralLayer = SpectralConv1D | SpectralEmbedding | SpectralLinear


def spectral_layers(model: nn.Module) -> Iterator[tuple[str, SpectralLayer]]:
    """The layers of ours in a model, by every name that they have."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SpectralLayer):
            yield name, module


def spectral_experts(model: nn.Module) -> dict[str, SpectralExperts]:
    """Fused experts that are spectra, by the name of the parameter that they stand for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpectralExperts)}


def compressed_state(model: Any, load: Loading, plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What save_pretrained should write.

    Args:
        model: loaded by `load`.
        load: its folder, from which compressed tensors are copied.
        plan: where they went.

    Returns:
        (tensors under the names of the checkpoint, metadata of the files).

    Raises:
        CheckpointError: when the folder is gone or incomplete.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    layers, experts = dict(spectral_layers(model)), spectral_experts(model)
    inside = (*(f"{name}.spectrum." for name in layers), *(f"{name}.experts." for name in experts))
    dense = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    spectra, replaced = _still_compressed(model, plan, layers, experts)
    dense = {name: value for name, value in dense.items() if name not in replaced and name not in plan.tied}
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
    model: nn.Module, plan: Plan, layers: Mapping[str, SpectralLayer], experts: Mapping[str, SpectralExperts]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Stored name by parameter of our layers, stored names by parameter that was decoded or is experts."""
    spectra: dict[str, str] = {}
    decoded: dict[str, list[str]] = {}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for target, by in plan.sources.items():
        group = [name for name in plan.slots.get(target, ()) if name.removesuffix(".weight") in layers]
        if group:
            spectra[group[0]] = by[""][0]
        elif target in experts or (target in frozen and target not in plan.slots):
            decoded[target] = [name for names in by.values() for name in names]  # what is trained is written as it is
    return spectra, decoded


def _copied(load: Loading, name: str) -> Tensor:
    info = load.checkpoint.index.tensors.get(name)
    if info is None or not info.file.exists():
        raise CheckpointError(
            f"{name}: is no longer in {load.checkpoint.index.root}, where the model was loaded from; compressed tensors"
            " are copied from there. Put the folder back, or call model.dequantize() first."
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

    kept, model._weight_conversions = model._weight_conversions, load.conversions
    try:
        reverted: dict[str, Tensor] = revert_weight_conversion(model, state)
    finally:
        model._weight_conversions = kept
    return reverted


def dequantize(model: Any, load: Loading, dtype: torch.dtype | None) -> None:
    """Put dense layers in the place of ours; tied ones share their parameter again.

    Args:
        model: changed in place.
        load: what loaded it.
        dtype: of the dense weights; None for the dtype that they count as.
    """
    done: dict[int, nn.Parameter] = {}
    for name, layer in list(spectral_layers(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _dense(layer, dtype, done))
    for name, experts in spectral_experts(model).items():
        parent, _, leaf = name.rpartition(".")
        put_experts(model.get_submodule(parent), leaf, nn.Parameter(experts.to_dense(dtype)))
    model._weight_conversions = load.conversions
    for part in model.modules():
        vars(part).pop("_tied_weights_keys", None)  # the ties of the class hold again
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _dense(layer: SpectralLayer, dtype: torch.dtype | None, done: dict[int, nn.Parameter]) -> nn.Module:
    key = id(layer.spectrum)
    if key not in done:
        weight = layer.weight.data if isinstance(layer, SpectralConv1D) else layer.spectrum.to_dense()
        done[key] = nn.Parameter(weight.to(dtype or weight.dtype).contiguous())
    dense: nn.Module
    if isinstance(layer, SpectralEmbedding):
        dense = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    elif isinstance(layer, SpectralConv1D):
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense = Conv1D(layer.nf, layer.nx)
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = done[key]
    if not isinstance(layer, SpectralEmbedding):
        dense.register_parameter("bias", layer.bias)
    return dense.train(layer.training)
