"""Which tensors or modules an operation applies to: globs over tensor names, PEFT's rules over module names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from spectral_surgery.errors import ConfigError, TargetError

ALL_LINEAR = "all-linear"

V = TypeVar("V")


def matching(names: Iterable[str], patterns: Sequence[str], *, option: str) -> set[str]:
    """Names that match at least one pattern.

    Args:
        patterns: shell globs, where ``*`` also crosses dots: ``encoder.*.weight``.

    Raises:
        TargetError: when a pattern matches no name.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise TargetError(
                f"{option}: expected globs over names such as {some}, got '{pattern}', which matches none of"
                f" {len(names)} tensors."
            )
        found.update(hits)
    return found


@dataclass(frozen=True)
class ModuleTargets:
    """Which modules of a model carry an adapter, in PEFT's terms.

    Attributes:
        layers_pattern: names of the lists the layer numbers count in: ``layers``, ``h``.
        bias: which biases are trained: none, all, or ``<method>_only`` for those of the modules with an adapter.
        fan_in_fan_out: whether the base stores weights as [I, O]; a note for PEFT, we look at the module itself.
        target_parameters: names or ends of names of parameters that have updates themselves, as do stacked experts.
        ensure_weight_tying: whether tied embeddings and output layers have one update, not two.
    """

    target_modules: tuple[str, ...] | str | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter: ends of names with commas, a regular expression over whole names, or"
            " all-linear.",
            "unset": "what is usual for the architecture",
        },
    )
    exclude_modules: tuple[str, ...] | str | None = field(
        default=None, metadata={"help": "Modules that get none, in the same terms."}
    )
    layers_to_transform: tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "Only in these layers of the model, such as 0,1,8-11; not with a regular expression."},
    )
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = field(
        default=(), metadata={"help": "Modules trained and stored whole, such as a classifier.", "metavar": "NAMES"}
    )
    bias: str = "none"
    fan_in_fan_out: bool = False
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant. Raises ConfigError for an unknown bias, or a regular expression that is none."""
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            raise ConfigError(f"bias: expected none, all or <method>_only, got '{self.bias}'.")
        for pattern in (self.target_modules, self.exclude_modules):
            if isinstance(pattern, str):
                _compiled(pattern)

    def matches(self, name: str) -> bool:
        """Whether the module called ``name`` is meant; all-linear means every one that is asked about."""
        if _named_by(self.exclude_modules, name) or self.saves(name):
            return False
        if self.target_modules == ALL_LINEAR:
            return True
        if not _named_by(self.target_modules, name):
            return False
        exact = isinstance(self.target_modules, str) or name in (self.target_modules or ())
        return exact or self.layers_to_transform is None or self._layer(name) in self.layers_to_transform

    def saves(self, name: str) -> bool:
        """Whether the module is, or is inside, one of modules_to_save."""
        return any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in self.modules_to_save)

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Names that parameters of a module would have, if target_parameters mean them."""
        names = [f"{module}.{target.rpartition('.')[2]}" for target in self.target_parameters]
        pairs = zip(names, self.target_parameters, strict=True)
        return tuple(dict.fromkeys(name for name, target in pairs if f".{name}".endswith(f".{target}")))

    def select(self, names: Iterable[str]) -> list[str]:
        """The modules meant, of those that can carry an adapter. Returns the names matched, in order.

        Args:
            names: dotted names of all modules that can.

        Raises:
            TargetError: when there is none.
        """
        names = list(names)
        found = [name for name in names if self.matches(name)]
        if not found:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise TargetError(
                f"target_modules: expected ends of names such as {some}, a regular expression or all-linear, got"
                f" {self.target_modules!r}, which matches none of {len(names)} modules that can carry an adapter."
            )
        return found

    def _layer(self, name: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        for pattern in patterns:
            if match := re.match(pattern, name):
                return int(match.group(1))
        return None


def pattern_value(patterns: Mapping[str, V], name: str, default: V) -> V:
    """The value of the first pattern that matches the end of a module name, as PEFT's ``*_pattern`` settings mean it.

    Args:
        patterns: value by regular expression over the end of a dotted name.
        default: when none matches.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(?:.*\.)?{pattern}$", name):
            return value
    return default


def _named_by(pattern: tuple[str, ...] | str | None, name: str) -> bool:
    if pattern is None:
        return False
    if isinstance(pattern, str):
        return _compiled(pattern).fullmatch(name) is not None
    return any(name == end or name.endswith(f".{end}") for end in pattern)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"target_modules: expected a regular expression, a list of names or all-linear, got '{pattern}' ({error})."
        ) from None
