"""Language models from nothing: FFTNet, a Transformer of the same size as its control, and how well they predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from spectral_surgery.errors import ConfigError, required
from spectral_surgery.registry import Table
from spectral_surgery.text.tasks import Features
from spectral_surgery.training.settings import ModelSizes
from spectral_surgery.training.trainer import History, Job, make_trainer, run_trainer

_HEAD_WIDTH = 32  # of attention, where the width allows it


@dataclass(frozen=True)
class Start:
    """A row of STARTS: what a training can start from.

    ``build``: (sizes, settings of the vocabulary) -> a fresh model of transformers.
    """

    name: str
    build: Callable[[ModelSizes, dict[str, Any]], Any]


def vocabulary_of(tokenizer: Any) -> dict[str, Any]:
    """What a configuration says of the tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {"vocab_size": max(tokenizer.get_vocab().values()) + 1, **special}  # numbers may have gaps


def _fftnet(sizes: ModelSizes, vocabulary: dict[str, Any]) -> Any:
    from spectral_surgery.hf.fftnet.models import FFTNetConfig, FFTNetForCausalLM

    return FFTNetForCausalLM(FFTNetConfig(**vocabulary, **asdict(sizes)))


def _transformer(sizes: ModelSizes, vocabulary: dict[str, Any]) -> Any:
    """A Llama of the same width and depth, and an MLP that makes up for the rest of the parameters."""
    if sizes.d_model % 2:
        raise ConfigError(f"--d-model: expected an even number for a Transformer, got {sizes.d_model}.")
    with torch.device("meta"):
        wanted = _fftnet(sizes, vocabulary).num_parameters()
        least = _llama(sizes, vocabulary, 1).num_parameters()
    hidden = 1 + round((wanted - least) / (3 * sizes.d_model * sizes.num_layers))
    return _llama(sizes, vocabulary, max(1, hidden))


def _llama(sizes: ModelSizes, vocabulary: dict[str, Any], hidden: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = sizes.d_model // _HEAD_WIDTH if sizes.d_model % _HEAD_WIDTH == 0 else 1
    return LlamaForCausalLM(
        LlamaConfig(
            **vocabulary,
            hidden_size=sizes.d_model,
            intermediate_size=hidden,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=heads,
            max_position_embeddings=sizes.max_seq_length,
            attention_dropout=sizes.dropout,
            tie_word_embeddings=True,
        )
    )


STARTS: Table[Start] = Table("model to start from", [Start("fftnet", _fftnet), Start("transformer", _transformer)])


def train_whole(job: Job, *, resume: bool) -> History:
    """Train all of a model, which afterwards has the weights that did best on the held-out examples."""
    trainer = make_trainer(job, _plain_trainer)
    history, _ = run_trainer(job, trainer, "model.safetensors", resume=resume)
    return history


def _plain_trainer(job: Job) -> Any:  # noqa: ARG001 - as the others
    from transformers import Trainer

    class WholeTrainer(Trainer):  # type: ignore[misc]
        """A Trainer that knows that tied weights are stored once."""

        def _issue_warnings_after_load(self, load_result: Any) -> None:
            """Nothing: the checkpoint is one of the model."""

    return WholeTrainer


def require_transformers() -> None:
    """Say so early when models cannot be built; keep its bars, which are not ours, from stderr."""
    required("transformers.utils", "build models").logging.disable_progress_bar()


def prediction_scores(model: nn.Module, rows: Sequence[Features], batch_size: int) -> dict[str, float]:
    """How well a language model predicts.

    Returns ``loss`` in nats per token, ``perplexity``, ``accuracy`` of the likeliest token, and ``first_token_loss``,
    that of the second token of each row, of which a model that does not see the future knows one token only.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    losses, hits = [], 0
    for start in range(0, len(rows), batch_size):
        ids = torch.tensor([row["input_ids"] for row in rows[start : start + batch_size]], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].float()
        losses.append(nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu())
        hits += int((logits.argmax(-1) == ids[:, 1:]).sum())
    model.train(training)
    loss = torch.cat(losses)  # [N, T - 1]
    mean = float(loss.double().mean())
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "accuracy": hits / loss.numel(),
        "first_token_loss": float(loss[:, 0].double().mean()),
    }


def unigram(train: Sequence[Features], test: Sequence[Features], vocabulary: int) -> dict[str, float]:
    """How well the mere frequencies of tokens predict; every model has to do better.

    Returns ``loss``, ``perplexity`` and ``accuracy``, as of `prediction_scores`.
    """
    counts = torch.ones(vocabulary, dtype=torch.float64)  # one of each, so that none is impossible
    for row in train:
        counts += torch.bincount(torch.tensor(row["input_ids"]), minlength=vocabulary)
    targets = torch.tensor([row["input_ids"][1:] for row in test])
    mean = float(-(counts / counts.sum()).log()[targets].mean())
    hit = float((targets == counts.argmax()).double().mean())
    return {"loss": mean, "perplexity": math.exp(mean), "accuracy": hit}
