"""What a model is trained for: how it is loaded, how text becomes batches, what the loss and the measure are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError
from spectral_surgery.registry import Table
from spectral_surgery.text.sequences import cut_stream

Features = dict[str, list[int]]
Arrays = npt.NDArray[np.floating[Any]]
Texts = Sequence[tuple[str, ...]]

_IGNORED = -100  # label that the loss of transformers skips
_COSINE_SCALE = 20.0  # of CoSENT


@dataclass(frozen=True)
class Task:
    """A row of TASKS.

    Attributes:
        encode: (tokenizer, texts, tokens of an example) -> features of each example, without labels.
        collate: (tokenizer, features with "labels" where there are any) -> a batch.
        loss: (model, batch) -> (loss, predictions); None for the loss of the model itself.
        measures: (predictions, labels) -> measures of the held-out examples, beside the loss.
        best: the measure that decides which model is kept.
    """

    name: str
    auto_class: str
    task_type: str
    encode: Callable[[Any, Texts, int], list[Features]]
    collate: Callable[[Any, Sequence[Mapping[str, Any]]], dict[str, Tensor]]
    measures: Callable[[Arrays, Arrays], dict[str, float]]
    best: str
    larger_is_better: bool
    labelled: bool = True
    loss: Callable[[Any, dict[str, Tensor]], tuple[Tensor, Tensor]] | None = None


def _blocks(tokenizer: Any, texts: Texts, length: int) -> list[Features]:
    sequences = cut_stream(tokenizer, [text[0] for text in texts], length, ended=True)
    if not sequences or len(sequences[0]) < 2:
        raise ConfigError("data: expected two or more tokens, got fewer. Give more text.")
    return [{"input_ids": sequence} for sequence in sequences]


def _stack(tokenizer: Any, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:  # noqa: ARG001 - as the others
    ids = torch.tensor([feature["input_ids"] for feature in features])
    return {"input_ids": ids, "labels": ids.clone()}


def _one_text(tokenizer: Any, texts: Texts, length: int) -> list[Features]:
    first = [text[0] for text in texts]
    second = [text[1] for text in texts] if len(texts[0]) > 1 else None
    batch = tokenizer(first, second, truncation=True, max_length=length)
    return [{key: batch[key][i] for key in batch} for i in range(len(texts))]


def _two_texts(tokenizer: Any, texts: Texts, length: int) -> list[Features]:
    if len(texts[0]) != 2:
        raise ConfigError(f"similarity: expected two text columns and a score, got {len(texts[0])} text column.")
    sides = [tokenizer([text[side] for text in texts], truncation=True, max_length=length) for side in (0, 1)]
    return [{f"{key}_{n}": side[key][i] for n, side in enumerate(sides) for key in side} for i in range(len(texts))]


def _pad(tokenizer: Any, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    rows = [{key: value for key, value in feature.items() if key != "labels"} for feature in features]
    batch = dict(tokenizer.pad(rows, return_tensors="pt"))
    return batch | {"labels": torch.tensor([feature["labels"] for feature in features])}


def _pad_pairs(tokenizer: Any, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """First texts above second texts: [2 B, T]."""
    rows = [
        {key.removesuffix(f"_{side}"): value for key, value in feature.items() if key.endswith(f"_{side}")}
        for side in (0, 1)
        for feature in features
    ]
    batch = dict(tokenizer.pad(rows, return_tensors="pt"))
    return batch | {"labels": torch.tensor([feature["labels"] for feature in features])}


def _cosent(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines of mean-pooled pairs, and a loss for every two pairs in the wrong order.

    Source: CoSENT, https://kexue.fm/archives/8847.
    """
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model(**inputs).last_hidden_state.float()  # [2 B, T, D]
    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    first, second = pooled.chunk(2)
    cosines = (first * second).sum(-1)  # [B]
    gaps = _COSINE_SCALE * (cosines[:, None] - cosines[None, :])  # pair i above pair j
    wrong = gaps[labels[:, None] < labels[None, :]]
    loss = torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0)
    return loss, cosines


def spearman(a: Arrays, b: Arrays) -> float:
    """Rank correlation, ties given their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def pearson(a: Arrays, b: Arrays) -> float:
    """Correlation; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


def _ranks(values: Arrays) -> Arrays:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Arrays = (last - (counts - 1) / 2)[inverse]
    return ranks


def _correlations(predictions: Arrays, labels: Arrays) -> dict[str, float]:
    flat = predictions.reshape(-1).astype(np.float64)
    return {"spearman": spearman(flat, labels.astype(np.float64)), "pearson": pearson(flat, labels.astype(np.float64))}


def _accuracy(predictions: Arrays, labels: Arrays) -> dict[str, float]:
    return {"accuracy": float((predictions.argmax(-1) == labels).mean())}


def _nothing(predictions: Arrays, labels: Arrays) -> dict[str, float]:  # noqa: ARG001 - as the others
    return {}


TASKS: Table[Task] = Table(
    "task",
    [
        Task(
            "causal-lm", "AutoModelForCausalLM", "CAUSAL_LM", _blocks, _stack, _nothing, "loss", False, labelled=False
        ),
        Task(
            "classification",
            "AutoModelForSequenceClassification",
            "SEQ_CLS",
            _one_text,
            _pad,
            _accuracy,
            "accuracy",
            True,
        ),
        Task(
            "regression",
            "AutoModelForSequenceClassification",
            "SEQ_CLS",
            _one_text,
            _pad,
            _correlations,
            "spearman",
            True,
        ),
        Task(
            "similarity",
            "AutoModel",
            "FEATURE_EXTRACTION",
            _two_texts,
            _pad_pairs,
            _correlations,
            "spearman",
            True,
            loss=_cosent,
        ),
    ],
)
