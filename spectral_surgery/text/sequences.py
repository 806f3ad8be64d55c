"""Token sequences of texts, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError
from spectral_surgery.text.examples import Example


def token_sequences(
    tokenizer: Any, texts: Sequence[Example], *, length: int, samples: int = 0, causal: bool
) -> list[list[int]]:
    """Token ids of texts."""
    if causal:
        return cut_stream(tokenizer, [example.texts[0] for example in texts], length, samples=samples)
    lines = [example.texts[0] for example in texts[: samples or None]]
    return list(tokenizer(lines, truncation=True, max_length=length)["input_ids"]) if lines else []


def cut_stream(
    tokenizer: Any, texts: Sequence[str], length: int, *, ended: bool = False, samples: int = 0
) -> list[list[int]]:
    """All texts as one stream of token ids, cut into sequences of equal length; of a short text, what there is.

    Args:
        ended: put the token that ends a text after each, if there are several.
        samples: sequences at most; texts after those that they need are not read. 0 for all.
    """
    end = [tokenizer.eos_token_id] if ended and len(texts) > 1 and tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, verbose=False)["input_ids"]
        stream += end
        if samples and len(stream) >= samples * length:
            break
    length = min(length, len(stream))
    starts = range(0, len(stream) - length + 1, length) if length else ()
    return [stream[start : start + length] for start in starts][: samples or None]


def spaced(sequences: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """An evenly spaced sample of the sequences, within a limit of tokens."""
    every = max(1, math.ceil(sum(map(len, sequences)) / tokens))
    return list(sequences[::every])


def check_vocabulary(sequences: Sequence[Sequence[int]], model: Any, file: Path) -> None:
    """Refuse tokens of a file that a model has no embedding for; one without a table of embeddings takes them all.

    Raises:
        ConfigError: when there is one.
    """
    largest = max((token for sequence in sequences for token in sequence), default=-1)
    size = _vocabulary_of(model)
    if size is not None and largest >= size:
        raise ConfigError(f"{file}: expected tokens below {size}, got {largest}. Use the tokenizer of this very model.")


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
        {"input_ids": [list(sequence) for sequence in sequences]},
        padding_side="right",
        return_tensors="pt",
        verbose=False,
    )
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def equal_lengths(sequences: Sequence[Sequence[int]], tokens: int = 4096) -> list[dict[str, Tensor]]:
    """Batches of sequences of equal length and a limited number of tokens: nothing is padded; shorter ones come first.

    Returns:
        input_ids and attention_mask, [B, T].
    """
    batches: list[list[Sequence[int]]] = []
    for sequence in sorted(sequences, key=len):
        last = batches[-1] if batches else None
        if last and len(last[0]) == len(sequence) and (len(last) + 1) * len(sequence) <= tokens:
            last.append(sequence)
        else:
            batches.append([sequence])
    tensors = [torch.tensor(batch) for batch in batches]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tensors]
