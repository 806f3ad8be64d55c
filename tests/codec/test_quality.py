from __future__ import annotations

import math

import pytest
import torch

from spectral_surgery.codec.quality import bits_per_weight, energy_kept, relative_error, snr_db
from spectral_surgery.errors import SpectralSurgeryError


def test_figures_of_a_known_error() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    actual = torch.tensor([[3.0, 3.5]])
    assert relative_error(reference, actual) == pytest.approx(0.1)
    assert snr_db(reference, actual) == pytest.approx(20)
    assert relative_error(reference, reference) == 0
    assert snr_db(reference, reference) == math.inf
    assert energy_kept(reference, torch.tensor([[3.0, 0.0]])) == pytest.approx(9 / 25)
    assert bits_per_weight(100, 400) == 2


def test_shapes_must_agree() -> None:
    with pytest.raises(SpectralSurgeryError):
        relative_error(torch.zeros(2), torch.zeros(3))
    with pytest.raises(SpectralSurgeryError):
        bits_per_weight(1, 0)
