"""Our adapter methods as methods of PEFT: get_peft_model, PeftModel, AutoPeftModel, load_adapter and Trainer take them.

`import spectral_surgery` arranges that `register` runs when PEFT is imported. The classes that PEFT wants are made from
the rows of METHODS: a configuration from the method's settings, a layer, a tuner. Source: PEFT 0.21,
`peft/utils/peft_types.py` and `peft/tuners/tuners_utils.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_type_hints

from torch import nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterMethod
from spectral_surgery.adapters.layer import kind_of, shape_of
from spectral_surgery.errors import BackendError, ConfigError
from spectral_surgery.hf.peft.layer import MergedWeight, MethodLayer
from spectral_surgery.live.trained_copy import holds_spectra, trained_copy


def register() -> None:
    """Make PEFT know every row of METHODS that it does not know; once more changes nothing.

    Raises BackendError when PEFT's list of methods cannot be extended.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    train_dense_copies()
    for method in METHODS.values():
        if method.peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
            continue
        add_peft_type(method.peft_type)
        config, layer, tuner = (make(method.name) for make in (config_class, layer_class, tuner_class))
        register_peft_method(
            name=method.peft_type.lower(), config_cls=config, model_cls=tuner, prefix=f"{method.name}_"
        )
        globals().update({cls.__name__: cls for cls in (config, layer, tuner)})  # where pickle looks for them


def train_dense_copies() -> None:
    """Let PEFT train dense copies of compressed modules, where modules_to_save names them; it would copy spectra."""
    from peft.utils.other import ModulesToSaveWrapper

    update = ModulesToSaveWrapper.update
    if update.__module__ == __name__:
        return

    def update_dense(self: Any, adapter_name: str, tied_module: Any = None, **settings: Any) -> None:
        if tied_module is None and adapter_name not in self.modules_to_save and holds_spectra(self.original_module):
            self.modules_to_save[adapter_name] = trained_copy(self.original_module)
        update(self, adapter_name, tied_module=tied_module, **settings)

    ModulesToSaveWrapper.update = update_dense


def add_peft_type(name: str) -> None:
    """Add a member to PEFT's enumeration of methods, which has no public way to do it.

    Raises BackendError when enumerations of this Python or PEFT work otherwise.
    """
    from peft import PeftType

    if name in PeftType.__members__:
        return
    try:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__, member._sort_order_ = PeftType, len(PeftType)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
        done = PeftType(name) is member and list(PeftType)[-1] is member and getattr(PeftType, name) is member
    except (AttributeError, TypeError, ValueError):
        done = False
    if not done:
        raise BackendError(
            f"peft: expected a version that takes the method {name}, such as 0.21 with Python 3.11 to 3.14, got"
            " another. Install one of those; adapters work with spectral_surgery itself in any case."
        )


@dataclass
class TargetSettings:
    """Which modules carry an adapter: the settings that methods of PEFT share."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, ends of names or a regular expression of modules, or all-linear."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules left out, in the same terms."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers meant, where target_modules is a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the lists that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and stored whole, such as a classifier."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases are trained: none, all or <method>_only."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Without effect: the module itself is looked at."})


@cache
def config_class(name: str) -> type[Any]:
    """The PEFT configuration of a method: the fields of PEFT, `TargetSettings`, and the settings of the method."""
    from peft import PeftConfig, PeftType

    method = METHODS[name]

    class Base(TargetSettings, PeftConfig):  # type: ignore[misc]
        def __post_init__(self) -> None:
            super().__post_init__()
            self.peft_type = PeftType(method.peft_type)
            for key in ("target_modules", "exclude_modules"):  # PEFT compares them as sets
                value = getattr(self, key)
                setattr(self, key, set(value) if isinstance(value, list) else value)

    hints = get_type_hints(method.config)
    settings = [
        (
            item.name,
            hints[item.name],
            field(default=item.default, metadata=item.metadata)
            if item.default_factory is dataclasses.MISSING
            else field(default_factory=item.default_factory, metadata=item.metadata),
        )
        for item in fields(method.config)
    ]
    cls = dataclasses.make_dataclass(method.config.__name__, settings, bases=(Base,))
    cls.__doc__ = f"Settings of {name} for PEFT. {method.config.__doc__}"
    cls.__module__ = __name__
    return cls


@cache
def layer_class(name: str) -> type[MethodLayer]:
    """The PEFT layer of a method."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    attributes = {"method": METHODS[name], "adapter_layer_names": (f"{name}_adapter",), "__module__": __name__}
    bases = (MethodLayer, BaseTunerLayer)
    return type(f"{_class_name(name)}Linear", bases, attributes)  # PEFT knows linear layers by this ending


