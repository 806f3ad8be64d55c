"""What a student is asked to take over from its teacher, for each kind of model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectral_surgery.errors import ConfigError
from spectral_surgery.files.peft.task import architecture_of, task_of
from spectral_surgery.live.running import called
from spectral_surgery.live.stacks import entry_of
from spectral_surgery.registry import Table
from spectral_surgery.text.kl import kl
from spectral_surgery.text.settings import Keep

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """A row of OBJECTIVES.

    Attributes:
        auto_class: that loads a model that reads text.
        run: (model, batch) to its outputs; an image alone is given to the part of the model that sees.
        loss: (outputs of the student, of the teacher, batch) to a scalar.
        project: (outputs of the teacher, batch, generator) to a random scalar; the mean square of its gradient is the
            curvature of the loss where the student is the teacher, up to a factor.
        keep: which coefficients healing starts with, the best on the models at hand: those that calibration chooses,
            the ``important`` or the ``largest``.
        batch_size: usual sequences of a step.
        seq_length: usual tokens of a sequence at most.
    """

    name: str
    summary: str
    auto_class: str
    run: Callable[[nn.Module, Batch], Any]
    loss: Callable[[Any, Any, Batch], Tensor]
    project: Callable[[Any, Batch, torch.Generator], Tensor]
    keep: Keep
    batch_size: int
    seq_length: int


_OF_TASK = {"CAUSAL_LM": "tokens", "SEQ_2_SEQ_LM": "tokens", "SEQ_CLS": "classes"}
_OF_ENDS = {"ForImageClassification": "classes", "ForCTC": "tokens"}


def objective_of(config: Mapping[str, object]) -> Objective:
    """The row for a model; embeddings for a model without a task."""
    ends = (name for end, name in _OF_ENDS.items() if architecture_of(config).endswith(end))
    return OBJECTIVES[_OF_TASK.get(task_of(config) or "", next(ends, "embeddings"))]


def _plain(model: nn.Module, batch: Batch) -> Any:
    return called(model, named={**batch, "use_cache": False})


def _with_hidden(model: nn.Module, batch: Batch) -> Any:
    outputs = called(entry_of(model, batch)[1], named={**batch, "output_hidden_states": True})
    if not _states(outputs):  # None, or none of the layers that are recorded
        raise ConfigError(
            f"heal: expected a model that returns hidden states when it is asked for them, got {type(model).__name__}."
        )
    return outputs


def _tokens(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """KL(teacher || student), nats per token."""
    mask = mask_of(batch, teacher.logits)
    return (kl(teacher.logits, student.logits) * mask).sum() / mask.sum()


def _embeddings(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """1 - cosine of mean-pooled embeddings + mean relative squared error of the hidden states of all layers."""
    hidden = _hidden(student, teacher, batch)
    first, second = (pooled(_states(outputs)[-1], batch) for outputs in (student, teacher))
    return (1 - functional.cosine_similarity(first, second)).mean() + hidden


def _classes(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """KL of the classes (squared error of a single score) + mean relative squared error of the hidden states."""
    if teacher.logits.shape[-1] == 1:
        loss = functional.mse_loss(student.logits, teacher.logits)
    else:
        loss = kl(teacher.logits, student.logits).mean()
    return loss + _hidden(student, teacher, batch)


def _hidden(student: Any, teacher: Any, batch: Batch) -> Tensor:
    states = list(zip(_states(student), _states(teacher), strict=True))
    for state, wanted in states:
        if state.shape != wanted.shape:
            raise ConfigError(
                f"heal: expected hidden states of {tuple(wanted.shape)} as those of the original, got"
                f" {tuple(state.shape)}. The model itself decides how many there are, so that it cannot be healed."
            )
    pooler = getattr(teacher, "pooler_output", None)
    errors = [
        _masked(state - wanted, batch).square().sum() / _masked(wanted, batch).square().sum()
        for state, wanted in states
    ]
    if pooler is not None:
        errors.append((student.pooler_output - pooler).square().sum() / pooler.square().sum())
    return torch.stack(errors).mean()


def _project_tokens(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Log-likelihood of tokens drawn from the model itself: the curvature of KL is the Fisher information."""
    mask = mask_of(batch, outputs.logits)
    return (_drawn(outputs.logits, generator) * mask).sum() / mask.sum().sqrt()


def _project_embeddings(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    vectors = functional.normalize(pooled(_states(outputs)[-1], batch), dim=-1)
    return _noise(vectors, generator) / math.sqrt(2 * len(vectors)) + _project_hidden(outputs, batch, generator)


def _project_classes(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    logits = outputs.logits
    scalar = _noise(logits, generator) if logits.shape[-1] == 1 else _drawn(logits, generator).sum() / math.sqrt(2)
    return scalar / math.sqrt(len(logits)) + _project_hidden(outputs, batch, generator)


def _project_hidden(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    states = [_masked(state, batch) for state in _states(outputs)]
    if getattr(outputs, "pooler_output", None) is not None:
        states.append(outputs.pooler_output)
    return torch.stack([_noise(state, generator) / state.detach().norm() for state in states]).sum() / math.sqrt(
        len(states)
    )


def _states(outputs: Any) -> list[Tensor]:
    """Hidden states of all layers, [B, T, D] or [B, D, H, W]; those of an encoder before those of its decoder."""
    names = ("vision_hidden_states", "encoder_hidden_states", "decoder_hidden_states", "hidden_states")
    return [state for name in names for state in getattr(outputs, name, None) or ()]


def mask_of(batch: Batch, states: Tensor) -> Tensor:
    """[B, T] of what is no padding; some models go on with fewer states than tokens, which no mask belongs to."""
    masks = (batch.get(name) for name in ("decoder_attention_mask", "attention_mask"))
    fitting = (mask for mask in masks if mask is not None and mask.shape == states.shape[:2])
    return next(fitting, states.new_ones(states.shape[:2]))


def _masked(states: Tensor, batch: Batch) -> Tensor:
    """Without padding."""
    return states * mask_of(batch, states)[..., None] if states.ndim == 3 else states


def pooled(states: Tensor, batch: Batch) -> Tensor:
    """[B, D]: the mean over tokens, or over the places of a map of features."""
    if states.ndim != 3:
        return states.flatten(2).mean(-1)
    mask = mask_of(batch, states)[..., None]
    return (states * mask).sum(1) / mask.sum(1)


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return (x * torch.randn(x.shape, generator=generator).to(x.device)).sum()


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """[..., V] to the log-probability, [...], of one of them each, drawn at random."""
    logs = logits.float().log_softmax(-1)
    flat = logs.detach().exp().reshape(-1, logs.shape[-1]).cpu()
    picked = torch.multinomial(flat, 1, generator=generator).to(logs.device)
    return logs.gather(-1, picked.reshape(*logs.shape[:-1], 1))[..., 0]


OBJECTIVES: Table[Objective] = Table(
    "objective",
    (
        Objective(
            "tokens",
            "distributions of the next token",
            "AutoModelForCausalLM",
            _plain,
            _tokens,
            _project_tokens,
            "calibrated",
            4,
            256,
        ),
        Objective(
            "classes",
            "distributions of the class, and hidden states",
            "AutoModelForSequenceClassification",
            _with_hidden,
            _classes,
            _project_classes,
            "important",
            24,
            128,
        ),
        Objective(
            "embeddings",
            "sentence embeddings, and hidden states",
            "AutoModel",
            _with_hidden,
            _embeddings,
            _project_embeddings,
            "important",
            24,
            128,
        ),
    ),
)
