"""Text to heal on: which sequences there are, and which of them a step takes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.models import longest_sequence
from spectral_surgery.text.objectives import Objective
from spectral_surgery.text.sequences import check_vocabulary, read_sequences

_HELD_PART, _HELD_MOST = 0.05, 64
_POOL = 8  # batches drawn together, to be sorted by length


@dataclass(frozen=True)
class HealData:
    """Text to heal on.

    Attributes:
        file: text, JSONL or CSV.
        batch_size: sequences of a step and process; 0 for what is usual for the model.
        seq_length: tokens of a sequence at most; 0 for what is usual for the model.
        trust_remote_code: run the code that a model brings along.
    """

    file: Path
    batch_size: int = 0
    seq_length: int = 0
    trust_remote_code: bool = False

    def digest(self) -> str:
        """What it is, for the manifest and for recognising unfinished work.

        Raises:
            ConfigError: when the file cannot be read.
        """
        if not self.file.is_file():
            raise ConfigError(f"{self.file}: no such file; a text, .csv or .jsonl file is accepted.")
        return f"sha256:{hashlib.sha256(self.file.read_bytes()).hexdigest()}"


def training_text(
    data: HealData, tokenizer: Any, model: Any, objective: Objective
) -> tuple[list[list[int]], list[list[int]]]:
    """Token sequences to train on, and those held out.

    Args:
        data: text.
        tokenizer: of the model.
        model: says how long a sequence may be, and which tokens it knows.
        objective: says how long sequences usually are.

    Raises:
        ConfigError: when there are too few, or the model does not know their tokens.
    """
    causal = objective.name == "tokens"
    length = data.seq_length or objective.seq_length
    length = min(length, longest_sequence(model) or length)
    found = read_sequences(tokenizer, data.file, length=length, causal=causal)
    if len(found) < 2:
        raise ConfigError(
            f"{data.file}: gives {len(found)} sequence of up to {length} tokens; two or more are needed. Give"
            " more text, or a smaller --seq-length."
        )
    check_vocabulary(found, model, data.file)
    if not causal:
        random.Random(0).shuffle(found)  # noqa: S311 - no secret; files are often sorted
    held = min(max(1, round(len(found) * _HELD_PART)), _HELD_MOST if causal else 4 * _HELD_MOST)
    return found[:-held], found[-held:]


def chosen(seed: int, step: int, rank: int, lengths: Sequence[int], size: int) -> list[int]:
    """Which sequences a step of a process takes, the same in every run: of like lengths, so that little is padded.

    Args:
        seed: of the run.
        step: counted from 0.
        rank: of the process.
        lengths: of all sequences.
        size: how many to take, at most as many as there are.
    """
    generator = torch.Generator().manual_seed((seed << 40) + (step << 12) + rank)
    pool = torch.randperm(len(lengths), generator=generator)[: _POOL * size].tolist()
    pool.sort(key=lengths.__getitem__)
    slot = int(torch.randint(-(-len(pool) // size), (), generator=generator))
    start = min(slot * size, len(pool) - size)
    return pool[start : start + size]
