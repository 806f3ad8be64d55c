"""SpectralDelta against its definition, and as the best approximation of a weight update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_surgery.adapters.from_update.fit_update import EXTRACTORS
from spectral_surgery.adapters.spectral_delta import SpectralDelta, SpectralDeltaConfig
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.transforms import TRANSFORMS
from tests.support.largest import largest_tensor

NAMES: list[Any] = ["dct", "hartley"]


def signal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spectrum_of(delta: Tensor, name: str) -> Tensor:
    rows, columns = (TRANSFORMS[name].matrix(n).float() for n in delta.shape)
    return rows @ delta @ columns.T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(12, 20), (21, 7)])
def test_the_update_has_the_coefficients_at_their_places(name: Any, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = SpectralDeltaConfig(n_frequency=9, transform=name, scaling=2.5, init_weights=False)
    adapter = SpectralDelta(config, *shape)
    expected = torch.zeros(shape[0] * shape[1])
    expected[adapter.positions.long()] = 2.5 * adapter.spectrum.detach()
    torch.testing.assert_close(spectrum_of(adapter.delta_weight(), name), expected.reshape(shape))


def test_places_are_drawn_from_the_seed() -> None:
    draws = [SpectralDelta(SpectralDeltaConfig(n_frequency=9, random_loc_seed=s), 12, 20).positions for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.int32
    assert len(draws[0].unique()) == 9


def extracted(delta: torch.Tensor, count: int, transform: Any = "dct", scaling: float = 1.0) -> SpectralDelta:
    """The adapter with the largest coefficients of a weight update."""
    config = SpectralDeltaConfig(n_frequency=count, transform=transform, scaling=scaling)
    row, shape = EXTRACTORS["spectral_delta"], (delta.shape[0], delta.shape[1])
    adapter = SpectralDelta(config, *shape)
    adapter.load_state_dict(row.tensors(row.expand(delta.float(), count, None, config).parts, shape, config))
    return adapter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(12, 20), (21, 7), (1, 5)])
def test_all_coefficients_are_the_update_itself(name: Any, shape: tuple[int, int]) -> None:
    delta = signal(*shape)
    adapter = extracted(delta, delta.numel(), name)
    torch.testing.assert_close(adapter.delta_weight(), delta)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_coefficients_leave_the_energy_of_the_others(name: Any) -> None:
    delta = signal(12, 20).bfloat16()
    adapter = extracted(delta, 50, name, 0.25)
    energies = spectrum_of(delta.float(), name).square().flatten().sort(descending=True).values
    torch.testing.assert_close((delta.float() - adapter.delta_weight()).square().sum(), energies[50:].sum())
    again = extracted(delta, 50, name, 0.25)
    assert torch.equal(adapter.positions, again.positions)


def test_an_update_that_is_sparse_is_found() -> None:
    torch.manual_seed(0)
    config = SpectralDeltaConfig(n_frequency=30, init_weights=False)
    adapter = SpectralDelta(config, 40, 24)
    found = extracted(adapter.delta_weight().detach(), 30)
    assert torch.equal(found.positions, adapter.positions)
    torch.testing.assert_close(found.spectrum, adapter.spectrum)


def test_an_update_of_zeros() -> None:
    adapter = extracted(torch.zeros(4, 6), 5)
    assert adapter.positions.tolist() == [0, 1, 2, 3, 4]
    assert not adapter.delta_weight().any()


def test_few_tokens_make_no_dense_tensor_and_many_may() -> None:
    adapter = SpectralDelta(SpectralDeltaConfig(n_frequency=200), 64, 96)
    for tokens, dense in ((1, False), (20, False), (3000, True)):
        x = signal(tokens, 96).requires_grad_()
        with largest_tensor() as most:
            (adapter(x) * signal(tokens, 64, seed=2)).sum().backward()
        assert (most.numel >= 64 * 96) == dense
        expected = x @ adapter.delta_weight().T
        torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-5)
    with largest_tensor() as most:
        adapter.rows(torch.tensor([1, 5]))
    assert most.numel < 64 * 96


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: Any) -> None:
    config = SpectralDeltaConfig(n_frequency=9, transform=name, init_weights=False)
    adapter = SpectralDelta(config, 6, 5).double()
    x = signal(3, 5).double().requires_grad_()

    def forward(x: Tensor, spectrum: Tensor) -> Tensor:
        return torch.func.functional_call(adapter, {"spectrum": spectrum}, (x,))

    assert torch.autograd.gradcheck(forward, (x, adapter.spectrum))


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        ([3, 3, 5], r"positions: expected increasing places.*got \[3, 3, 5\]\.\.\.\. Write the adapter again"),
        ([5, 3, 7], "positions: expected increasing places.*got .* 3, .* Write the adapter again"),
        ([-1, 3, 7], "positions: expected increasing places.*got .* 3, .* Write the adapter again"),
        ([1, 3, 240], "positions: expected increasing places.*got .* 3, .* Write the adapter again"),
    ],
)
def test_wrong_places(positions: list[int], text: str) -> None:
    config = SpectralDeltaConfig(n_frequency=3)
    with pytest.raises(CheckpointError, match=text):
        SpectralDelta(config, 12, 20, torch.tensor(positions))
    adapter = SpectralDelta(config, 12, 20)
    with pytest.raises(CheckpointError, match=text):
        adapter.load_state_dict({"spectrum": torch.zeros(3), "positions": torch.tensor(positions)})


def test_wrong_settings() -> None:
    for n in (0, 241):
        with pytest.raises(ConfigError, match=f"n_frequency: expected 1 to 240 for a layer of 12 x 20, got {n}"):
            SpectralDelta(SpectralDeltaConfig(n_frequency=n), 12, 20)
    with pytest.raises(ConfigError, match=r"positions: expected \[3\], one for each coefficient, got shape \(2,\)"):
        SpectralDelta(SpectralDeltaConfig(n_frequency=3), 12, 20, torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match="transform: expected one of dct, hartley, got 'haar'"):
        SpectralDelta(SpectralDeltaConfig(n_frequency=3, transform="haar"), 12, 20)
