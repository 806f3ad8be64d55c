"""Put adapters on the modules of a model, choose among them, and take them off again.

The parameters of the model are never written: taking the adapters off gives back the same modules with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.adapters.layer import AdaptedLayer, forms_of, shape_of
from spectral_surgery.adapters.saved import BIAS_RECORD, SavedModule, TrainedBias
from spectral_surgery.errors import CheckpointError, ConfigError, TargetError
from spectral_surgery.live.choose_targets import candidates, resolve
from spectral_surgery.live.trained_copy import trained_copy
from spectral_surgery.targets import ALL_LINEAR

DEFAULT = "default"


def inject(model: nn.Module, spec: AdapterSpec, name: str = DEFAULT) -> AdapterSpec:
    """Put fresh adapters on the target modules, make them the active ones, and train nothing else.

    Args:
        model: changed in place: each target is wrapped, its parameters stay where they are.
        name: of the adapter; several may be on a model.

    Returns:
        The specification with every choice made: targets listed, "auto" settings resolved.

    Raises:
        TargetError: when no module matches.
        ConfigError: when the name is taken, or a setting does not fit a layer.
    """
    _check_name(model, name)
    spec = resolve(model, spec)
    modules = dict(candidates(model, everything=True))
    targets = spec.targets.select(modules)
    fresh = {target: spec.build(target, *shape_of(modules[target])) for target in targets}  # all fit, or none is put on
    _put_on(model, spec, name, fresh)
    return spec


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers that carry adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def set_active(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Choose the adapters in use, train those alone, and switch adapters on.

    Args:
        weights: factor by name; empty for the base alone.

    Raises:
        ConfigError: when a name is on no layer.
    """
    known = adapter_names(model)
    for name in weights:
        if name not in known:
            raise ConfigError(f"adapter: expected one of this model ({', '.join(known) or 'none'}), got '{name}'.")
    for layer in adapted_layers(model).values():
        layer.set_active({name: weight for name, weight in weights.items() if name in layer.adapters})
        layer.enabled = True
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in weights)
    for _, part in _extras(model):
        part.activate([name for name in weights if name in part.names])


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on a model, sorted."""
    return sorted({name for _, part in _parts(model) for name in part.names})


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the base alone while the block lasts."""
    parts = [part for _, part in _parts(model)]
    before = [part.enabled for part in parts]
    for part in parts:
        part.enabled = False
    try:
        yield
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take adapters off; a layer without any is the module that was there before.

    Args:
        name: which; None for all.

    Raises:
        ConfigError: when the name is on no layer.
    """
    known = adapter_names(model)
    if name is not None and name not in known:
        raise ConfigError(f"adapter: expected one of this model ({', '.join(known) or 'none'}), got '{name}'.")
    for target, part in list(_parts(model)):
        for adapter in [adapter for adapter in part.names if name is None or adapter == name]:
            part.drop(adapter)
        if not part.names and not isinstance(part, TrainedBias):
            _replace(model, target, part.base_layer)


def state_of(
    model: nn.Module, spec: AdapterSpec, name: str = DEFAULT, *, full: Callable[[Tensor], Tensor] = lambda t: t
) -> AdapterState:
    """Copy the numbers of an adapter out of a model. Raises ConfigError when the name is on no layer."""
    carriers = {target: layer for target, layer in adapted_layers(model).items() if name in layer.adapters}
    layers = {
        target: {key: _copied(value, full) for key, value in layer.adapters[name].state_dict().items()}
        for target, layer in carriers.items()
    }
    if not layers:
        raise ConfigError(
            f"adapter: expected one of this model ({', '.join(adapter_names(model)) or 'none'}), got '{name}'."
        )
    extra = {
        key: _copied(value, full)
        for prefix, part in _extras(model)
        if name in part.names
        for key, value in _prefixed(prefix, part.tensors(name)).items()
    }
    return AdapterState(spec, layers, extra, *forms_of({name: layer.base_layer for name, layer in carriers.items()}))


def assign(model: nn.Module, state: AdapterState, name: str = DEFAULT) -> None:
    """Set the numbers of an adapter that is on a model already.

    Raises CheckpointError when it does not fit the model.
    """
    layers = {target: layer for target, layer in adapted_layers(model).items() if name in layer.adapters}
    if layers.keys() != state.layers.keys():
        wrong = ", ".join(sorted(layers.keys() ^ state.layers.keys()))
        raise CheckpointError(
            f"adapter '{name}': expected the layers that it is on, got others: {wrong} on one side only."
        )
    for target, tensors in state.layers.items():
        layers[target].adapters[name].load_state_dict(tensors)
    _load_extras(model, state.extra, name)


def load(model: nn.Module, state: AdapterState, name: str = DEFAULT) -> None:
    """Put a stored adapter on a model and make it the active one.

    Args:
        model: the base model, changed in place.

    Raises:
        CheckpointError: when it does not fit the model; all mismatches are listed and nothing is changed.
        ConfigError: when the name is taken.
    """
    _check_name(model, name)
    if state.only_merged:
        raise ConfigError(
            f"adapter '{name}': expected none with {state.only_merged}, which a model here has no place for. Merge it"
            " into the files of the base, or use it with PEFT."
        )
    modules = dict(candidates(model, everything=True))
    state = _without_copies(model, state, name)
    wrong = [f"{target} is not in the model" for target in state.layers if target not in modules]
    if state.spec.targets.target_modules != ALL_LINEAR:
        absent = (target for target in modules if target not in state.layers and state.spec.targets.matches(target))
        wrong += [f"{target} is a target and has no tensors" for target in absent]
    adapters = {}
    for target in state.layers:
        if target in modules:
            try:
                adapters[target] = state.build(target, *shape_of(modules[target]))
            except (CheckpointError, ConfigError) as error:
                wrong.append(str(error))
    if wrong:
        raise CheckpointError(
            f"adapter '{name}': expected the model it was made for, got one that it does not fit: {'; '.join(wrong)}"
        )
    trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _put_on(model, state.spec, name, adapters)
    try:
        _load_extras(model, state.extra, name)
    except CheckpointError:
        detach(model, name)
        for parameter in trained_before:
            parameter.requires_grad_(True)
        raise


def _without_copies(model: nn.Module, state: AdapterState, name: str) -> AdapterState:
    """An adapter without the weights of the base that PEFT stored beside it."""
    end = ".base_layer.weight"
    for key, tensor in state.extra.items():
        weight = model.get_parameter(key.replace(".base_layer.", ".")) if key.endswith(end) else None
        if weight is not None and (weight.shape != tensor.shape or not torch.equal(weight.cpu(), tensor.to(weight))):
            raise CheckpointError(
                f"adapter '{name}': expected the base that it was trained on, got another: {key} differs. Merge it into"
                " the files of the base, which takes the stored one."
            )
    return replace(state, extra={key: tensor for key, tensor in state.extra.items() if not key.endswith(end)})


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters of a model."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _copied(tensor: Tensor, full: Callable[[Tensor], Tensor]) -> Tensor:
    return full(tensor.detach()).cpu().clone()


def _check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name:
        raise ConfigError(f"adapter name: expected letters, digits, - and _, got '{name}'.")
    if name in adapter_names(model):
        raise ConfigError(
            f"adapter: expected a new name, got '{name}', which is on the model. Use another, or detach it first."
        )


def _put_on(model: nn.Module, spec: AdapterSpec, name: str, adapters: Mapping[str, nn.Module]) -> None:
    whole = _outermost(model, spec)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted = adapted_layers(model)
    for target, adapter in adapters.items():
        layer = adapted.get(target) or _wrap(model, target)
        layer.add(name, adapter)
    for target in whole:
        saved = model.get_submodule(target)
        if not isinstance(saved, SavedModule):
            saved = SavedModule(saved)
            _replace(model, target, saved)
        saved.add(name, trained_copy(saved.base_layer))
    for host in _bias_hosts(model, spec, adapters):
        record = getattr(host, BIAS_RECORD, None) or TrainedBias(host)
        record.add(name)
    set_active(model, {name: 1.0})


def _wrap(model: nn.Module, target: str) -> AdaptedLayer:
    base = model.get_submodule(target)
    layer = AdaptedLayer(base).train(base.training)
    _replace(model, target, layer)
    return layer


def _replace(model: nn.Module, target: str, module: nn.Module) -> None:
    parent, _, leaf = target.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _parts(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer | SavedModule | TrainedBias]]:
    for name, module in model.named_modules():
        if isinstance(module, (AdaptedLayer, SavedModule, TrainedBias)):
            yield name, module


def _extras(model: nn.Module) -> Iterator[tuple[str, SavedModule | TrainedBias]]:
    """What is trained beside adapters, by the prefix of its tensors in the model."""
    for name, part in _parts(model):
        if isinstance(part, SavedModule):
            yield name, part
        elif isinstance(part, TrainedBias):
            yield name.rpartition(".")[0], part


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def _outermost(model: nn.Module, spec: AdapterSpec) -> list[str]:
    outermost: list[str] = []
    for name, _ in model.named_modules():
        if name and spec.targets.saves(name) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost.append(name)
    missing = [
        end for end in spec.targets.modules_to_save if not any(f".{name}".endswith(f".{end}") for name in outermost)
    ]
    if missing:
        raise TargetError(
            f"modules_to_save: expected names of modules, or ends of them, got {missing}, which are not in the model."
        )
    return outermost


def _bias_hosts(model: nn.Module, spec: AdapterSpec, targets: Iterable[str]) -> list[nn.Module]:
    """Modules whose bias is trained."""
    layers = adapted_layers(model)
    if spec.targets.bias == "none":
        return []
    if spec.targets.bias == "all":
        ours = [f"{name}.adapters" for name in layers] + [name for name, _ in _extras(model)]
        hosts = [
            module
            for name, module in model.named_modules()
            if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in ours)
            or hasattr(module, BIAS_RECORD)
        ]
    else:
        hosts = [layers[target].base_layer for target in targets]
    return [host for host in hosts if isinstance(host._parameters.get("bias"), nn.Parameter)]


def _load_extras(model: nn.Module, extra: Mapping[str, Tensor], name: str) -> None:
    parts = {prefix: part for prefix, part in _extras(model) if name in part.names}
    expected = {
        key: tuple(value.shape)
        for prefix, part in parts.items()
        for key, value in _prefixed(prefix, part.tensors(name)).items()
    }
    got = {key: tuple(value.shape) for key, value in extra.items()}
    wrong = [f"{key} is missing" for key in expected if key not in got]
    wrong += [f"{key} is not expected" for key in got if key not in expected]
    wrong += [f"{k} is {got[k]}, not {expected[k]}" for k in got if k in expected and got[k] != expected[k]]
    if wrong:
        raise CheckpointError(
            f"adapter '{name}': expected the model it was made for, got one that it does not fit: {'; '.join(wrong)}"
        )
    for prefix, part in parts.items():
        tensors = part.tensors(name)
        part.load(name, {key: extra[f"{prefix}.{key}"] for key in tensors})
