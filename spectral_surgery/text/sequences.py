"""Token sequences of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spectral_surgery.errors import ConfigError
from spectral_surgery.live.heads import word_table
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


def check_vocabulary(sequences: Sequence[Sequence[int]], model: Any, file: Path) -> None:
    """Refuse tokens of a file that a model has no embedding for; one without a table of embeddings takes them all.

    Raises ConfigError when there is one.
    """
    largest = max((token for sequence in sequences for token in sequence), default=-1)
    size = _vocabulary_of(model)
    if size is not None and largest >= size:
        raise ConfigError(f"{file}: expected tokens below {size}, got {largest}. Use the tokenizer of this very model.")


def _vocabulary_of(model: Any) -> int | None:
    """Rows of the table of token embeddings; None where there is none."""
    words = word_table(model)
    table = getattr(words, "weight", None)
    if isinstance(table, Tensor) and table.ndim == 2:
        return len(table)
    return getattr(words, "num_embeddings", None)
