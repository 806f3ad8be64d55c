"""Training any model in the kept spectrum of its weights."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.errors import TargetError
from spectral_surgery.layers import SpectralWeight
from spectral_surgery.layers.kept_spectrum import KeptSpectrum
from spectral_surgery.layers.rounded import Rounded
from spectral_surgery.layers.trainable import TrainableWeight


def train_kept(
    model: nn.Module, spectra: Mapping[str, Sequence[QuantizedSpectrum]], *, rounded: bool = False
) -> list[nn.Parameter]:
    """Put trainable kept coefficients in the place of weights, and freeze everything else.

    The weights become parametrized (torch.nn.utils.parametrize): a module computes its weight from its values on every
    forward pass. Weights that modules share stay shared.

    Args:
        model: changed in place.
        spectra: of each weight, by parameter name: consecutive row ranges of it seen as a matrix.
        rounded: whether codes were rounded from the weights that are there: training then starts at these.

    Returns:
        The values, one flat float32 parameter for each weight, in the order of names.

    Raises:
        TargetError: when the model has no such parameter.
        ShapeError: when spectra do not have the size of their weight.
    """
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in spectra if name not in everywhere]
    if missing:
        raise TargetError(
            f"train_kept: expected parameters of {type(model).__name__}, got '{missing[0]}'. See named_parameters()."
        )
    places: dict[int, list[str]] = {}
    for name, parameter in everywhere.items():
        places.setdefault(id(parameter), []).append(name)
    model.requires_grad_(requires_grad=False)
    parameters = []
    for name, parts in spectra.items():
        weight, values = everywhere[name].detach(), None  # registering puts other data into the parameter
        for place in places[id(everywhere[name])]:
            path, _, leaf = place.rpartition(".")
            module = model.get_submodule(path)
            spectrum = KeptSpectrum(parts, weight.shape, weight if rounded else None).to(weight.device)
            parametrize.register_parametrization(module, leaf, spectrum, unsafe=True)
            holder = cast(Any, module.parametrizations)[leaf]
            values = values if values is not None else holder.original.requires_grad_()
            holder.original = values
            del spectrum.start
        parameters.append(cast(nn.Parameter, values))
    return parameters


def is_trainable(model: nn.Module, vector: str) -> bool:
    """Whether a vector can be given a parametrization, which gives its module another class.

    A module with a weight norm has one already, and shares it with its copies; and transformers finds hidden states by
    the class of a model, which such a vector may be right in.
    """
    module: Any = model.get_submodule(vector.rpartition(".")[0])
    computed = getattr(module, "parametrizations", {})
    normed = "weight" in computed and not isinstance(computed["weight"][0], KeptSpectrum)
    return not normed and not hasattr(module, "config_class")


def train_vectors(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Train biases and scales of norms too, as they will be stored; they take no more room than before.

    Args:
        model: changed in place; `train_kept` comes first, since it freezes them.
        dtypes: that each is stored in, by parameter name.

    Raises:
        TargetError: when the model has no such parameter.
    """
    everywhere = dict(model.named_parameters())
    for name, dtype in dtypes.items():
        if name not in everywhere:
            raise TargetError(
                f"train_vectors: expected parameters of {type(model).__name__}, got '{name}'. See named_parameters()."
            )
        path, _, leaf = name.rpartition(".")
        module, vector = model.get_submodule(path), everywhere[name]
        parametrize.register_parametrization(module, leaf, Rounded(vector, dtype))
        cast(Any, module.parametrizations)[leaf].original.requires_grad_()


def trained_vectors(model: nn.Module) -> dict[str, Tensor]:
    """The vectors of a model after `train_vectors`, by parameter name, in the dtypes that they are stored in."""
    vectors = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for leaf, holder in cast(Any, module.parametrizations).items():
                if isinstance(holder[0], Rounded):
                    vectors[f"{path}.{leaf}" if path else leaf] = holder[0].stored(holder.original)
    return vectors


def trained_weights(model: nn.Module) -> list[tuple[KeptSpectrum, Tensor]]:
    """The parametrizations of a model in training with the values of each, in every place that a weight has."""
    return [(spectrum, values) for _, spectrum, values in _holders(model)]


def kept_spectra(model: nn.Module) -> dict[str, list[QuantizedSpectrum]]:
    """The spectra that a model in training stands for now.

    Returns by parameter name, a spectrum for each row range; a shared weight once.
    """
    return dict(each_kept_spectrum(model))


def each_kept_spectrum(
    model: nn.Module, names: Container[str] | None = None
) -> Iterator[tuple[str, list[QuantizedSpectrum]]]:
    """The items of `kept_spectra`, or those of some names, one in memory at a time."""
    seen = set()
    for name, spectrum, values in _holders(model):
        if id(values) not in seen and (names is None or name in names):
            seen.add(id(values))
            yield name, spectrum.spectra(values)


def unfreeze_spectra(model: nn.Module) -> list[nn.Parameter]:
    """Make the kept coefficients of all spectral layers trainable, with the quantiser in the loop.

    Args:
        model: with spectral layers, as after `compress_model` or `load_compressed`; changed in place. What else
            requires gradients stays as it is.

    Returns:
        The values, one flat float32 parameter for each weight; layers that share a weight share it.

    Raises:
        TargetError: when the model has no spectral layer.
    """
    layers = _layers_with(model, SpectralWeight)
    weights, trainable = [layer.spectrum for layer in layers], dict[int, TrainableWeight]()
    for layer, weight in zip(layers, weights, strict=True):
        if id(weight) not in trainable:
            trainable[id(weight)] = TrainableWeight(weight)
        layer.spectrum = trainable[id(weight)]
    if not trainable:
        raise TargetError(f"{type(model).__name__}: expected a compressed model, got one without spectral layers.")
    return [weight.values for weight in trainable.values()]


def freeze_spectra(model: nn.Module, resident: str = "coded") -> None:
    """End the training of spectral layers: from now on they multiply by what their coefficients were rounded to.

    Args:
        model: after `unfreeze_spectra`; changed in place.
        resident: name in RESIDENTS.

    Raises:
        ConfigError: when the codes do not fit the resident form; nothing is changed then.
    """
    layers = _layers_with(model, TrainableWeight)
    rounded = {id(layer.spectrum): layer.spectrum.settled(resident) for layer in layers}
    for layer in layers:
        layer.spectrum = rounded[id(layer.spectrum)]


def _holders(model: nn.Module) -> Iterator[tuple[str, KeptSpectrum, Tensor]]:
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for leaf, holder in cast(Any, module.parametrizations).items():
                if isinstance(holder[0], KeptSpectrum):
                    yield f"{path}.{leaf}" if path else leaf, holder[0], holder.original


def _layers_with(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "spectrum", None), kind)]
