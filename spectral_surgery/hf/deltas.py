"""Whole fine-tunes as differences to one base, which is in memory once: put on a model, exchanged, and taken off.

A difference is held as a spectrum beside the weight W that it belongs to, and multiplied like any other: the layer
gives W x + D x. What is no weight of such a layer (norms, biases, convolutions, fused experts) takes the place of what
the base has, which is kept. Nothing of the base is written, so that taking a difference off gives the same bits again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectral_surgery.adapters.layer import is_conv1d
from spectral_surgery.errors import CheckpointError, ConfigError, SpectralSurgeryError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, open_compressed
from spectral_surgery.files.compressed.dense import DenseCheckpoint
from spectral_surgery.files.compressed.difference import base_name, check_base
from spectral_surgery.files.compressed.settings import AUTO
from spectral_surgery.files.index import TensorInfo
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.models import outline_of
from spectral_surgery.hf.quantizer.class_swap import EmbeddingStandIn, LinearStandIn
from spectral_surgery.hf.quantizer.fill_weights import decoded, resident_forms
from spectral_surgery.hf.tensor_names import StoredParameter, names_in
from spectral_surgery.layers import SpectralWeight

_KEPT = "_spectral_delta"  # attribute of a model: what is on it


@dataclass
class _Attached:
    """What brings the base back."""

    handles: list[RemovableHandle] = field(default_factory=list)
    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # a parameter, and its numbers


@dataclass(frozen=True)
class _Delta:
    """The folder, and its tensors by the names of the fine-tune."""

    checkpoint: CompressedCheckpoint
    view: DenseCheckpoint


@dataclass
class _Plan:
    """What becomes of each tensor.

    Attributes:
        products: stored name -> modules that multiply by it, or look it up.
        others: parameters that are changed while the difference is on the model.
    """

    products: dict[str, list[str]] = field(default_factory=dict)
    others: list[StoredParameter] = field(default_factory=list)


def switch_delta(
    model: nn.Module, folder: Path | str | None, *, base: Path | str | None = None, resident: str = AUTO
) -> None:
    """Make a model of transformers the fine-tune that a difference stands for, or the base again.

    The difference that was on it is taken off first. The base may be held compressed: its error then stays.

    Args:
        model: the base, dense or compressed, changed in place.
        folder: written by compress with a base; None for the base alone, bit by bit as it was.
        base: the plain checkpoint of the model, whose checksum is compared with that in the folder; None trusts names
            and shapes.
        resident: form of the differences in memory; see `load_compressed`.

    Raises:
        CheckpointError: when the folder holds no differences, or differences to another base or model.
        ConfigError: when codes do not fit the resident form, or a weight is held in a way that nothing can be added to.
    """
    if folder is None:
        _take_off(model)
        return
    checkpoint = open_compressed(Path(folder), differences=True)
    if base_name(checkpoint.manifest.options) is None:
        raise CheckpointError(
            f"{Path(folder).name}: expected differences to a base, got a whole model. Compress it with --base."
        )
    if base is not None:
        check_base(checkpoint.manifest.options, Path(base), Path(folder).name)
    delta = _Delta(checkpoint, DenseCheckpoint(checkpoint.index, checkpoint))
    plan = _plan(model, delta.view)
    _take_off(model)
    attached = _Attached()
    setattr(model, _KEPT, attached)
    try:
        _put_on(model, delta, plan, resident, attached)
    except SpectralSurgeryError:
        _take_off(model)
        raise


def _take_off(model: nn.Module) -> None:
    attached = vars(model).pop(_KEPT, _Attached())
    for handle in attached.handles:
        handle.remove()
    for parameter, numbers in attached.before:
        parameter.data = numbers


def _plan(model: Any, view: DenseCheckpoint) -> _Plan:
    outline = outline_of(model)
    parameters, plan, used = names_in(outline, view.headers).parameters, _Plan(), set[str]()
    coded = {name for name, tensor in view.tensors.items() if tensor.record is not None}
    _check_ties(model, outline, parameters.values(), view)
    for name, parameter in parameters.items():
        stored = {piece.info.name for piece in parameter.pieces}
        used |= stored
        owner, _, leaf = name.rpartition(".")
        if stored.isdisjoint(coded) or leaf != "weight" or parameter.whole is None:
            plan.others.append(parameter)
        elif _multiplies(model.get_submodule(owner)):
            plan.products.setdefault(view.tensors[parameter.whole.name].stored, []).append(owner)
        else:
            plan.others.append(parameter)
    unused = sorted(coded - used)
    if unused:
        raise CheckpointError(
            f"{unused[0]}: expected differences to the weights of a {type(model).__name__} of the same sizes, got a"
            " tensor that has no place in it. decompress gives the fine-tune as a model."
        )
    for parameter in plan.others:
        _dense(model, parameter.name)
    return plan


def _check_ties(model: Any, outline: Any, parameters: Iterable[StoredParameter], view: DenseCheckpoint) -> None:
    """One difference for two weights needs that these are one: tied, or equal."""
    ties = outline.all_tied_weights_keys
    of = {parameter.name: parameter for parameter in parameters}
    stored = {name: view.tensors[one.whole.name].stored for name, one in of.items() if one.whole is not None}
    for alias, name in ties.items():
        if alias in stored and name in stored and stored[alias] != stored[name]:
            raise CheckpointError(
                f"{alias}: expected one tensor with {name}, to which the base ties it, got two in the fine-tune."
                " decompress gives the fine-tune as a model."
            )
    first: dict[str, str] = {}
    for name, kept in stored.items():
        other = first.setdefault(kept, name)
        tied = name == other or ties.get(name, name) == ties.get(other, other)
        if not tied and not torch.equal(_dense(model, name), _dense(model, other)):
            raise CheckpointError(
                f"{name}: expected a separate tensor in the fine-tune, as in the base, got one tied to {other}."
                " decompress gives the fine-tune as a model."
            )


def _multiplies(module: nn.Module) -> bool:
    """Whether all that a module does with its weight is a product or a look-up, to which another can be added."""
    if isinstance(module, nn.Embedding):
        return type(module) in (nn.Embedding, EmbeddingStandIn) and module.max_norm is None
    return type(module) in (nn.Linear, LinearStandIn) or is_conv1d(module)


def _dense(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer that is there as numbers."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    found = module._parameters.get(leaf, module._buffers.get(leaf))
    if found is None:
        raise ConfigError(
            f"{name}: expected a dense weight in a {type(module).__name__}, which does more than multiply by it, got a"
            " compressed one. Load the plain base to put differences on."
        )
    return found


def _put_on(model: nn.Module, delta: _Delta, plan: _Plan, resident: str, attached: _Attached) -> None:
    for stored, owners in plan.products.items():
        forms, form = resident_forms(delta.checkpoint, (stored,), resident)
        weight = SpectralWeight(forms, form)
        attached.handles += [_add_to(model.get_submodule(owner), weight) for owner in owners]
    changed = set[int]()
    for parameter in plan.others:
        target = _dense(model, parameter.name)
        if id(target) in changed:
            continue
        numbers = _numbers(target, parameter, delta)
        if not torch.equal(numbers, target):
            attached.before.append((target, target.data))
            target.data = numbers
            changed.add(id(target))


def _numbers(target: Tensor, parameter: StoredParameter, delta: _Delta) -> Tensor:
    """What the fine-tune has in the place of the base's: as stored, or the sum with a difference, rounded once."""
    tensors, stored = delta.view.tensors, {piece.info.name for piece in parameter.pieces}
    differs = any(tensors[name].record is not None for name in stored)

    def read(info: TensorInfo) -> Tensor:
        tensor = tensors[info.name]
        if tensor.record is not None:
            return decoded(delta.checkpoint, tensor.stored)
        return read_tensor(delta.checkpoint.index.tensors[tensor.stored]).to(torch.float32 if differs else target.dtype)

    if not differs:
        return parameter.read(read).to(target)
    if any(tensors[name].record is None for name in stored):
        raise CheckpointError(
            f"{parameter.name}: expected differences for all tensors that it is made of, got some of them whole."
            " decompress gives the fine-tune as a model."
        )
    pieces = tuple(replace(piece, info=replace(piece.info, dtype="F32")) for piece in parameter.pieces)
    difference = replace(parameter, pieces=pieces).read(read)
    return (target.data.float() + difference.to(target.device)).to(target.dtype)


def _add_to(module: nn.Module, weight: SpectralWeight) -> RemovableHandle:
    looks_up, turned = isinstance(module, nn.Embedding), is_conv1d(module)

    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if weight.forms[0].scale.device != output.device:
            weight.to(output.device)
        if looks_up:
            return output + weight.rows(args[0]).to(output.dtype)
        product = weight.matmul_transposed(args[0]) if turned else weight.matmul(args[0])
        return output + product.to(output.dtype)

    return module.register_forward_hook(add)
