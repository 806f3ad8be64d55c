"""Running a model block by block, and the second moments of what its linear layers are given.

Activations of all samples wait between two blocks, so that a block is run twice: once to see the inputs of its layers,
and again, after these were changed, for what the next block will be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError, TargetError

Batch = dict[str, Tensor]


class _Reached(Exception):  # noqa: N818 - no error: it stops a forward pass at the first block
    pass


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
    model: nn.Module, batches: Sequence[Batch]
) -> Iterator[tuple[str, nn.Module, Callable[[], list[Tensor]]]]:
    """The blocks in order, each with the inputs that the blocks before it give, as they are by then.

    Args:
        model: in eval mode; a block may be changed while it is the turn's.
        batches: arguments of the model by name.

    Yields:
        (name of the block, the block, a function that runs it on all samples and returns its outputs).

    Raises:
        TargetError: when the model has no blocks.
        ConfigError: when there is no sample.
    """
    if not batches:
        raise ConfigError("calibrate: no text; some is accepted.")
    prefix, blocks = find_blocks(model)
    inputs = [_captured(model, blocks[0], batch) for batch in batches]
    for number, block in enumerate(blocks):
        yield f"{prefix}.{number}", block, partial(_run, block, inputs)
        if number + 1 < len(blocks):
            outputs = _run(block, inputs)
            inputs = [((out, *args[1:]), named) for out, (args, named) in zip(outputs, inputs, strict=True)]


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
                own = flat.T @ flat
                found[name] = found[name] + own if name in found else own
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


def _captured(model: nn.Module, first: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((args, named))
        raise _Reached

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode():
            model(**batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        raise TargetError(f"{type(model).__name__}: its first block was not run; a transformer is accepted.")
    args, named = seen[0]
    if not args:  # the hidden states came by name
        name = next(key for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point())
        named = dict(named)
        args = (named.pop(name),)
    return args, named


def _run(block: nn.Module, inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
    with torch.inference_mode():
        return [_hidden(block(*args, **named)) for args, named in inputs]


def _hidden(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, (tuple, list)) else output)
