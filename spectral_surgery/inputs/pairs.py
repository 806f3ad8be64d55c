"""Pairs of a source and a target, for models with an encoder and a decoder of text.

Of a text without pairs, every line is both: what the encoder reads, and what the decoder writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.files.peft.task import needs_decoder_input
from spectral_surgery.inputs.kind import Kind, Reading
from spectral_surgery.inputs.model_input import ModelInput
from spectral_surgery.text.examples import Example, read_examples
from spectral_surgery.text.sequences import check_vocabulary


def decoder_tensors(target: Sequence[int], config: Any) -> dict[str, torch.Tensor]:
    """What a decoder reads to write a target: the target one token later, behind the token that starts it.

    Args:
        target: token ids, at least one.
        config: of the model.
    """
    starts = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
    start = next((token for token in starts if token is not None), target[-1])  # some begin with what ended before
    ids = torch.tensor([start, *target[:-1]])
    return {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}


def _pairs(reading: Reading) -> list[Example]:
    file = reading.data.file
    if file.suffix in (".csv", ".json", ".jsonl"):
        examples = read_examples(file, _text_fields(file) if file.suffix != ".csv" else ())
        sides = [[*example.texts, *([] if example.label is None else [str(example.label)])] for example in examples]
        return [Example((side[0], side[min(1, len(side) - 1)])) for side in sides]
    lines = [line for example in read_examples(file) for line in example.texts[0].splitlines() if line.strip()]
    if not any("\t" in line for line in lines):
        return [Example((line, line)) for line in lines]
    for number, line in enumerate(lines, 1):
        if line.count("\t") != 1:
            raise ConfigError(
                f"{file}: text {number}: expected a source, one tab and a target, as in others, got"
                f" {line.count(chr(9))} tabs."
            )
    return [Example(tuple(line.split("\t"))) for line in lines]


def _text_fields(file: Path) -> list[str]:
    """The first two fields of the first object that hold text."""
    try:
        row = json.loads(file.read_text(encoding="utf-8").partition("\n")[0])
    except (OSError, ValueError):
        return []  # whoever reads all of it says what is wrong
    fields = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
    return fields[:2]


def _inputs(reading: Reading, items: Sequence[Example], samples: int) -> list[ModelInput]:
    tokenizer, config, length = reading.tokenizer, reading.model.config, reading.longest
    sources, targets = (
        _tokens(tokenizer, [pair.texts[side] for pair in items[: samples or None]], name, length)
        for side, name in enumerate(("text", "text_target"))
    )
    check_vocabulary(sources, reading.model, reading.data.file)
    inputs = []
    for source, target in zip(sources, targets, strict=True):
        if source and target:
            ids = torch.tensor(source)
            read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            inputs.append(ModelInput.of(read | decoder_tensors(target, config), tokenizer.pad_token_id or 0, target))
    return inputs


def _tokens(tokenizer: Any, texts: Sequence[str], name: str, length: int) -> list[list[int]]:
    if not texts:
        return []
    return list(tokenizer(**{name: list(texts)}, truncation=True, max_length=length)["input_ids"])


PAIRS = Kind(
    "pairs",
    "pairs of a source and a target",
    512,
    "pairs",
    "no token on one side is found by the tokenizer of",
    "AutoModel",
    by_objective=False,
    given=frozenset({"input_ids"}),
    is_for=lambda file, config: not file.is_dir() and needs_decoder_input(config),
    items=_pairs,
    inputs=_inputs,
)
