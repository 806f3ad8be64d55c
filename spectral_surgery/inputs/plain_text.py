"""Text, for models that read it: of a language model one stream, of any other every line by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectral_surgery.inputs.kind import Kind, Reading
from spectral_surgery.inputs.model_input import ModelInput
from spectral_surgery.text.examples import Example, documents
from spectral_surgery.text.sequences import check_vocabulary, token_sequences


def token_inputs(sequences: Sequence[Sequence[int]], padding: int = 0) -> list[ModelInput]:
    """Token ids as what a model is run on: input_ids and attention_mask, [T]."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return [ModelInput.of({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, padding) for ids in tensors]


def _documents(reading: Reading) -> list[Example]:
    return documents(reading.data.file, causal=reading.causal)


def _inputs(reading: Reading, items: Sequence[Example], samples: int) -> list[ModelInput]:
    tokenizer, causal = reading.tokenizer, reading.causal
    sequences = token_sequences(tokenizer, items, length=reading.longest, samples=samples, causal=causal)
    check_vocabulary(sequences, reading.model, reading.data.file)
    return token_inputs([sequence for sequence in sequences if sequence], tokenizer.pad_token_id or 0)


TEXT = Kind(
    "text",
    "text",
    512,
    "sequences",
    "no token is found by the tokenizer of",
    "AutoModel",
    by_objective=True,
    given=frozenset({"input_ids"}),
    is_for=lambda file, _: not file.is_dir(),
    items=_documents,
    inputs=_inputs,
)
