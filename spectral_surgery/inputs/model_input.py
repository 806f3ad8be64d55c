"""What a model is run on once, and batches of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

Batch = dict[str, Tensor]
NOT_JUDGED = -100  # among labels, as in transformers
_NUMBERS = 768  # of an image or a sound, that count as one token: a patch of 16 x 16 of three colours


@dataclass(frozen=True)
class ModelInput:
    """What a model is run on once.

    Attributes:
        shapes: of its tensors by name, without the axis of the batch.
        read: makes the tensors, the same at every call.
        padding: the token that token ids are padded with; anything else is padded with zeros.
        labels: the token that is right at each place of what the model gives, or NOT_JUDGED; empty of other models.
        joined: names of tensors that lie one after the other in a batch, as patches and sizes of images do: their first
            axis is that of the batch, or of all parts of it.
        answer: what is right in words: what is said in a sound, or a class; empty where that is not known.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[], Batch]
    padding: int = 0
    labels: tuple[int, ...] = ()
    answer: str = ""
    joined: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tensors: Batch, padding: int = 0, labels: Sequence[int] = ()) -> ModelInput:
        """Of tensors that are in memory."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(shapes, lambda: tensors, padding, tuple(labels))

    @property
    def tokens(self) -> int:
        """How long it is; of what is no text, about."""
        ids = sum(math.prod(shape) for name, shape in self.shapes.items() if name.endswith("ids"))
        numbers = sum(math.prod(shape) for name, shape in self.shapes.items() if not name.endswith(("ids", "mask")))
        return max(1, ids + numbers // _NUMBERS)


@dataclass(frozen=True)
class EqualShapes:
    """Batches of inputs of equal shapes: nothing is padded. They are made anew whenever they are read."""

    groups: Sequence[Sequence[ModelInput]]
    device: str = "cpu"

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.groups)

    def __iter__(self) -> Iterator[Batch]:
        """Arguments of the model by name, [B, ...] each."""
        for group in self.groups:
            with torch.autocast("cpu", enabled=False):  # what makes inputs counts on float32
                read = [one.read() for one in group]
            together = {name: torch.cat if name in group[0].joined else torch.stack for name in read[0]}
            yield {name: put([one[name] for one in read]).to(self.device) for name, put in together.items()}

    @property
    def tokens(self) -> int:
        """Of all inputs."""
        return sum(one.tokens for group in self.groups for one in group)


def equal_shapes(inputs: Sequence[ModelInput], tokens: int = 4096, device: str = "cpu") -> EqualShapes:
    """Batches of a limited number of tokens; shorter inputs come first."""
    groups: list[list[ModelInput]] = []
    for one in sorted(inputs, key=lambda one: (one.tokens, sorted(one.shapes.items()))):
        last = groups[-1] if groups else None
        if last and last[0].shapes == one.shapes and (len(last) + 1) * one.tokens <= tokens:
            last.append(one)
        else:
            groups.append([one])
    return EqualShapes(groups, device)


def padded(inputs: Sequence[ModelInput]) -> Batch:
    """One batch, [B, ...] each; shorter ones are padded at the end of each axis, see `ModelInput`."""
    read = [one.read() for one in inputs]
    batch = {}
    for name in read[0]:
        tensors = [one[name] for one in read]
        sizes = torch.tensor([tensor.shape for tensor in tensors]).amax(0).tolist()
        value = inputs[0].padding if name.endswith("input_ids") else 0
        if name in inputs[0].joined:
            batch[name] = torch.cat([_filled(tensor, [len(tensor), *sizes[1:]], value) for tensor in tensors])
        else:
            batch[name] = torch.stack([_filled(tensor, sizes, value) for tensor in tensors])
    return batch


def _filled(tensor: Tensor, sizes: Sequence[int], value: int) -> Tensor:
    room = [[0, size - there] for there, size in zip(tensor.shape, sizes, strict=True)]
    return pad(tensor, [count for pair in reversed(room) for count in pair], value=value)


def spaced(inputs: Sequence[ModelInput], tokens: int) -> Sequence[ModelInput]:
    """An evenly spaced sample, within a limit of tokens."""
    return inputs[:: max(1, math.ceil(sum(one.tokens for one in inputs) / tokens))]
