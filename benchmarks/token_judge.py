"""Language models judged on the same tokens: perplexity, and KL from the dense model, each with its standard error."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Row, require
from spectral_surgery import EvalData
from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.models import load_model
from spectral_surgery.text.examples import read_examples
from spectral_surgery.text.kl import kl
from spectral_surgery.text.sequences import cut_stream

Logits = Callable[[Tensor], Tensor]  # token ids [B, T] to logits [B, T, V]
CLASS = "AutoModelForCausalLM"
_BATCH = 4  # sequences at a time


@dataclass(frozen=True)
class Judged:
    """What a model does with the tokens.

    Attributes:
        perplexity: of all tokens.
        perplexity_error: standard error of its distance to the dense model's, by sequence.
        kl: mean of KL(dense || model), nats a token.
        kl_error: its standard error, by sequence.
    """

    perplexity: float
    perplexity_error: float
    kl: float
    kl_error: float


class TokenJudge:
    """Holds what a dense model says of a text on disk, so that each other model is run once, alone in memory."""

    def __init__(self, dense: Path, text: EvalData, scratch: Path) -> None:
        """Run the dense model.

        Args:
            dense: folder of it.
            text: with a file; cut into sequences of equal length.
            scratch: folder for a nameless file of 4 V bytes a token.

        Raises:
            ConfigError: when there is no text, or it has fewer than two sequences.
        """
        model, tokenizer = load_model(dense, CLASS, dtype=torch.float32)
        whole = " ".join(example.texts[0] for example in read_examples(text.text)) if text.text else ""
        self.ids = torch.tensor(cut_stream(tokenizer, [whole], text.seq_length)[: text.samples or None])
        if len(self.ids) < 2:
            raise ConfigError(
                f"--text: expected two or more sequences of {text.seq_length} tokens, got fewer. Give more."
            )
        self.weights = sum(parameter.numel() for parameter in model.parameters())
        with tempfile.TemporaryFile(dir=scratch) as file:
            shape = (len(self.ids), self.ids.shape[1] - 1, model.config.vocab_size)
            self._logs = np.memmap(file, np.float32, "w+", shape=shape)
        losses = []
        for start, ids in self._batches():
            logs = _logs(causal_logits(model), ids)
            self._logs[start : start + len(ids)] = logs.numpy()
            losses.append(_losses(logs, ids))
        self._losses = torch.cat(losses)

    @property
    def perplexity(self) -> float:
        """Of the dense model."""
        return math.exp(float(self._losses.mean()))

    def judge(self, logits: Logits) -> Judged:
        """Run another model on the tokens.

        Raises:
            CheckFailedError: when a logit is no number.
        """
        losses, apart = [], []
        for start, ids in self._batches():
            logs = _logs(logits, ids)
            losses.append(_losses(logs, ids))
            apart.append(kl(torch.from_numpy(self._logs[start : start + len(ids)]), logs).mean(-1))
        lost, far = torch.cat(losses), torch.cat(apart)
        require(bool(lost.isfinite().all() and (far >= -1e-6).all()), f"losses {lost}, KL {far}")
        perplexity = math.exp(float(lost.mean()))
        return Judged(perplexity, perplexity * _error(lost - self._losses), float(far.mean()), _error(far))

    def _batches(self) -> list[tuple[int, Tensor]]:
        return [(start, self.ids[start : start + _BATCH]) for start in range(0, len(self.ids), _BATCH)]


def judged_columns(judged: Judged | None) -> Row:
    """Columns of a table; empty ones of the dense model."""
    values = (judged.perplexity, judged.perplexity_error, judged.kl, judged.kl_error) if judged else ("",) * 4
    return dict(zip(("perplexity", "perplexity +-", "kl", "kl +-"), values, strict=True))


def causal_logits(model: object) -> Logits:
    """Logits of a model of transformers."""
    return lambda ids: model(ids).logits  # type: ignore[operator]


def _logs(logits: Logits, ids: Tensor) -> Tensor:
    """Log-probabilities of every token but the first: [B, T - 1, V] float32."""
    with torch.inference_mode():
        return logits(ids)[:, :-1].float().log_softmax(-1)


def _losses(logs: Tensor, ids: Tensor) -> Tensor:
    """Mean loss of each sequence, in nats: [B] float64."""
    return -logs.gather(-1, ids[:, 1:, None])[..., 0].double().mean(-1)


def _error(values: Tensor) -> float:
    """Standard error of a mean."""
    return float(values.double().std() / len(values) ** 0.5)
