"""The blocks of a model, what each is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.errors import TargetError
from spectral_surgery.live.running import called

Batch = dict[str, Tensor]
_BESIDE = 0.25  # of the parameters of the blocks may be in other lists
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "use_cache", "cache_position")
Held = Callable[[], Tensor]  # activations that wait, perhaps on the disk, until they are called for


Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # by place, and by name; without the hidden states


@dataclass(frozen=True)
class Sample:
    """What a block is given for some sequences.

    Attributes:
        hidden: hidden states, [B, T, D].
        args: the other arguments that are given by place.
        named: those that are given by name.
        later: both of the blocks after it, which may differ: masks of windows, rotary angles, biases of the first one;
            None of a block that text alone does not run, such as one that looks at images.
        skipped: whether the block is such a one.
    """

    hidden: Held
    args: tuple[Any, ...]
    named: dict[str, Any]
    later: tuple[Arguments | None, ...] = ()
    skipped: bool = False

    def exact(self) -> Sample:
        """The same in float32, whatever the products of the model before were."""
        hidden = self.hidden().float()
        args = tuple(_float32(value) for value in self.args)
        named = {name: _float32(value) for name, value in self.named.items()}
        return Sample(lambda: hidden, args, named, self.later, self.skipped)

    def through(self, block: nn.Module) -> Tensor:
        """The hidden states that a block gives; those that are there, where it is skipped."""
        if self.skipped:
            return self.hidden()
        return hidden_of(called(block, (self.hidden(), *self.args), self.named))


def _float32(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_float32, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def in_memory(tensor: Tensor) -> Held:
    """Put activations away where they are."""
    return lambda: tensor


class Reached(Exception):  # noqa: N818 - no error
    """Raised inside a forward pass: what is wanted of it is there, and the rest is not run."""


class UnchainedError(TargetError):
    """A model computes something between two blocks."""


def has_blocks(model: nn.Module) -> bool:
    """Whether what reads text has one list of blocks that holds most of it, each run once, by itself."""
    return main_list(*text_part(model)) is not None


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks that most parameters of what reads text are in, and its name.

    Raises TargetError when there is none.
    """
    lists = _lists(*text_part(model))
    if not lists:
        raise TargetError(f"{type(model).__name__}: expected a transformer, got a model without a list of blocks.")
    return max(lists.items(), key=lambda item: _size(item[1]))


def main_list(prefix: str, part: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The list of blocks that holds most of a part of a model, each run once, and its name; None without one.

    ``part``: the part; lists inside others do not count.
    """
    lists = sorted(_lists(prefix, part).items(), key=lambda item: _size(item[1]))
    if not lists or any(isinstance(block, nn.ModuleList) for block in lists[-1][1]):
        return None
    planned = getattr(text_config(part), "num_hidden_layers", None)
    encodes = getattr(text_config(part), "is_encoder_decoder", False)  # may have more in one stack than in the other
    again = isinstance(planned, int) and planned > len(lists[-1][1]) and not encodes  # the same are run several times
    beside = sum(_size(other) for _, other in lists[:-1])
    return lists[-1] if not again and beside <= _BESIDE * _size(lists[-1][1]) else None


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text; None when the model has none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # it has several
        return config


def text_part(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that reads text, and its name; all of it where it has no parts."""
    config = text_config(model)
    parts = ((name, module) for name, module in model.named_modules() if getattr(module, "config", None) is config)
    return next(parts, ("", model))


def _lists(prefix: str, part: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules in a part; those inside others are left out."""
    lists: dict[str, nn.ModuleList] = {}
    for inner, module in part.named_modules(prefix=prefix):
        inside = any(inner.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[inner] = module
    return lists


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def captured_inputs(
    model: nn.Module, blocks: nn.ModuleList, batch: Batch, keep: Callable[[Tensor], Held] = in_memory
) -> Sample:
    """What a model gives to its first block, and what besides hidden states to the others; only the first one is run.

    Raises:
        TargetError: when a block is not run, or more than once.
        UnchainedError: when a block is given something else than what the one before it returned.
    """
    seen: dict[int, tuple[Tensor, Arguments]] = {}
    returned: list[Any] = []

    def watched(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if number <= max(seen, default=-1):
                raise TargetError(
                    f"{type(model).__name__}: expected a model that runs each of its blocks once and in order, got one"
                    " that does not."
                )
            seen[number] = _without_hidden(args, named)
            if returned and not torch.equal(seen[number][0], hidden_of(returned[0])):
                raise UnchainedError(
                    f"{type(model).__name__}: expected a model that hands what a block returns to the next one, got one"
                    " that changes it."
                )
            if number == len(blocks) - 1:
                raise Reached
            if not number:
                returned.append(forward(*args, **named))
            return returned[0]

        return lambda *args, **named: run(args, named)

    try:
        for number, block in enumerate(blocks):
            block.forward = watched(number, block.forward)  # some call it themselves, so that hooks would not see it
        with torch.no_grad(), suppress(Reached):
            called(model, named=batch)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    if 0 not in seen:
        raise TargetError(
            f"{type(model).__name__}: expected a model that runs the first of its {len(blocks)} blocks on text alone,"
            " got one that does not."
        )
    hidden, (args, named) = seen[0]
    later = tuple(seen[number][1] if number in seen else None for number in range(1, len(blocks)))
    return Sample(keep(hidden), args, named, later)


@contextmanager
def returning(blocks: nn.ModuleList, hidden: Tensor) -> Iterator[None]:
    """Have all blocks return these hidden states while the context lasts; only the first one is run, to see how."""
    returned: list[Any] = []

    def instead(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if not returned:
                returned.append(_with_hidden(forward(*args, **named), hidden))
            return returned[0]

        return lambda *args, **named: run(args, named)

    try:
        for block in blocks:
            block.forward = instead(block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block returned, with other hidden states in it."""
    if isinstance(output, dict):
        name = "hidden_states" if "hidden_states" in output else next(iter(output))
        return {**output, name: hidden}
    return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden


def _without_hidden(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """The hidden states, and the other arguments."""
    named = {key: value for key, value in named.items() if key not in _CACHES}  # they would grow with every run
    if args:
        return args[0], (args[1:], named)
    name = next(key for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point())
    return named.pop(name), ((), named)


def next_inputs(block: nn.Module, inputs: Sequence[Sample], keep: Callable[[Tensor], Held] = in_memory) -> list[Sample]:
    """The arguments of the next block: the hidden states that this one gives, and what the model gives it besides."""
    samples = []
    for sample, hidden in zip(inputs, outputs_of(block, inputs), strict=True):
        first, *rest = sample.later or (None,)
        args, named = first or ((), {})
        samples.append(Sample(keep(hidden), args, named, tuple(rest), skipped=first is None))
    return samples


@torch.no_grad()
def outputs_of(block: nn.Module, inputs: Sequence[Sample]) -> Iterator[Tensor]:
    """Hidden states that a block gives, one sample after the other; none where `Reached` ended a run, no gradients."""
    for sample in inputs:
        with suppress(Reached):
            yield sample.through(block)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    if isinstance(output, dict):
        return cast(Tensor, output.get("hidden_states", next(iter(output.values()))))
    return cast(Tensor, output[0] if isinstance(output, (tuple, list)) else output)
