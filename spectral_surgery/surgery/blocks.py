"""Running a model block by block, and the second moments of what its linear layers are given.

Activations of all samples wait between two blocks, so that a block is run twice: once to see the inputs of its layers,
and again, after these were changed, for what the next block will be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError, TargetError
from spectral_surgery.surgery.running import called

Batch = dict[str, Tensor]
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "use_cache", "cache_position")
Held = Callable[[], Tensor]  # activations that wait, perhaps on the disk, until they are called for


@dataclass(frozen=True)
class Sample:
    """What a block is given for some sequences.

    Attributes:
        hidden: hidden states, [B, T, D].
        args: the other arguments that are given by place.
        named: those that are given by name.
    """

    hidden: Held
    args: tuple[Any, ...]
    named: dict[str, Any]

    def through(self, block: nn.Module) -> Tensor:
        """The hidden states that a block gives."""
        return hidden_of(called(block, (self.hidden(), *self.args), self.named))


def _all_there(prefix: str, without: str) -> AbstractContextManager[None]:  # noqa: ARG001 - nothing to do
    return nullcontext()


def _in_memory(tensor: Tensor) -> Held:
    return lambda: tensor


class _Reached(Exception):  # noqa: N818 - no error: it stops a forward pass at the first block
    pass


def has_blocks(model: nn.Module) -> bool:
    """Whether a model has a list of blocks."""
    return any(isinstance(module, nn.ModuleList) and len(module) for module in model.modules())


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of equal blocks that most parameters of a model are in, and its name.

    Raises:
        TargetError: when there is none.
    """
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise TargetError(f"{type(model).__name__}: has no list of blocks; a transformer is accepted.")
    return max(lists, key=lambda own: sum(parameter.numel() for parameter in own[1].parameters()))


def blocks_in_turn(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    holding: Callable[[str, str], AbstractContextManager[None]] = _all_there,
    keep: Callable[[Tensor], Held] = _in_memory,
) -> Iterator[tuple[str, nn.Module, Callable[[], Iterator[Tensor]]]]:
    """The blocks in order, each with the inputs that the blocks before it give, as they are by then.

    A model without a list of blocks is one block, with the empty name, that is run from its beginning.

    Args:
        model: in eval mode; a block may be changed while it is the turn's.
        batches: arguments of the model by name.
        holding: has the parameters of one prefix (all, if empty) without those of another in memory meanwhile.
        keep: puts activations away until they are needed.

    Yields:
        (name of the block, the block, a function that runs it on one sample after the other and yields its outputs).

    Raises:
        ConfigError: when there is no sample.
    """
    if not batches:
        raise ConfigError("calibrate: no text; some is accepted.")
    prefix, blocks = find_blocks(model) if has_blocks(model) else ("", nn.ModuleList())
    if not len(blocks):
        with holding("", ""):
            yield "", model, partial(_run_whole, model, batches)
        return
    with holding("", f"{prefix}."):
        inputs = [captured_inputs(model, blocks[0], batch, keep) for batch in batches]
    for number, block in enumerate(blocks):
        name = f"{prefix}.{number}"
        with holding(f"{name}.", ""):
            yield name, block, partial(outputs_of, block, inputs)
            if number + 1 < len(blocks):
                inputs = next_inputs(block, inputs, keep)


@contextmanager
def moments_of(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Sum the second moments of the inputs of layers while the block lasts.

    Args:
        layers: modules that take [..., I], by name. Those that are given the same tensor share one sum.

    Yields:
        H = Xᵀ X, [I, I] float32, by name; filled as the layers run.
    """
    found: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}
    last: tuple[Tensor, str] | None = None  # kept alive, since a new tensor may get the id of one that is gone

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            x = cast(Tensor, args[0])
            if name not in leaders:
                leaders[name] = last[1] if last is not None and last[0] is x else name
            if leaders[name] == name:
                flat = x.detach().reshape(-1, x.shape[-1]).float()
                if name not in found:
                    found[name] = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
                found[name].addmm_(flat.T, flat)
                last = (x, name)

        return see

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield found
        for name, leader in leaders.items():
            found[name] = found[leader]
    finally:
        for handle in handles:
            handle.remove()


def captured_inputs(
    model: nn.Module, first: nn.Module, batch: Batch, keep: Callable[[Tensor], Held] = _in_memory
) -> Sample:
    """What a model gives to its first block; nothing after that is run.

    Args:
        model: in eval mode.
        first: the block.
        batch: arguments of the model by name.
        keep: puts the hidden states away.

    Raises:
        TargetError: when the block is not run.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((args, named))
        raise _Reached

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            called(model, named=batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        raise TargetError(f"{type(model).__name__}: its first block was not run; a transformer is accepted.")
    args, named = seen[0]
    named = {key: value for key, value in named.items() if key not in _CACHES}  # they would grow with every run
    if not args:  # the hidden states came by name
        name = next(key for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point())
        args = (named.pop(name),)
    return Sample(keep(args[0]), args[1:], named)


def next_inputs(
    block: nn.Module, inputs: Sequence[Sample], keep: Callable[[Tensor], Held] = _in_memory
) -> list[Sample]:
    """The arguments of the next block: the hidden states that this one gives, and the rest as it was."""
    return [replace(sample, hidden=keep(own)) for sample, own in zip(inputs, outputs_of(block, inputs), strict=True)]


@torch.no_grad()
def outputs_of(block: nn.Module, inputs: Sequence[Sample]) -> Iterator[Tensor]:
    """Hidden states that a block gives for one sample after the other; no gradients."""
    for sample in inputs:
        yield sample.through(block)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    return cast(Tensor, output[0] if isinstance(output, (tuple, list)) else output)


@torch.no_grad()
def _run_whole(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        yield hidden_of(called(model, named={**batch, "return_dict": False}))
