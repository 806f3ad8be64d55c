"""Running a model block by block, stack after stack: an encoder and then a decoder, what sees and then what reads.

Activations of all samples wait between two blocks, so that a block is run twice: once until its layers were seen with
their inputs, and again, after these were changed, for what the next block will be given. What a stack ends with waits
until the next stack begins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError
from spectral_surgery.live.blocks import (
    Batch,
    Held,
    Reached,
    Sample,
    UnchainedError,
    captured_inputs,
    hidden_of,
    in_memory,
    main_list,
    next_inputs,
    outputs_of,
    returning,
    text_part,
)
from spectral_surgery.live.running import called

Prefixes = tuple[str, ...]
Turn = tuple[str, nn.Module, Callable[[], Iterator[Tensor]]]
TEXT = frozenset({"input_ids"})
_IMAGE, _TARGET = "pixel_values", "decoder_input_ids"


class Batches(Protocol):
    """Batches that may be read several times, one after the other."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Arguments of the model by name."""
        ...


@dataclass(frozen=True)
class Stack:
    """A list of blocks that are run one after the other, and its name."""

    prefix: str
    blocks: nn.ModuleList


def _all_there(prefix: str, without: Prefixes) -> AbstractContextManager[None]:  # noqa: ARG001 - nothing to do
    return nullcontext()


@dataclass(frozen=True)
class Chain:
    """A model as stacks that are run in turn.

    Attributes:
        name: of the part of the model that is called with a batch; empty for all of it.
        entry: that part, in eval mode.
        stacks: in the order in which they are run; none of a model without a list of blocks.
        holding: has the parameters of one prefix (all, if empty) without those of others in memory meanwhile.
    """

    name: str
    entry: nn.Module
    stacks: tuple[Stack, ...]
    holding: Callable[[str, Prefixes], AbstractContextManager[None]] = _all_there

    @property
    def prefixes(self) -> Prefixes:
        """What the names of all parameters in blocks begin with."""
        return tuple(f"{stack.prefix}." for stack in self.stacks)

    @contextmanager
    def outside(self, number: int) -> Iterator[None]:
        """Have what is outside of all blocks in memory, and the first block of each stack up to one."""
        with ExitStack() as held:
            held.enter_context(self.holding("", self.prefixes))
            for prefix in self.prefixes[: number + 1]:
                held.enter_context(self.holding(f"{prefix}0.", ()))
            yield

    def enter(
        self,
        number: int,
        batches: Batches,
        before: Sequence[Sequence[Held]] = (),
        keep: Callable[[Tensor], Held] = in_memory,
    ) -> list[Sample]:
        """What the first block of a stack is given, of each batch.

        Args:
            number: of the stack; what it takes is in memory, see `outside`.
            batches: arguments of the entry.
            before: what each stack before it ends with, of each batch.
            keep: puts activations away until they are needed.

        Raises:
            UnchainedError: when the model does something between two blocks.
        """
        samples = []
        for place, batch in enumerate(batches):
            with self.left([ends[place] for ends in before]):
                samples.append(captured_inputs(self.entry, self.stacks[number].blocks, batch, keep))
        return samples

    @contextmanager
    def left(self, ends: Sequence[Held]) -> Iterator[None]:
        """Have the first stacks end with these hidden states while the context lasts."""
        with ExitStack() as returned:
            for stack, hidden in zip(self.stacks, ends, strict=False):
                returned.enter_context(returning(stack.blocks, hidden()))
            yield

    def in_turn(self, batches: Batches, keep: Callable[[Tensor], Held] = in_memory) -> Iterator[Turn]:
        """The blocks in order, each with the inputs that the blocks before it give, as they are by then.

        A model without stacks, or that computes something between its blocks, is one block, with the name of the entry,
        that is run from its beginning; where it does so in a later stack, that stack is.

        Args:
            batches: arguments of the entry; a block may be changed while it is the turn's.

        Yields:
            (name of the block, the block, a function that runs it on one sample after the other and yields its
            outputs; none of a sample whose run a hook ended with `Reached`).

        Raises:
            ConfigError: when there is no sample.
        """
        if not len(batches):
            raise ConfigError("calibrate: expected something to run the model on, got nothing.")
        before: list[list[Held]] = []
        for number, stack in enumerate(self.stacks):
            inputs: list[Sample] = []
            with suppress(UnchainedError), self.outside(number):
                inputs = self.enter(number, batches, before, keep)
            if not inputs:
                break
            for place, block in enumerate(stack.blocks):
                name = f"{stack.prefix}.{place}"
                with self.holding(f"{name}.", ()):
                    yield name, block, partial(outputs_of, block, inputs)
                    if place + 1 < len(stack.blocks) or number + 1 < len(self.stacks):
                        inputs = next_inputs(block, inputs, keep)
            before.append([sample.hidden for sample in inputs])
        else:
            if self.stacks:
                return
        with self.holding("", ()):
            stack = self.stacks[len(before)] if before else Stack(self.name, nn.ModuleList())
            yield stack.prefix, stack.blocks if before else self.entry, partial(self._run_whole, batches, before)

    @torch.no_grad()
    def _run_whole(self, batches: Batches, before: Sequence[Sequence[Held]]) -> Iterator[Tensor]:
        for place, batch in enumerate(batches):
            with suppress(Reached), self.left([ends[place] for ends in before]):
                yield hidden_of(called(self.entry, named={**batch, "return_dict": False}))


