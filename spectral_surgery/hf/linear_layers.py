"""The linear layers of the model of a checkpoint, and where their weights are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.hf.models import outline_model
from spectral_surgery.hf.tensor_names import TensorNames, names_in

_EXPERT = re.compile(r"\.experts\.\d+\..*\.weight$")


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer.

    Attributes:
        weight: the stored name of its weight; None where that is not a tensor: fused, or tied and not there.
        head: whether it gives the output of the model, or is tied to another parameter.
    """

    module: str
    weight: str | None
    bias: bool
    head: bool


def linear_layers(folder: Path, index: CheckpointIndex) -> list[LinearLayer]:
    """Ask transformers for the linear layers of a model, and for experts that are stored one by one.

    Raises CheckpointError when it does not know the model.
    """
    model = outline_model(folder)
    names = names_in(model, index)
    if not names.parameters:
        raise CheckpointError(f"{folder}: no tensor has a name of {type(model).__name__}; expected the weights of it.")
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    head = model.get_output_embeddings()
    layers = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            parameter = names.parameters.get(f"{name}.weight")
            stored = parameter.whole.name if parameter is not None and parameter.whole is not None else None
            is_head = module is head or f"{name}.weight" in tied
            layers.append(LinearLayer(name, stored, module.bias is not None, is_head))
    return layers + _experts(names)


def _experts(names: TensorNames) -> list[LinearLayer]:
    """Experts, which are layers in files, and parts of one parameter in the model."""
    infos = {piece.info.name: piece.info for parameter in names.parameters.values() for piece in parameter.pieces}
    stored = sorted(name for name, info in infos.items() if _EXPERT.search(name) and len(info.shape) == 2)
    return [LinearLayer(name.removesuffix(".weight"), name, bias=False, head=False) for name in stored]
