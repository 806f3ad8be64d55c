"""adapter_config.json: what PEFT says about an adapter, and what we say.

Source: the fields that PEFT 0.21 writes for FOURIERFT and LORA; ours are written the same way.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterMethod, AdapterSpec
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.header import named
from spectral_surgery.targets import ALL_LINEAR, ModuleTargets

PEFT_VERSION = "0.21.2"  # whose fields these are
_ABOUT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}

Sizes = Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class Dialect:
    """What PEFT's files of a method say beyond the settings we have.

    Attributes:
        off: features we do not have, with the value that means without.
        read: features that tensors or targets say again, with the value that means without.
        changing: reason by start of a value of init_lora_weights with which training starts from another base.
        unused: settings that only matter in training, with PEFT's default.
        choices: values that change nothing once an adapter is trained, PEFT's default first.
        counts: settings that are positive numbers, or patterns of such.
        sizes: settings of a layer -> shape by key of its tensors, None where it depends on the layer.
        absent: settings that mean another value than ours when a file does not say them.
        bias: PEFT's word for our ``<method>_only``.
    """

    off: Mapping[str, object] = field(default_factory=dict)
    read: Mapping[str, object] = field(default_factory=dict)
    changing: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, object] = field(default_factory=dict)
    choices: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    counts: tuple[str, ...] = ()
    sizes: Callable[[Any], Sizes] | None = None
    absent: Mapping[str, object] = field(default_factory=dict)
    bias: str | None = None

    @property
    def defaults(self) -> dict[str, object]:
        """What is written for everything we do not have."""
        return {**self.off, **self.read, **self.unused, **{name: values[0] for name, values in self.choices.items()}}


_LORA_OFF: dict[str, object] = dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config"))
_LORA_OFF |= dict.fromkeys(("layer_replication", "megatron_config", "monteclora_config", "use_bdlora", "velora_config"))
_LORA_OFF |= {"use_qalora": False}
_LORA_READ: dict[str, object] = dict.fromkeys(("lora_bias", "use_dora"), False)
_LORA_READ |= {"trainable_token_indices": None, "target_parameters": None, "ensure_weight_tying": False}
_LORA_UNUSED: dict[str, object] = {"corda_config": None, "eva_config": None, "lora_ga_config": None}
_LORA_UNUSED |= {"loftq_config": {}, "lora_dropout": 0.0, "megatron_core": "megatron.core", "qalora_group_size": 16}
_TARGETS = tuple(item.name for item in fields(ModuleTargets) if item.name not in _LORA_READ)
_SUBTRACTS = (
    "which takes a part out of the base when training starts, so the files hold no update of the base as it is. Save it"
    " from PEFT with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a LoRA of it."
)
_QUANTISES = (
    "which replaces the base by a quantised one when training starts, so the files hold no update of the base as it"
    " is. Merge it with PEFT into the base it was trained with, and save that model."
)

DIALECTS: Mapping[str, Dialect] = {
    "FOURIERFT": Dialect(
        counts=("n_frequency", "n_frequency_pattern"),
        sizes=lambda config: {"spectrum": (config.n_frequency,)},
        bias="fourier_only",
    ),
    "LORA": Dialect(
        off=_LORA_OFF,
        read=_LORA_READ,
        changing={**dict.fromkeys(("pissa", "olora", "corda", "lora_ga"), _SUBTRACTS), "loftq": _QUANTISES},
        unused=_LORA_UNUSED,
        choices={
            "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),  # the base stays
            "use_rslora": (False, True),
        },
        counts=("r", "rank_pattern"),
        sizes=lambda config: {"A": (config.r, None), "B": (None, config.r)},
        absent={"lora_alpha": 8},
    ),
}


def dialect_of(method: AdapterMethod[Any]) -> Dialect:
    """What its files say beyond our settings; nothing for our methods."""
    return DIALECTS.get(method.peft_type, Dialect())


def to_config(spec: AdapterSpec, layers: list[str], features: Mapping[str, object] | None = None) -> dict[str, object]:
    """The content of adapter_config.json.

    Raises CheckpointError when a setting is still to be decided, or a layer is not among the targets.
    """
    settings = {name: _plain(value) for name, value in asdict(spec.config).items()}
    if "auto" in settings.values():
        raise CheckpointError(
            f"{spec.method.name}: expected numbers in files, got a setting that is still 'auto'. Use the"
            " specification that inject returns."
        )
    about: dict[str, object] = {
        "auto_mapping": None,
        "base_model_name_or_path": spec.base_model,
        "inference_mode": True,
        "peft_type": spec.method.peft_type,
        "peft_version": PEFT_VERSION,
        "revision": spec.revision,
        "task_type": spec.task_type,
    }
    defaults = {**dialect_of(spec.method).defaults, **(features or {})}
    return {**defaults, **settings, **_targets_to_config(spec, layers), **about}


def from_config(config: Mapping[str, object], where: str) -> AdapterSpec:
    """Read the content of adapter_config.json.

    Returns:
        The specification, as far as it does not depend on the tensors; see `settle`.

    Raises:
        CheckpointError: for an unknown method, a setting of another type, or a feature we do not have.
    """
    by_type = {row.peft_type: row for row in METHODS.values()}
    method = by_type.get(str(config.get("peft_type")))
    if method is None:
        known = ", ".join(by_type)
        raise CheckpointError(f"{where}: expected {known} as peft_type, got {named([config.get('peft_type')])}.")
    dialect = dialect_of(method)
    setting_names = {item.name for item in fields(method.config)}
    _refuse_changed_base(config, dialect, where)
    _refuse_features(config, dialect, setting_names | _ABOUT | {*_TARGETS, *dialect.unused, *dialect.read}, where)
    settings = _settings(method.config, {**dialect.absent, **config}, where)
    _refuse_counts(settings, dialect, where)
    try:
        settled = method.config(**settings)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return AdapterSpec(
        method,
        settled,
        _targets_from_config(config, method, dialect, where),
        base_model=_text(config, "base_model_name_or_path", where),
        revision=_text(config, "revision", where),
        task_type=_text(config, "task_type", where),
    )


def settle(spec: AdapterSpec, config: Mapping[str, object], layers: list[str]) -> AdapterSpec:
    """Express what PEFT means otherwise by the settings we have, once the layers are known.

    Returns A specification with the same weight updates: rank-stabilized LoRA scales by lora_alpha / sqrt(r), and
    LoRA's patterns are whole alternatives.
    """
    if spec.method.peft_type != "LORA":
        return spec
    lora = replace(
        spec.config, rank_pattern=_grouped(spec.config.rank_pattern), alpha_pattern=_grouped(spec.config.alpha_pattern)
    )
    if config.get("use_rslora"):
        scales = {re.escape(name): _stabilized(lora.for_layer(name)) for name in layers}
        lora = replace(lora, lora_alpha=_stabilized(lora), alpha_pattern=scales)
    return replace(spec, config=lora)


def _grouped(patterns: Mapping[str, Any]) -> dict[str, Any]:
    return {f"(?:{pattern})" if "|" in pattern else pattern: value for pattern, value in patterns.items()}


def _stabilized(config: Any) -> float:
    return float(config.lora_alpha * math.sqrt(config.r))


def _plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (tuple, set, frozenset)) else value


def _targets_to_config(spec: AdapterSpec, layers: list[str]) -> dict[str, object]:
    targets = spec.targets
    if targets.target_modules in (None, ALL_LINEAR):  # what is left to a rule may be another set elsewhere
        targets = replace(targets, target_modules=tuple(layers), layers_to_transform=None)
    strange = [name for name in layers if not targets.matches(name)]
    if strange:
        raise CheckpointError(
            f"layers: expected ones that target_modules matches, got {named(strange)}, which have an adapter."
            " Correct the specification."
        )
    numbered = targets.layers_to_transform is not None and not isinstance(targets.target_modules, str)
    dialect = dialect_of(spec.method)
    only = f"{spec.method.name}_only"
    return {
        "target_modules": _plain(targets.target_modules),
        "exclude_modules": _plain(targets.exclude_modules),
        "layers_to_transform": _plain(targets.layers_to_transform) if numbered else None,  # PEFT refuses it otherwise
        "layers_pattern": (list(targets.layers_pattern) or None) if numbered else None,
        "modules_to_save": list(targets.modules_to_save) or None,
        "bias": dialect.bias if dialect.bias and targets.bias == only else targets.bias,
        "fan_in_fan_out": targets.fan_in_fan_out,
        **({"ensure_weight_tying": targets.ensure_weight_tying} if "ensure_weight_tying" in dialect.read else {}),
    }


def _targets_from_config(
    config: Mapping[str, object], method: AdapterMethod[Any], dialect: Dialect, where: str
) -> ModuleTargets:
    def of(name: str, hint: Any, default: Any) -> Any:
        value = config.get(name)
        if value is None or value == []:
            return default
        if not _fits(hint, value):
            raise CheckpointError(f"{where}: expected {_said(hint)} as {name}, got {named([value])}.")
        return tuple(value) if isinstance(value, list) else value

    names, numbers = tuple[str, ...], tuple[int, ...]
    numbered = of("layers_to_transform", int | numbers, None)
    pattern = of("layers_pattern", str | names, ())
    bias = of("bias", str, "none")
    parameters = of("target_parameters", names, ())
    target = of("target_modules", str | names, () if parameters else None)
    if target is None:
        raise CheckpointError(
            f"{where}: expected a regular expression or a list of names of modules as target_modules, got"
            f" {named([config.get('target_modules')])}."
        )
    try:
        return ModuleTargets(
            ALL_LINEAR if isinstance(target, str) and target.lower() == ALL_LINEAR else target,
            of("exclude_modules", str | names, None),
            (numbered,) if isinstance(numbered, int) else numbered,
            (pattern,) if isinstance(pattern, str) else pattern,
            of("modules_to_save", names, ()),
            f"{method.name}_only" if bias == dialect.bias else bias,
            of("fan_in_fan_out", bool, False),
            parameters,
            of("ensure_weight_tying", bool, False),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _refuse_changed_base(config: Mapping[str, object], dialect: Dialect, where: str) -> None:
    start = str(config.get("init_lora_weights")).lower()
    for method, reason in dialect.changing.items():
        if start.startswith(method):
            raise CheckpointError(
                f"{where}: expected an adapter of an unchanged base, got init_lora_weights {named([start])}, {reason}"
            )


def _refuse_features(config: Mapping[str, object], dialect: Dialect, known: set[str], where: str) -> None:
    for name, values in dialect.choices.items():
        if name in config and config[name] not in values:
            listed = ", ".join(map(str, values))
            raise CheckpointError(f"{where}: expected {listed} as {name}, got {named([config[name]])}.")
    wanted = {
        name: value
        for name, value in config.items()
        if name not in known and name not in dialect.choices and value not in (None, False, {}, [])
    }
    if wanted:
        listed = ", ".join(f"{name} = {named([value])}" for name, value in sorted(wanted.items()))
        raise CheckpointError(
            f"{where}: expected an adapter without {listed}, which is not supported; without it the adapter would be"
            " wrong. Merge it with PEFT, or train one without."
        )


def _settings(row: type[Any], config: Mapping[str, object], where: str) -> dict[str, Any]:
    hints = get_type_hints(row)
    settings = {}
    for item in fields(row):
        value = config.get(item.name)
        if item.name not in config or (value is None and get_origin(hints[item.name]) is not None):
            continue  # null is PEFT's other word for an empty pattern
        if not _fits(hints[item.name], value) or value == "auto":
            accepted = _said(hints[item.name])
            raise CheckpointError(
                f"{where}: expected {accepted} as {item.name}, got {named([value])}. {item.metadata['help']}"
            )
        settings[item.name] = tuple(value) if isinstance(value, list) else value
    return settings


def _refuse_counts(settings: Mapping[str, Any], dialect: Dialect, where: str) -> None:
    for name in dialect.counts:
        value = settings.get(name, {})
        values = value.values() if isinstance(value, Mapping) else [value]
        if any(count <= 0 for count in values):
            raise CheckpointError(f"{where}: expected positive numbers as {name}, got {named([value])}.")


def _text(config: Mapping[str, object], name: str, where: str) -> str | None:
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{where}: expected a text or null as {name}, got {named([value])}.")
    return value


def _fits(hint: Any, value: object) -> bool:
    """Whether a JSON value is of an annotated type."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(part, value) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is tuple:
        return isinstance(value, list) and all(_fits(parts[0], item) for item in value)
    if kind is not None:  # a mapping from text
        return isinstance(value, dict) and all(_fits(parts[1], item) for item in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint or (value is None and hint is types.NoneType)


def _said(hint: Any) -> str:
    """A type, as error texts name it."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(_said(part) for part in parts if get_args(part) != ("auto",))
    if kind is Literal:
        return ", ".join(map(str, parts))
    if kind is tuple:
        return f"a list of {_said(parts[0])}"
    return f"{_said(parts[1])} by pattern" if kind is not None else str(hint.__name__)
