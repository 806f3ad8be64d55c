"""Models on text: perplexity and KL of language models, embeddings and rank correlation of sentence encoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_files import read_adapter
from spectral_surgery.files.peft.task import is_causal
from spectral_surgery.hf.models import SentenceEncoder, load_model
from spectral_surgery.live.attach import load
from spectral_surgery.live.running import called
from spectral_surgery.text.examples import documents, read_examples
from spectral_surgery.text.kl import kl
from spectral_surgery.text.sequences import cut_stream
from spectral_surgery.text.settings import EvalData
from spectral_surgery.text.tasks import spearman


class TextScores:
    """Holds model A in memory, and one other at a time beside it."""

    def __init__(self, a: Path, data: EvalData, device: str) -> None:
        """Load A."""
        self._data, self._device = data, device
        self._causal = data.text is not None and is_causal(read_index(a).config)
        self._model, self._tokenizer = self._load(a)

    def measures(self, other: Path | None = None, adapter: Path | None = None) -> dict[str, float]:
        """Measures of A, of another model, and of both, by name.

        Returns:
            perplexity_a, perplexity_b, kl, same_top; or cosine; spearman_a, spearman_b.
        """
        models = [self._model]
        if other is not None:
            model = self._load(other)[0]
            if adapter is not None:
                load(model, read_adapter(adapter))
            models.append(model.to(self._device))
        return score(models, self._tokenizer, self._data, causal=self._causal)

    def _load(self, folder: Path) -> tuple[Any, Any]:
        auto_class = "AutoModelForCausalLM" if self._causal else "AutoModel"
        trust = self._data.trust_remote_code
        model, tokenizer = load_model(folder, auto_class, dtype=torch.float32, trust_remote_code=trust)
        return model.to(self._device), tokenizer


def score(models: Sequence[Any], tokenizer: Any, data: EvalData, *, causal: bool) -> dict[str, float]:
    """Judge one or two models on text.

    Returns:
        Measures by name, those of the models ending in ``_a`` and ``_b``.
    """
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
