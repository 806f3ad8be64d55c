"""What a model raises becomes one line with the cause."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_surgery.errors import ConfigError, TargetError
from spectral_surgery.live.running import called, running


class Picky(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, *_: torch.Tensor, **__: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [ValueError("You have\nto specify bbox"), KeyError(0), NotImplementedError(), StopIteration(), IndexError(1)],
)
def test_any_error_is_named(error: Exception) -> None:
    with pytest.raises(TargetError, match="Picky: expected a model that runs on token ids") as told:
        called(Picky(error), named={"input_ids": torch.zeros(1)})
    assert type(error).__name__ in str(told.value)
    assert "\n" not in str(told.value)
    assert told.value.__cause__ is error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["input_ids", "attention_mask"], "token ids and an attention mask"),
        (["input_ids", "attention_mask", "pixel_values"], "token ids, an attention mask and an image"),
        (["pixel_values"], "an image"),
        (["input_features", "decoder_input_ids"], "what its decoder reads and a sound"),
        (["bbox"], "bbox"),
        ([], "hidden states"),
    ],
)
def test_what_a_model_was_given_is_named(given: list[str], words: str) -> None:
    with pytest.raises(TargetError, match=f"Picky: expected a model that runs on {words} alone, got ValueError: no"):
        called(Picky(ValueError("no")), () if given else (torch.zeros(1),), dict.fromkeys(given, torch.zeros(1)))


def test_deliberate_errors_and_results_pass() -> None:
    with pytest.raises(ConfigError, match="on purpose"):
        called(Picky(ConfigError("on purpose")), (torch.zeros(1),))
    assert called(nn.Identity(), (3,)) == 3
    with pytest.raises(KeyboardInterrupt), running(nn.Identity()):
        raise KeyboardInterrupt
