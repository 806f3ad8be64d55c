"""Token sequences from a file of text, to calibrate and to distil on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError
from spectral_surgery.text.examples import read_examples


def read_sequences(tokenizer: Any, file: Path, *, length: int, samples: int = 0, causal: bool) -> list[list[int]]:
    """Token ids of a text.

    Args:
        tokenizer: of the model.
        file: text, JSONL or CSV.
        length: tokens of a sequence at most.
        samples: sequences at most; 0 for all.
        causal: of a language model, the text is one stream, cut into sequences of equal length; else every line is a
            sequence.

    Returns:
        The sequences; of a text shorter than one of them, what there is.

    Raises:
        ConfigError: when the file cannot be read, or is empty.
    """
    texts = [text for example in read_examples(file) for text in example.texts]
    if causal:
        stream = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
        length = min(length, len(stream))
        found = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)] if length else []
    else:
        lines = [line for text in texts for line in text.splitlines() if line.strip()][: samples or None]
        found = tokenizer(lines, truncation=True, max_length=length)["input_ids"] if lines else []
    return found[: samples or None]


def check_vocabulary(sequences: Sequence[Sequence[int]], model: Any, file: Path) -> None:
    """Refuse tokens that a model has no embedding for.

    Args:
        sequences: of token ids.
        model: of transformers; one whose embeddings are no table of tokens takes what there is.
        file: where they come from, for the text of the error.

    Raises:
        ConfigError: when there is one.
    """
    largest = max((token for sequence in sequences for token in sequence), default=-1)
    size = _vocabulary_of(model)
    if size is not None and largest >= size:
        raise ConfigError(
            f"{file}: has token {largest} where the model knows {size}; a tokenizer of this very model is needed."
        )


def _vocabulary_of(model: Any) -> int | None:
    """Rows of the table of token embeddings; None where there is none."""
    try:
        words = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # transformers does not know where they are
        return None
    table = getattr(words, "weight", None)
    if isinstance(table, Tensor) and table.ndim == 2:
        return len(table)
    return getattr(words, "num_embeddings", None)


def padded(tokenizer: Any, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch: input_ids and attention_mask, [B, T] integers, padded at the end."""
    batch = tokenizer.pad(
        {"input_ids": [list(own) for own in sequences]}, padding_side="right", return_tensors="pt", verbose=False
    )
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def equal_lengths(sequences: Sequence[Sequence[int]], tokens: int = 4096) -> list[dict[str, Tensor]]:
    """Batches of sequences of equal length, so that nothing is padded.

    Args:
        sequences: of token ids.
        tokens: of a batch at most.

    Returns:
        input_ids and attention_mask, [B, T], shorter ones first.
    """
    batches: list[list[Sequence[int]]] = []
    for sequence in sorted(sequences, key=len):
        last = batches[-1] if batches else None
        if last and len(last[0]) == len(sequence) and (len(last) + 1) * len(sequence) <= tokens:
            last.append(sequence)
        else:
            batches.append([sequence])
    ids = [torch.tensor(batch) for batch in batches]
    return [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in ids]
