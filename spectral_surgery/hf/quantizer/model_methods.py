"""What a compressed model of transformers is asked for as a whole: how many weights it has, and more tokens.

transformers counts parameters and copies rows of them, and spectra are neither parameters nor have rows to add to. Both
methods are put on the model itself, where they stand before those of its class.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spectral_surgery.errors import CheckpointError
from spectral_surgery.hf.quantizer.fill_weights import Loading, retie, untie
from spectral_surgery.hf.quantizer.saving import decode_layers
from spectral_surgery.layers import SpectralEmbedding, SpectralWeight
from spectral_surgery.layers.trainable import TrainableWeight

METHODS = ("num_parameters", "resize_token_embeddings")


class Bound:
    """A method of one model, that does not keep the model alive: who deletes a model wants its memory back at once."""

    def __init__(self, function: Callable[..., Any], model: Any) -> None:
        self._function = function
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Call it as transformers' method of that name is called."""
        return self._function(self._model(), *args, **settings)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has a copy of the method."""
        return Bound, (self._function, self._model())


def bind_methods(model: Any) -> None:
    """Put our methods on a model, and on the models inside it that can be asked alone."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part)["num_parameters"] = Bound(num_parameters, part)
    vars(model)["resize_token_embeddings"] = Bound(resize_token_embeddings, model)


def unbind_methods(model: Any) -> None:
    """Leave a model to the methods of its class."""
    for part in model.modules():
        for name in METHODS:
            vars(part).pop(name, None)


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Count parameters as the dense model has them.

    Args:
        only_trainable: spectra are not trained, unless `train_kept` has made values of them: these count.
        exclude_embeddings: also those that a head shares.
    """
    counted: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return counted
    embeddings = [module for module in model.modules() if isinstance(module, SpectralEmbedding)]
    left_out = {id(module.spectrum) for module in embeddings} if exclude_embeddings else set()
    for module in model.modules():
        if isinstance(module, SpectralWeight | TrainableWeight) and id(module) not in left_out:
            counted += math.prod(module.shape)
            counted -= module.values.numel() if isinstance(module, TrainableWeight) else 0
    return counted


def resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    """Change the number of tokens: the embedding and the head become dense, and are saved so.

    Args:
        new_num_tokens: rows of the table; None for as many as there are.
        pad_to_multiple_of: of which it is made a multiple.
    """
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    rows = ends[0].weight.shape[0]
    wanted = rows if new_num_tokens is None else new_num_tokens
    if isinstance(pad_to_multiple_of, int):
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    spectra = {id(end.spectrum) for end in ends if hasattr(end, "spectrum")}
    if wanted != rows and spectra:
        _make_dense(model, model.hf_quantizer.load, spectra)
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, mean_resizing)


def _make_dense(model: Any, load: Loading, spectra: set[int]) -> None:
    from transformers.utils import logging

    if load.plan is None:
        raise CheckpointError("resize_token_embeddings: expected a loaded model, got one that is not loaded yet.")
    decoded = decode_layers(model, spectra)
    logging.get_logger("transformers.spectral_surgery").warning(
        f"{', '.join(decoded)}: decoded to change the number of tokens, and dense from now on, also in what is saved."
        " Compress the saved model again to have them compressed."
    )
    gone = {f"{name}.weight" for name in decoded}
    plan = load.plan
    load.plan = replace(
        plan,
        sources={name: by for name, by in plan.sources.items() if name not in gone},
        slots={name: group for name, group in plan.slots.items() if name not in gone},
        aliases={one: other for one, other in plan.aliases.items() if one not in gone},
    )
    retie(model, load)
    _part_untied(model, decoded)
    untie(model, load, load.plan)


def _part_untied(model: Any, decoded: Iterable[str]) -> None:
    """Give layers that shared a spectrum for no more than equal numbers a weight each."""
    seen = set()
    for name in decoded:
        layer = model.get_submodule(name)
        if id(layer.weight) in seen and f"{name}.weight" not in model.all_tied_weights_keys:
            layer.weight = nn.Parameter(layer.weight.detach().clone())
        seen.add(id(layer.weight))


def cast(model: Any, dtype: torch.dtype) -> None:
    """Give a model the dtype that from_pretrained with ``dtype`` would give it; spectra count as of that dtype.

    Args:
        model: of transformers, changed in place: parameters, and buffers that are saved.
        dtype: floating.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan, before = model._get_dtype_plan(dtype), model.dtype
    alternation, patterns, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    for name, tensor in _loaded(model):
        match = alternation.search(name) if alternation is not None else None
        wanted = plan[patterns[match.lastgroup]] if match is not None else dtype
        if tensor.is_floating_point() and (match is not None or tensor.dtype == before):  # others have another type
            tensor.data = tensor.data.to(wanted)
    model.config.dtype = dtype


def _loaded(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    saved = model.state_dict().keys()
    spectra = (name for name, part in model.named_modules() if isinstance(part, SpectralWeight))
    inside = tuple(f"{name}." for name in spectra)
    yield from model.named_parameters()
    yield from (
        (name, buffer) for name, buffer in model.named_buffers() if name in saved and not name.startswith(inside)
    )
