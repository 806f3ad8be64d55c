"""What a model of the zoo is run on: tensors by name, made anew from the random state at each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Maker = Callable[[], Tensor]
Inputs = Callable[[Any], dict[str, Tensor]]  # model -> keyword arguments of its forward

IMAGE = 300  # the token that stands for a part of an image or of a sound


def tokens(length: int = 12, batch: int = 2) -> Maker:
    """Tokens [batch, length] of words: none of the first five, none of the special ones."""
    return lambda: torch.randint(5, 290, (batch, length))


def tokens_with_image(length: int, first: int, count: int) -> Maker:
    """One row of tokens, of which ``count`` from ``first`` on stand for an image."""

    def make() -> Tensor:
        row = torch.randint(5, 290, (1, length))
        row[0, first : first + count] = IMAGE
        return row

    return make


def ending_in(token: int, length: int = 10, batch: int = 2) -> Maker:
    """Tokens [batch, length] that end in ``token``."""

    def make() -> Tensor:
        rows = torch.randint(5, 290, (batch, length))
        rows[:, -1] = token
        return rows

    return make


def noise(*shape: int) -> Maker:
    """Standard normal numbers."""
    return lambda: torch.randn(shape)


def between(low: int, high: int, *shape: int) -> Maker:
    """Whole numbers from low to high - 1."""
    return lambda: torch.randint(low, high, shape)


def ones(*shape: int) -> Maker:
    """A mask that hides nothing, int64."""
    return lambda: torch.ones(shape, dtype=torch.long)


def fixed(values: list[Any]) -> Maker:
    """These numbers."""
    return lambda: torch.tensor(values)


def of(makers: Mapping[str, Maker]) -> Inputs:
    """Inputs that do not depend on the model."""
    return lambda model: {name: make() for name, make in makers.items()}  # noqa: ARG005 - as others are called


text = of({"input_ids": tokens()})
pairs = of({"input_ids": tokens(), "decoder_input_ids": tokens(7)})
pixels_64 = of({"pixel_values": noise(1, 3, 64, 64)})
wave = of({"input_values": noise(1, 2000)})
text_and_image = of({"input_ids": tokens(10), "attention_mask": ones(2, 10), "pixel_values": noise(2, 3, 32, 32)})
clip_pair = of({"input_ids": ending_in(299), "attention_mask": ones(2, 10), "pixel_values": noise(2, 3, 32, 32)})


def masked_text(model: Any) -> dict[str, Tensor]:
    """Two rows of text, the second of three tokens fewer."""
    del model
    ids = tokens()()
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels(model: Any) -> dict[str, Tensor]:
    """One image of the size that the model's configuration says."""
    size = getattr(model.config, "image_size", 32)
    side = size[0] if isinstance(size, (list, tuple)) else size
    return {"pixel_values": torch.randn(1, getattr(model.config, "num_channels", 3), side, side)}


def image_text(length: int, first: int, count: int, more: Mapping[str, Maker] | None = None) -> Inputs:
    """One row of text with the places of an image, the mask, and the image (or what ``more`` gives)."""
    makers = {"input_ids": tokens_with_image(length, first, count), "attention_mask": ones(1, length)}
    return of(makers | dict(more if more is not None else {"pixel_values": noise(1, 3, 32, 32)}))


# inputs that are text and nothing else: what --calibrate and --heal can give
READ = (text, masked_text, pairs)
