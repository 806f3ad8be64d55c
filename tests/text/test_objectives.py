"""Projections have the curvature of the loss that they stand for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError
from spectral_surgery.text.objectives import OBJECTIVES

TOKENS, WIDTH, PARAMETERS, DRAWS = 5, 4, 3, 6000


def outputs(x: Tensor, maps: Tensor, base: Tensor, *, classes: int) -> Any:
    """Of a model with three parameters: [2, T, D] states and logits that are linear in them."""
    states = [(base[i] + maps[i] @ x).reshape(2, TOKENS, WIDTH) for i in range(3)]
    logits = states[2] if classes == 0 else states[2][:, 0, :classes]
    return SimpleNamespace(hidden_states=states[:2], logits=logits, pooler_output=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes", "factor"),
    [("tokens", 0, 1.0), ("embeddings", 0, 0.5), ("classes", 3, 0.5), ("classes", 1, 0.5)],
)
def test_the_mean_square_of_gradients_is_the_curvature(name: str, classes: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2 * TOKENS * WIDTH, PARAMETERS, generator=generator) * torch.tensor([0.3, 1.0, 2.0])
    base = torch.randn(3, 2 * TOKENS * WIDTH, generator=generator)
    mask = torch.ones(2, TOKENS)
    mask[1, 3:] = 0
    batch, objective, at = {"attention_mask": mask}, OBJECTIVES[name], torch.zeros(PARAMETERS)
    teacher = outputs(at, maps, base, classes=classes)

    def loss(x: Tensor) -> Tensor:
        return objective.loss(outputs(x, maps, base, classes=classes), teacher, batch)

    wanted = torch.autograd.functional.hessian(loss, at).diagonal()
    squares = torch.zeros(PARAMETERS)
    for _ in range(DRAWS):
        x = at.clone().requires_grad_()
        value = objective.project(outputs(x, maps, base, classes=classes), batch, generator)
        squares += torch.autograd.grad(value, x)[0].square() / DRAWS
    torch.testing.assert_close(squares, factor * wanted, rtol=0.1, atol=0)


def test_fewer_states_than_tokens_have_no_padding() -> None:
    states = (torch.ones(2, 5, 4), torch.ones(2, 3, 4))  # as Funnel and CANINE go on with
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    teacher, student = SimpleNamespace(hidden_states=states), SimpleNamespace(hidden_states=[own * 2 for own in states])
    loss = OBJECTIVES["embeddings"].loss(student, teacher, batch)
    torch.testing.assert_close(loss, torch.tensor(1.0))  # the same direction, and errors as large as what is wanted


@pytest.mark.parametrize("states", [None, ()])
@pytest.mark.parametrize("name", ["embeddings", "classes"])
def test_models_without_hidden_states_are_refused(name: str, states: tuple[Tensor, ...] | None) -> None:
    class Silent(nn.Module):
        def forward(self, input_ids: Tensor, output_hidden_states: bool) -> Any:
            return SimpleNamespace(hidden_states=states, given=(input_ids, output_hidden_states))

    with pytest.raises(ConfigError, match=r"heal: expected a model that returns hidden states .*, got Silent"):
        OBJECTIVES[name].run(Silent(), {"input_ids": torch.ones(1, 2)})


def test_a_model_that_decides_how_long_its_answer_is_cannot_be_healed() -> None:
    student, teacher = (SimpleNamespace(hidden_states=(torch.ones(2, length, 4),)) for length in (3, 5))
    with pytest.raises(ConfigError, match=r"^heal: expected hidden states of \(2, 5, 4\) as those of"):
        OBJECTIVES["embeddings"].loss(student, teacher, {"attention_mask": torch.ones(2, 5)})
