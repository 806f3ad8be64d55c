"""Running a model block by block.

Activations of all samples wait between two blocks, so that a block is run twice: once until its layers were seen with
their inputs, and again, after these were changed, for what the next block will be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError, TargetError
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

    def through(self, block: nn.Module) -> Tensor:
        """The hidden states that a block gives; those that are there, where it is skipped."""
        if self.skipped:
            return self.hidden()
        return hidden_of(called(block, (self.hidden(), *self.args), self.named))


def _all_there(prefix: str, without: str) -> AbstractContextManager[None]:  # noqa: ARG001 - nothing to do
    return nullcontext()


def _in_memory(tensor: Tensor) -> Held:
    return lambda: tensor


class Reached(Exception):  # noqa: N818 - no error
    """Raised inside a forward pass: what is wanted of it is there, and the rest is not run."""


class UnchainedError(TargetError):
    """A model computes something between two blocks."""


def has_blocks(model: nn.Module) -> bool:
    """Whether a model has one list of blocks that holds most of it, each run once, by itself."""
    lists = sorted(_lists(model).values(), key=_size)
    if not lists or any(isinstance(block, nn.ModuleList) for block in lists[-1]):
        return False
    planned = getattr(text_config(model), "num_hidden_layers", None)
    again = isinstance(planned, int) and planned > len(lists[-1])  # the same blocks are run several times
    return not again and sum(map(_size, lists[:-1])) <= _BESIDE * _size(lists[-1])


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks that most parameters of what reads text are in, and its name.

    Raises:
        TargetError: when there is none.
    """
    lists = _lists(model)
    if not lists:
        raise TargetError(f"{type(model).__name__}: expected a transformer, got a model without a list of blocks.")
    return max(lists.items(), key=lambda item: _size(item[1]))


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text; None when the model has none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # it has several
        return config


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules in the part of a model that reads text; those inside others are left out."""
    config = text_config(model)
    parts = ((name, module) for name, module in model.named_modules() if getattr(module, "config", None) is config)
    prefix, part = next(parts, ("", model))
    lists: dict[str, nn.ModuleList] = {}
    for inner, module in part.named_modules(prefix=prefix):
        inside = any(inner.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[inner] = module
    return lists


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def blocks_in_turn(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    holding: Callable[[str, str], AbstractContextManager[None]] = _all_there,
    keep: Callable[[Tensor], Held] = _in_memory,
) -> Iterator[tuple[str, nn.Module, Callable[[], Iterator[Tensor]]]]:
    """The blocks in order, each with the inputs that the blocks before it give, as they are by then.

    A model without a list of blocks, or that computes something between them, is one block, with the empty
    name, that is run from its beginning.

    Args:
        model: in eval mode; a block may be changed while it is the turn's.
        batches: arguments of the model by name.
        holding: has the parameters of one prefix (all, if empty) without those of another in memory meanwhile.
        keep: puts activations away until they are needed.

    Yields:
        (name of the block, the block, a function that runs it on one sample after the other and yields its outputs;
        none of a sample whose run a hook ended with `Reached`).

    Raises:
        ConfigError: when there is no sample.
    """
    if not batches:
        raise ConfigError("calibrate: expected some text, got none.")
    prefix, blocks = find_blocks(model) if has_blocks(model) else ("", nn.ModuleList())
    inputs: list[Sample] = []
    if len(blocks):
        with suppress(UnchainedError), holding("", f"{prefix}."), holding(f"{prefix}.0.", ""):
            inputs = [captured_inputs(model, blocks, batch, keep) for batch in batches]
    if not inputs:
        with holding("", ""):
            yield "", model, partial(_run_whole, model, batches)
        return
    for number, block in enumerate(blocks):
        name = f"{prefix}.{number}"
        with holding(f"{name}.", ""):
            yield name, block, partial(outputs_of, block, inputs)
            if number + 1 < len(blocks):
                inputs = next_inputs(block, inputs, keep)


def captured_inputs(
    model: nn.Module, blocks: nn.ModuleList, batch: Batch, keep: Callable[[Tensor], Held] = _in_memory
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


def next_inputs(
    block: nn.Module, inputs: Sequence[Sample], keep: Callable[[Tensor], Held] = _in_memory
) -> list[Sample]:
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


@torch.no_grad()
def _run_whole(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        with suppress(Reached):
            yield hidden_of(called(model, named={**batch, "return_dict": False}))
