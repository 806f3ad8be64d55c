"""Wanda: its mask, counted by hand."""

from __future__ import annotations

import torch

from spectral_surgery.baselines.wanda import wanda, wanda_mask

WEIGHT = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.5, 0.25, -0.125, 8.0]])
MOMENT = torch.diag(torch.tensor([1.0, 4.0, 100.0, 0.0])) + 0.5  # norms of the inputs: about 1.2, 2.1, 10 and 0.7


def test_weights_compete_with_those_of_their_row_by_weight_times_input() -> None:
    # scores of the rows: 4.9 6.4 20 0.7, and 0.6 0.5 1.25 5.7
    assert wanda_mask(WEIGHT, MOMENT, 4).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert wanda_mask(WEIGHT, MOMENT, 5).tolist() == [[True, True, True, False], [False, False, True, True]]
    assert bool(wanda_mask(WEIGHT, MOMENT, 8).all())


def test_what_is_kept_is_not_changed() -> None:
    made = wanda(WEIGHT, MOMENT, 9.0)  # a byte of bitmap, and four weights
    assert made.weight.tolist() == [[0, -3, 2, 0], [0, 0, -0.125, 8]]
    assert made.stored_bytes == 9
