"""Training mixers to do what the attention they replace does.

First layer by layer: each sees the inputs that the attention has in the original model, and is to give its outputs.
Then, where asked, together: the swapped model is to end where the original does. Only the mixers and their projections
are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.commands.settings import FitSettings
from spectral_surgery.errors import ConfigError
from spectral_surgery.inputs.training import inputs_of_step
from spectral_surgery.live.blocks import Batch
from spectral_surgery.live.families import AttentionSite, sites_at
from spectral_surgery.live.hooks import hooked
from spectral_surgery.live.running import called
from spectral_surgery.live.swapped import SwappedAttention, real_tokens
from spectral_surgery.text.kl import kl
from spectral_surgery.training.loop import Training, train, trained
from spectral_surgery.training.settings import DistillSettings

_WARM_UP = 0.05  # of the steps


class _Enough(Exception):  # noqa: N818 - no error: it stops a forward pass behind the last layer of interest
    pass


@dataclass(frozen=True)
class LayerFit:
    """How far a new layer is from the attention it replaces: relative error of outputs, on held-out text."""

    layer: int
    before: float
    after: float


@dataclass(frozen=True)
class SwappedPair:
    """A model before and after.

    Attributes:
        teacher: the original, in eval mode.
        student: the swapped one, in eval mode; it may share all other parameters.
        swapped: the new layers of the student by number.
    """

    teacher: nn.Module
    student: nn.Module
    swapped: Mapping[int, SwappedAttention]

    @contextmanager
    def only_new_trained(self) -> Iterator[dict[str, nn.Parameter]]:
        """Freeze all but the new layers while the block lasts; yields the parameters of these."""
        others = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        try:
            for parameter in others:
                parameter.requires_grad_(False)
            for layer in self.swapped.values():
                layer.requires_grad_(True)
            yield trained(self.student)
        finally:
            for parameter in others:
                parameter.requires_grad_(True)


def distill(
    pair: SwappedPair,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: FitSettings,
    progress: Callable[[int, int, str], None],
) -> list[LayerFit]:
    """Train the new layers; returns how well each fits.

    Raises ConfigError when there is nothing to train on or to judge on.
    """
    if not batches or not held_out:
        raise ConfigError(
            f"distill: expected batches to train on and to hold out, got {len(batches)} and {len(held_out)}. Give more"
            " text."
        )
    places = sites_at(pair.teacher, tuple(pair.swapped))
    both = settings.steps + settings.end_to_end_steps

    def alone(batch: Batch) -> Tensor:
        return torch.stack(list(_layer_losses(pair, places, batch).values())).mean()

    def stage(loss: Callable[[Batch], Tensor], steps: int, rate: float, seed: int, before: int) -> None:
        def batch(step: int, process: int) -> Batch:
            return batches[inputs_of_step(seed, step, process, [1] * len(batches), 1)[0]]

        if steps:
            warm_up = max(1, round(_WARM_UP * steps))
            how = DistillSettings(steps, 0.0, rate, warm_up, eval_every=steps, bf16=False, seed=seed)
            work = Training(parameters, loss, batch)
            train(work, how, lambda done, _, what: progress(before + done, both, what))

    with pair.only_new_trained() as parameters:
        before = _layer_errors(pair, places, held_out)
        stage(alone, settings.steps, settings.learning_rate, settings.seed, 0)
        after = _layer_errors(pair, places, held_out)
        rate, seed = settings.end_to_end_learning_rate, settings.seed + 1
        stage(partial(_apart, pair), settings.end_to_end_steps, rate, seed, settings.steps)
    return [LayerFit(number, before[number], after[number]) for number in pair.swapped]


def relative(y: Tensor, wanted: Tensor) -> Tensor:
    """Squared error as a part of the energy of what is wanted."""
    return (y.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(1e-12)


def _layer_errors(pair: SwappedPair, places: Mapping[int, AttentionSite], batches: Sequence[Batch]) -> dict[int, float]:
    with torch.no_grad():
        rows = [_layer_losses(pair, places, batch) for batch in batches]
    return {number: math.sqrt(sum(float(row[number]) for row in rows) / len(rows)) for number in places}


def _layer_losses(pair: SwappedPair, places: Mapping[int, AttentionSite], batch: Batch) -> dict[int, Tensor]:
    """Squared relative error of each new layer on the inputs that the teacher has for it."""
    with _seen(places) as seen, torch.no_grad(), suppress(_Enough):
        _run(pair.teacher, batch)
    losses = {}
    for number, (x, mask, wanted) in seen.items():
        real = real_tokens(mask, x)
        y = pair.swapped[number].projected(x, real)
        losses[number] = relative(y, wanted) if real is None else relative(y[real], wanted[real])
    return losses


@contextmanager
def _seen(places: Mapping[int, AttentionSite]) -> Iterator[dict[int, tuple[Tensor, Any, Tensor]]]:
    """Inputs, masks and outputs of attentions, by layer, filled as the model runs."""
    seen: dict[int, tuple[Tensor, Any, Tensor]] = {}
    inputs: dict[int, tuple[Tensor, Any]] = {}

    def enter(number: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs[number] = (args[0] if args else named["hidden_states"], named.get("attention_mask"))

    def leave(number: int, _: tuple[Any, ...], y: Tensor) -> None:
        seen[number] = (*inputs.pop(number), y)
        if number == max(places):
            raise _Enough

    attentions = {number: site.attention for number, site in places.items()}
    outputs = {number: site.output for number, site in places.items()}
    with hooked(attentions, enter, before=True), hooked(outputs, leave):
        yield seen


def _run(model: nn.Module, batch: Batch) -> Tensor:
    """Hidden states behind the last block."""
    base = cast(Any, model).base_model
    return cast(Tensor, called(base, named={**batch, "use_cache": False}).last_hidden_state)


def _apart(pair: SwappedPair, batch: Batch) -> Tensor:
    """How far two models end from each other: KL of the next tokens in nats, or relative squared error of states."""
    teacher, student = cast(Any, pair.teacher), cast(Any, pair.student)
    if teacher.get_output_embeddings() is None:
        with torch.no_grad():
            wanted = _run(teacher, batch)
        return relative(_run(student, batch), wanted)
    with torch.no_grad():
        wanted = called(teacher, named={**batch, "use_cache": False}).logits
    return kl(wanted, called(student, named={**batch, "use_cache": False}).logits).mean()
