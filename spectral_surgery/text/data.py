"""A file of text to calibrate, heal or distil on, what is held out of it, and which sequences a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.models import longest_sequence
from spectral_surgery.text.examples import documents, hold_out
from spectral_surgery.text.sequences import check_vocabulary, token_sequences
from spectral_surgery.text.settings import TextData

_HELD_OUT = 0.05  # of the documents
_MOST_HELD_OUT = {True: 64, False: 256}  # sequences, of a language model and of any other
_POOL = 8  # batches drawn together, to be sorted by length


def train_and_held_out(
    data: TextData, tokenizer: Any, model: Any, *, causal: bool, seq_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token sequences to train on, and others of documents that nothing is trained on.

    Raises:
        ConfigError: when there are too few, or the model does not know their tokens.
    """
    length = data.seq_length or seq_length
    length = min(length, longest_sequence(model) or length)
    texts = documents(data.file, causal=causal)
    parts = hold_out(texts, _HELD_OUT) if causal or len(texts) > 1 else [texts, []]  # one sentence is not cut
    limits = data.samples, _MOST_HELD_OUT[causal]
    train, held_out = (
        token_sequences(tokenizer, part, length=length, samples=limit, causal=causal)
        for part, limit in zip(parts, limits, strict=True)
    )
    if not held_out or not train or (causal and len(train[0]) < length):
        raise ConfigError(
            f"{data.file}: expected text for two or more sequences of up to {length} tokens, got"
            f" {sum(map(len, train + held_out))} tokens. Give more text, or a smaller --seq-length."
        )
    check_vocabulary(train + held_out, model, data.file)
    return train, held_out


def sequences_of_step(seed: int, step: int, rank: int, lengths: Sequence[int], size: int) -> list[int]:
    """Which sequences a step of a process takes, the same in every run: of like lengths, so that little is padded."""
    generator = torch.Generator().manual_seed((seed << 40) + (step << 12) + rank)
    pool = torch.randperm(len(lengths), generator=generator)[: _POOL * size].tolist()
    pool.sort(key=lengths.__getitem__)
    slot = int(torch.randint(-(-len(pool) // size), (), generator=generator))
    start = min(slot * size, len(pool) - size)
    return pool[start : start + size]
