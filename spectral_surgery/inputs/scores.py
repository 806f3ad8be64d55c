"""Models on what is no plain text: how far apart their answers are, and how good where it is known what is right."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectral_surgery.errors import ConfigError
from spectral_surgery.inputs.model_input import NOT_JUDGED, Batch, ModelInput, equal_shapes
from spectral_surgery.live.blocks import hidden_of
from spectral_surgery.live.running import called, running
from spectral_surgery.live.stacks import entry_of
from spectral_surgery.text.kl import kl
from spectral_surgery.text.objectives import mask_of, pooled
from spectral_surgery.text.word_errors import word_edits, words_of

_LOG = logging.getLogger("spectral_surgery")


@dataclass
class _Sums:
    """Sums of measures by name, and of what they are means over."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        mask = torch.ones_like(values) if mask is None else mask
        self.sums[name] += float((values * mask).sum())
        self.counts[name] += float(mask.sum())

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


def compare(
    models: Sequence[Any],
    inputs: Sequence[ModelInput],
    objective: str,
    *,
    tokenizer: Callable[[], Any],
    device: str = "cpu",
) -> dict[str, float]:
    """Judge one or two models, the class of each being that of config.json.

    Args:
        inputs: at least one.
        objective: row of OBJECTIVES that says what the models give: tokens, classes or embeddings.
        tokenizer: loads that of models that write, to read what they wrote.

    Returns:
        Measures by name, those of the models ending in ``_a`` and ``_b``: of tokens ``loss`` (nats a token, of those
        that are right), ``wer`` (word errors over words, of sounds with a text), ``kl`` and ``same_top``; of classes
        ``accuracy``, ``kl`` and ``same_top``; of embeddings ``cosine``.

    Raises:
        ConfigError: when there is nothing to compare, or a label is not a class of the models.
    """
    batches, sums = equal_shapes(inputs, device=device), _Sums()
    classes = _classes(models[0], inputs) if objective == "classes" else None
    for group, batch in zip(batches.groups, batches, strict=True):
        with torch.inference_mode():
            outputs = [called(entry_of(model, batch)[1], named=batch) for model in models]
        if objective == "embeddings":
            _add_cosines(sums, outputs, batch)
            continue
        _add_distances(sums, outputs, batch)
        for name, model, output in zip("ab", models, outputs, strict=False):
            if classes is not None:
                _add_accuracy(sums, name, output.logits, [classes.get(one.answer) for one in group])
                continue
            _add_loss(sums, name, output.logits, group)
            if any(one.answer for one in group):
                written = _written(model, output.logits, batch, group, tokenizer())
                _add_word_errors(sums, name, written, group)
    if not sums.sums:
        raise ConfigError("eval --text: expected two models to compare, or data that says what is right, got neither.")
    return sums.means()


def _add_cosines(sums: _Sums, outputs: Sequence[Any], batch: Batch) -> None:
    if len(outputs) == 2:
        first, second = (pooled(hidden_of(output).float(), batch) for output in outputs)
        sums.add("cosine", functional.cosine_similarity(first, second))


def _add_distances(sums: _Sums, outputs: Sequence[Any], batch: Batch) -> None:
    if len(outputs) == 2:
        first, second = (output.logits for output in outputs)
        mask = mask_of(batch, first) if first.ndim == 3 else None
        sums.add("kl", kl(first, second), mask)
        sums.add("same_top", (first.argmax(-1) == second.argmax(-1)).float(), mask)


def _add_loss(sums: _Sums, name: str, logits: Tensor, group: Sequence[ModelInput]) -> None:
    for row, one in zip(logits, group, strict=True):
        if one.labels:
            labels = torch.tensor(one.labels, device=row.device)
            losses = functional.cross_entropy(row.float(), labels, ignore_index=NOT_JUDGED, reduction="none")
            sums.add(f"loss_{name}", losses, (labels != NOT_JUDGED).float())


def _add_accuracy(sums: _Sums, name: str, logits: Tensor, right: Sequence[int | None]) -> None:
    for row, label in zip(logits, right, strict=True):
        if label is not None:
            sums.add(f"accuracy_{name}", (row.argmax(-1, keepdim=True) == label).float())


def _add_word_errors(sums: _Sums, name: str, written: Sequence[str], group: Sequence[ModelInput]) -> None:
    for text, one in zip(written, group, strict=True):
        if wanted := words_of(one.answer):
            sums.sums[f"wer_{name}"] += word_edits(wanted, words_of(text))
            sums.counts[f"wer_{name}"] += len(wanted)


def _written(model: Any, logits: Tensor, batch: Batch, group: Sequence[ModelInput], tokenizer: Any) -> list[str]:
    """What a model writes for a batch: its decoder word by word, without one the likeliest token of each place."""
    if not any(name.startswith("decoder_") for name in batch):
        return list(tokenizer.batch_decode(logits.argmax(-1), skip_special_tokens=True))
    heard = {name: tensor for name, tensor in batch.items() if not name.startswith("decoder_")}
    longest = 2 * max(len(one.labels) for one in group) + 16  # a model that repeats itself would not end
    room = getattr(model.config, "max_target_positions", 2 * longest) // 2
    with torch.inference_mode(), running(model, heard):
        ids = model.generate(**heard, max_new_tokens=min(longest, room), max_length=None)
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))


def _classes(model: Any, inputs: Sequence[ModelInput]) -> Mapping[str, int]:
    """The class of every answer that there is, by its name in config.json or its number."""
    named: dict[str, int] = {str(name): int(number) for name, number in (model.config.label2id or {}).items()}
    numbers = {str(number): number for number in named.values()}
    answers = sorted({one.answer for one in inputs if one.answer})
    classes = {answer: found for answer in answers if (found := named.get(answer, numbers.get(answer))) is not None}
    unknown = [answer for answer in answers if answer not in classes]
    if classes and unknown:
        raise ConfigError(
            f"eval --text: expected labels that are classes of the model, such as {next(iter(named))}, got"
            f" {unknown[0]}. Name it as config.json does in label2id, or by its number."
        )
    if unknown:
        _LOG.warning("%s: not a class in config.json, nor is any other label; accuracy is left out.", unknown[0])
    return classes
