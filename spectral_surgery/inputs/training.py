"""What a model is healed or distilled on, what is held out of it, and which inputs a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.files.peft.task import is_causal
from spectral_surgery.inputs.kind import Config, Reading
from spectral_surgery.inputs.kinds import kind_of
from spectral_surgery.inputs.model_input import ModelInput
from spectral_surgery.text.examples import split_examples
from spectral_surgery.text.settings import TextData

_HELD_OUT = 0.05  # of what stands by itself
_MOST_HELD_OUT = {True: 32, False: 256}  # of a language model and of any other
_POOL = 8  # batches drawn together, to be sorted by length


def train_and_held_out(
    data: TextData, folder: Path, config: Config, model: Any, seq_length: int, *, causal: bool | None = None
) -> tuple[list[ModelInput], list[ModelInput]]:
    """Inputs to train on, and others of documents that nothing is trained on.

    Args:
        folder: of the model, with what it reads with.
        config: its config.json.
        model: it.
        seq_length: usual tokens of a sequence at most.
        causal: whether it predicts the next token; None for what config.json says.

    Raises:
        ConfigError: when there are too few, or the model does not know their tokens.
    """
    kind = kind_of(data.file, config)
    causal = is_causal(config) if causal is None else causal
    reading = Reading(data, folder, config, model, data.seq_length or seq_length, causal)
    items = kind.items_of(reading)
    whole = not causal and len(items) == 1  # one sentence is not cut
    parts = [items, []] if whole else split_examples(items, _HELD_OUT)
    limits = data.samples, _MOST_HELD_OUT[causal]
    train, held_out = (kind.inputs(reading, part, limit) for part, limit in zip(parts, limits, strict=True))
    short = causal and kind.unit == "sequences" and bool(train) and train[0].tokens < reading.longest
    if not held_out or not train or short:
        length, got = reading.longest, sum(one.tokens for one in [*train, *held_out])
        raise ConfigError(
            f"{data.file}: expected {kind.summary} for two or more {kind.unit} of up to {length} tokens, got {got}"
            " tokens. Give more of it, or a smaller --seq-length."
        )
    return train, held_out


def inputs_of_step(seed: int, step: int, rank: int, lengths: Sequence[int], size: int) -> list[int]:
    """Which inputs a step of a process takes, the same in every run: of like lengths, so that little is padded."""
    generator = torch.Generator().manual_seed((seed << 40) + (step << 12) + rank)
    pool = torch.randperm(len(lengths), generator=generator)[: _POOL * size].tolist()
    pool.sort(key=lengths.__getitem__)
    slot = int(torch.randint(-(-len(pool) // size), (), generator=generator))
    start = min(slot * size, len(pool) - size)
    return pool[start : start + size]