def chain_of(
    model: nn.Module,
    given: Collection[str] = TEXT,
    holding: Callable[[str, Prefixes], AbstractContextManager[None]] = _all_there,
) -> Chain:
    """A model as the stacks that run on some inputs.

    Args:
        model: in eval mode.
        given: names of the inputs: an image alone is for the part that sees, source and target are for an encoder and
            a decoder, text and an image are for the part that sees and the one that reads.
        holding: see `Chain`.
    """
    name, entry = entry_of(model, given)
    lists = [main_list(*part) for part in _parts(name, entry, given)]
    stacks = tuple(Stack(*found) for found in lists if found is not None)
    return Chain(name, entry, stacks if len(stacks) == len(lists) else (), holding)


def entry_of(model: nn.Module, given: Collection[str]) -> tuple[str, nn.Module]:
    """The part of a model that is called with inputs of some names, and its name: all of it, or what sees."""
    sees = _IMAGE in given and "input_ids" not in given and not _sees(model)
    parts = ((name, part) for name, part in model.named_modules() if sees and _sees(part))
    return next(parts, ("", model))


def _parts(name: str, entry: nn.Module, given: Collection[str]) -> list[tuple[str, nn.Module]]:
    """The parts that have a list of blocks each, in the order in which they are run."""
    model: Any = entry
    if getattr(getattr(entry, "config", None), "is_encoder_decoder", False) and _TARGET in given:
        pair = [model.get_encoder(), model.get_decoder()]
        names = {id(part): inner for inner, part in entry.named_modules()}
        if pair[0] is not pair[1] and all(id(part) in names for part in pair):
            return [(names[id(part)], part) for part in pair]
    if _IMAGE not in given:
        return [text_part(entry)]
    if _IMAGE in given and "input_ids" in given:
        seeing = [(inner, part) for inner, part in entry.named_modules() if _sees(part)]
        return [*seeing[:1], text_part(entry)]
    inside = ((inner, part) for inner, part in entry.named_modules(prefix=name) if _sees(part))
    return [next((found for found in inside if main_list(*found) is not None), (name, entry))]


def _sees(part: Any) -> bool:
    """Whether a part of a model is one that images are given to; some say so by their configuration alone."""
    of_config = getattr(getattr(part, "config", None), "base_config_key", None) == "vision_config"
    return isinstance(part, nn.Module) and (getattr(part, "main_input_name", None) == _IMAGE or of_config)
