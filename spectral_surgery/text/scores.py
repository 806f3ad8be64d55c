"""Models on text: perplexity and KL of language models, embeddings and rank correlation of sentence encoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.models import SentenceEncoder
from spectral_surgery.live.running import called
from spectral_surgery.text.examples import documents, read_examples
from spectral_surgery.text.kl import kl
from spectral_surgery.text.sequences import cut_stream
from spectral_surgery.text.settings import EvalData
from spectral_surgery.text.tasks import spearman


def score(models: Sequence[Any], tokenizer: Any, data: EvalData, *, causal: bool) -> dict[str, float]:
    """Judge one or two models on text. Returns measures by name, those of the models ending in ``_a`` and ``_b``."""
    measures: dict[str, float] = {}
    if data.text is not None and causal:
        text = " ".join(example.texts[0] for example in read_examples(data.text))
        measures |= compare_logits(models, tokenizer, text, data.seq_length, data.samples)
    elif data.text is not None:
        lines = documents(data.text, causal=False)[: data.samples or None]
        measures |= _cosines(models, tokenizer, [line.texts[0] for line in lines])
    if data.sts is not None:
        measures |= _spearman(models, tokenizer, data)
    return measures


def compare_logits(
    models: Sequence[Any], tokenizer: Any, text: str, seq_length: int, samples: int = 0
) -> dict[str, float]:
    """Perplexity of language models on a text, cut into sequences, and how far a second one is from the first.

    Args:
        models: one or two, on one device.
        samples: sequences at most; 0 for all.

    Returns:
        ``perplexity_a``; of two models also ``perplexity_b``, ``kl`` (mean of KL(A || B) per token, nats) and
        ``same_top`` (part of the tokens where both rank the same one first).

    Raises:
        ConfigError: when the text is too short.
    """
    rows = torch.tensor(cut_stream(tokenizer, [text], seq_length)[: samples or None])
    if rows.numel() < 2:
        raise ConfigError("eval --text: expected two or more tokens, got fewer. Give more text.")
    sums = {"a": 0.0, "b": 0.0, "kl": 0.0, "top": 0.0}
    for row in rows:
        batch = row[None].to(next(models[0].parameters()).device)
        with torch.inference_mode():
            logs = [called(model, (batch,)).logits[0, :-1].float().log_softmax(-1) for model in models]
        for name, log in zip("ab", logs, strict=False):
            sums[name] -= float(log.gather(-1, batch[0, 1:, None]).sum())
        if len(logs) == 2:
            sums["kl"] += float(kl(*logs).sum())
            sums["top"] += float((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
    tokens = rows[:, 1:].numel()
    measures = {f"perplexity_{name}": math.exp(sums[name] / tokens) for name, _ in zip("ab", models, strict=False)}
    both = {"kl": sums["kl"] / tokens, "same_top": sums["top"] / tokens} if len(models) == 2 else {}
    return measures | both


def _cosines(models: Sequence[Any], tokenizer: Any, lines: list[str]) -> dict[str, float]:
    if len(models) < 2:
        raise ConfigError("eval --text: expected two sentence encoders to compare, got one.")
    first, second = (SentenceEncoder(model, tokenizer).embed(lines) for model in models)
    return {"cosine": float((first * second).sum(-1).mean())}


def _spearman(models: Sequence[Any], tokenizer: Any, data: EvalData) -> dict[str, float]:
    if data.sts is None:
        return {}
    pairs = read_examples(data.sts)[: data.samples or None]
    if any(len(pair.texts) != 2 or not isinstance(pair.label, float) for pair in pairs):
        raise ConfigError(f"{data.sts}: expected rows of two sentences and a score, got others.")
    scores = torch.tensor([float(pair.label or 0) for pair in pairs]).numpy()
    correlations = {}
    for name, model in zip(("spearman_a", "spearman_b"), models, strict=False):
        encoder = SentenceEncoder(model, tokenizer)
        sides = [encoder.embed([pair.texts[side] for pair in pairs]) for side in (0, 1)]
        correlations[name] = spearman((sides[0] * sides[1]).sum(-1).numpy(), scores)
    return correlations
