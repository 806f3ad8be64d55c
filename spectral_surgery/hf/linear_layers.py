"""The linear layers of the model of a checkpoint, and where their weights are stored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.hf.tensor_names import TensorNames, names_in

_EXPERT = re.compile(r"\.experts\.\d+\..*\.weight$")


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer.

    Attributes:
        weight: the stored name of its weight; None where that is not a tensor: fused, or tied and not there. None also
            of a class of its own, which may do more with its weight than multiply by it.
        head: whether it gives the output of the model, or is tied to another parameter.
        expert: whether it is a layer in the file alone, and a part of one parameter in the model.
    """

    module: str
    weight: str | None
    bias: bool
    head: bool
    expert: bool = False


def linear_layers(model: Any, index: CheckpointIndex) -> list[LinearLayer]:
    """The linear layers of an outlined model, and its experts that are stored one by one.

    Raises CheckpointError when none of the stored tensors is one of the model.
    """
    names = names_in(model, index)
    if not names.parameters:
        raise CheckpointError(
            f"{index.root}: no tensor has a name of {type(model).__name__}; expected the weights of it."
        )
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    head = model.get_output_embeddings()
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parameter = names.parameters.get(f"{name}.weight") if type(module) is nn.Linear else None
            stored = parameter.whole.name if parameter is not None and parameter.whole is not None else None
            is_head = module is head or f"{name}.weight" in tied
            layers.append(LinearLayer(name, stored, module.bias is not None, is_head))
    return layers + _experts(names)


def initialised_by_weights(model: Any, modules: Iterable[str]) -> bool:
    """Whether transformers reads the weights of these layers when it initialises an outlined model.

    It does so also when it has loaded every weight, and fails where a layer holds something else instead. Here the
    layers lose their weights.
    """
    for name in modules:
        del model.get_submodule(name).weight
    try:
        model.initialize_weights()
    except AttributeError:
        return True
    return False


def replaced_when_quantized(model: Any, method: str) -> list[str]:
    """Names of the modules in the place of which transformers puts others when it reads quantised weights of a kind."""
    from transformers.quantizers import base

    others = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    kinds = {kind for kind, other in others.items() if method in other["quantization_methods"]}
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds]


def _experts(names: TensorNames) -> list[LinearLayer]:
    infos = {piece.info.name: piece.info for parameter in names.parameters.values() for piece in parameter.pieces}
    stored = sorted(name for name, info in infos.items() if _EXPERT.search(name) and len(info.shape) == 2)
    return [LinearLayer(name.removesuffix(".weight"), name, bias=False, head=False, expert=True) for name in stored]