class MethodTuner:
    """How adapters of a method get on a model; combined with PEFT's BaseTuner by `tuner_class`."""

    method: AdapterMethod[Any]
    model: nn.Module
    active_adapter: str | list[str]
    _check_target_module_exists: Any
    _replace_module: Any

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Decide "auto" settings by the shapes of the targets."""
        carriers = {name: module for name, module in model.named_modules() if kind_of(module) is not None}
        if peft_config.target_modules == "all-linear":
            linears = [module for module in carriers.values() if kind_of(module) == "linear"]
        else:
            linears = [m for name, m in carriers.items() if self._check_target_module_exists(peft_config, name)]
        if not linears:
            return  # PEFT says so
        config = self.method.resolve(_settings(self.method, peft_config), [shape_of(module) for module in linears])
        for item in fields(config):
            setattr(peft_config, item.name, getattr(config, item.name))

    def _create_and_replace(  # noqa: PLR0917 - as PEFT calls it
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del parameter_name
        layer = target if isinstance(target, layer_class(self.method.name)) else None
        fresh = layer is None
        layer = layer_class(self.method.name)(target, adapter_name) if layer is None else layer
        config = _settings(self.method, peft_config).for_layer(current_key)
        layer.update_layer(adapter_name, config, inference_mode=peft_config.inference_mode)
        if fresh:
            if adapter_name != self.active_adapter:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)  # type: ignore[misc]  # of BaseTuner
        # PEFT ends each injection with this: every layer is there, so those with one weight are known
        records: dict[int, MergedWeight] = {}
        for layer in model.modules():
            if isinstance(layer, MethodLayer):
                weight = getattr(layer.get_base_layer(), "weight", layer)
                layer.merged_weight = records.setdefault(id(weight), layer.merged_weight)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name)  # type: ignore[misc]  # of BaseTuner
            return
        for layer in self.model.modules():
            if isinstance(layer, MethodLayer):
                layer.cast_adapter(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, adapter_names: list[str] | None = None, **__: Any) -> Iterator[None]:
        # PEFT asks for this before each forward; without it, adapter_names would be dropped without a word
        if adapter_names is not None:
            raise ConfigError(
                f"adapter_names: expected {self.method.name} to serve the whole batch by set_adapter, got one for each"
                " sample. Call the model once for each adapter, or convert_to_lora."
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # <layer>.<method>_adapter.<adapter>.<key> -> <layer>.<file name of key>; PEFT inverts it when it loads
        layer, separator, inner = key.rpartition(f".{cls.method.name}_adapter.{adapter_name}.")
        return f"{layer}.{cls.method.file_name(inner)}" if separator else key


@cache
def tuner_class(name: str) -> type[Any]:
    """The PEFT tuner of a method."""
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    attributes = {
        "method": METHODS[name],
        "prefix": f"{name}_",
        "tuner_layer_cls": layer_class(name),
        "target_module_mapping": dict(USUAL),
        "__module__": __name__,
    }
    return type(f"{_class_name(name)}Model", (MethodTuner, BaseTuner), attributes)


def _settings(method: AdapterMethod[Any], peft_config: Any) -> Any:
    values = {item.name: getattr(peft_config, item.name) for item in fields(method.config)}
    return method.config(**{name: {} if value is None else _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else tuple(value) if isinstance(value, list) else value


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def __getattr__(name: str) -> Any:
    """The classes made here, by their names, such as FouraConfig: for imports and for pickle."""
    if not name.startswith("_"):
        register()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
