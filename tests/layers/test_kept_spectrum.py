"""Weights trained in their kept spectrum: what is computed is what would be stored, and gradients are those of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.frames import encode_rows
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.codec.quantizers.lattice import points_of
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ShapeError, TargetError
from spectral_surgery.layers.kept_spectrum import KeptSpectrum
from spectral_surgery.live.trained_spectra import (
    freeze_spectra,
    kept_spectra,
    train_kept,
    unfreeze_spectra,
)

TARGETS = [Target("density", 0.2), Target("density", 0.05), Target("bits", 1.0), Target("bits", 4.0)]


def stored(weight: torch.Tensor, target: Target) -> QuantizedSpectrum:
    return encode(weight.detach(), target)[0].decode()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_weight_is_what_its_spectra_decode_to(target: Target) -> None:
    weight = torch.randn(130, 75, generator=torch.Generator().manual_seed(0))
    kept = KeptSpectrum([stored(weight[:64], target), stored(weight[64:], target)], weight.shape)
    values = kept.right_inverse(weight)
    values = values + 0.3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    parts = [own.to_dense() for own in kept.spectra(values)]
    torch.testing.assert_close(kept(values), torch.cat(parts))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_without_an_original_training_starts_at_what_was_stored(target: Target) -> None:
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    spectrum = stored(weight, target)
    kept = KeptSpectrum([spectrum], weight.shape)
    torch.testing.assert_close(kept(kept.start), spectrum.to_dense(), rtol=1e-4, atol=1e-4)


def test_with_the_original_training_starts_nearer_to_it() -> None:
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    spectrum = stored(weight, Target("density", 0.2))
    kept = KeptSpectrum([spectrum], weight.shape, weight)
    assert float((kept(kept.start) - weight).norm()) < float((spectrum.to_dense() - weight).norm())


def test_gradients_pass_the_quantiser_and_reach_kept_coefficients_only() -> None:
    weight = torch.randn(64, 70, generator=torch.Generator().manual_seed(0))
    spectrum = stored(weight, Target("density", 0.2))
    kept = KeptSpectrum([spectrum], weight.shape)
    values = kept.start.clone().requires_grad_()
    toward = torch.randn(64, 70, generator=torch.Generator().manual_seed(2))
    (kept(values) * toward).sum().backward()
    # an orthonormal basis: the gradient of a coefficient is the coefficient of the gradient
    from spectral_surgery.codec.encoded import Basis

    positions = spectrum.codes.reshape(-1).nonzero()[:, 0]
    expected = Basis(spectrum.transform, spectrum.tile, spectrum.axes).forward(toward).reshape(-1)[positions]
    scale = float(spectrum.coefficients().reshape(-1)[positions].square().mean().sqrt())
    torch.testing.assert_close(values.grad, expected * scale, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_the_weight() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    kept = KeptSpectrum([stored(weight, Target("bits", 3.0))], weight.shape)
    with torch.autocast("cpu", torch.bfloat16):
        inside = kept(kept.start)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, kept(kept.start))


def test_a_spectrum_of_another_size_is_refused() -> None:
    spectrum = stored(torch.randn(64, 64), Target("bits", 3.0))
    with pytest.raises(ShapeError, match=r"expected spectra of the size of \[64, 65\], got \[\[64, 64\]\]"):
        KeptSpectrum([spectrum], (64, 65))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.middle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(ids)))


def test_shared_weights_are_trained_as_one() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(40)
    names = ("embedding.weight", "middle.weight")
    own = dict(model.named_parameters())
    (first, _) = values = train_kept(model, {name: [stored(own[name], Target("bits", 3.0))] for name in names})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "embedding.parametrizations.weight.original",
        "middle.parametrizations.weight.original",
    ]
    model(ids).square().mean().backward()
    assert first.grad is not None
    torch.optim.SGD(values, 0.5).step()
    assert torch.equal(model.head.weight, model.embedding.weight)
    spectra = kept_spectra(model)
    assert list(spectra) == list(names)
    torch.testing.assert_close(spectra["embedding.weight"][0].to_dense(), model.embedding.weight)


def test_a_name_that_is_no_parameter_is_refused() -> None:
    with pytest.raises(TargetError, match=r"expected parameters of Tied, got 'nothing\.weight'. See named_parameters"):
        train_kept(Tied(), {"nothing.weight": [stored(torch.randn(64, 64), Target("bits", 3.0))]})


@pytest.mark.parametrize("resident", ["coded", "int8"])
def test_spectral_layers_are_trained_and_freeze_to_what_was_trained(resident: str) -> None:
    from spectral_surgery.layers import SpectralWeight
    from spectral_surgery.live.compression import compress_model

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(40)
    dense = model(ids).detach()
    compress_model(model, sparsity=0.3, resident=resident, min_weights=0)
    before = model(ids).detach()
    values = unfreeze_spectra(model)
    assert len(values) == 2  # the output layer shares the embedding's
    assert float((model(ids) - before).detach().norm()) < 0.02 * float(before.norm())
    optimizer = torch.optim.Adam(values, 0.02)
    for _ in range(30):
        optimizer.zero_grad()
        (model(ids) - dense).square().mean().backward()
        optimizer.step()
    trained = model(ids).detach()
    assert float((trained - dense).norm()) < 0.8 * float((before - dense).norm())
    freeze_spectra(model)
    assert isinstance(model.head.spectrum, SpectralWeight)
    assert model.head.spectrum is model.embedding.spectrum
    torch.testing.assert_close(model(ids), trained, rtol=1e-3, atol=1e-3)


def test_a_model_without_spectral_layers_is_refused() -> None:
    with pytest.raises(TargetError, match="Tied: expected a compressed model, got one without spectral layers"):
        unfreeze_spectra(Tied())


@pytest.mark.parametrize("turned", [False, True])
def test_points_of_the_lattice_are_trained_as_points_of_it(*, turned: bool) -> None:
    """All of them, those that are zero too; and what comes out is as small as it was."""
    weight = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    spectrum = stored(weight.T.contiguous() if turned else weight, Target("bits", 2.0))
    if turned:
        spectrum = replace(spectrum, codes=spectrum.codes.T.contiguous())
    kept = KeptSpectrum([spectrum], weight.shape)
    assert kept.start.numel() == weight.numel()
    (found,) = kept.spectra(kept.start)
    before, after = (sum(map(len, encode_rows(one.codes, 64)[1])) for one in (spectrum, found))
    assert after <= 1.01 * before
    torch.testing.assert_close(found.coefficients(), spectrum.coefficients(), rtol=0, atol=3 * float(spectrum.step))
    (moved,) = kept.spectra(1.1 * kept.start)
    assert points_of(moved.codes) is not None


@pytest.mark.parametrize("offset", [-0.4, 0.0, 0.4])
def test_training_starts_anywhere_in_the_cells_of_what_is_stored(offset: float) -> None:
    codes = torch.randint(-3, 4, (64, 128), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    stored = QuantizedSpectrum(codes, torch.tensor(0.5), offset, "dct", 64, (0, 1))
    kept = KeptSpectrum([stored], codes.shape)
    assert torch.equal(kept.spectra(kept.start)[0].codes, codes.to(torch.int32))  # what is stored does not change
    moved = kept.spectra(kept.start + 0.05 * stored.step / stored.coefficients()[codes != 0].square().mean().sqrt())
    changed = (moved[0].codes != codes)[codes != 0].float().mean()
    assert 0.005 < changed < 0.12  # a twentieth of a cell; few where cells were narrowed
