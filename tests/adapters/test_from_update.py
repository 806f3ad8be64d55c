"""Components of an update: chosen where they gain most for their bytes, and as few as an error needs."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from spectral_surgery.adapters.from_update.fit_update import EXTRACTORS, Fit, Size, Update, fit
from spectral_surgery.commands.extract import delta_of
from spectral_surgery.errors import ConfigError
from tests.support.checkpoints import gaussian

FOURIER = ("fourierft", "fourierft_biased")


def updates(**deltas: Tensor) -> list[Update]:
    return [
        Update(name, (delta.shape[0], delta.shape[1]), lambda delta=delta: delta.clone())
        for name, delta in deltas.items()
    ]


def error_of(fitted: Fit, method: str, deltas: dict[str, Tensor]) -> float:
    from spectral_surgery.adapters.base import AdapterSpec, AdapterState

    state = AdapterState(AdapterSpec(EXTRACTORS[method].method, fitted.config), fitted.layers)
    total = 0.0
    for name, delta in deltas.items():
        kept = delta_of(state, name, (delta.shape[0], delta.shape[1])) if name in fitted.layers else 0
        total += float((delta - kept).double().square().sum())
    return total


@pytest.mark.parametrize("method", ["spectral_delta", "lora"])
def test_no_other_split_of_the_bytes_is_better(method: str) -> None:
    deltas = {
        "a": gaussian(6, 6, seed=1),
        "b": 3 * gaussian(6, 6, seed=2) * torch.linspace(1, 0, 6),
        "c": gaussian(6, 6, seed=3),
    }
    row = EXTRACTORS[method]
    cost, budget = row.cost((6, 6), 4), 6 * row.cost((6, 6), 4) + 3
    best = fit(row, row.method.config(), updates(**deltas), Size("bytes", budget))
    assert sum(best.counts.values()) * cost <= budget
    errors = []
    for counts in product(range(7), repeat=3):
        if sum(counts) == 6:
            own = dict(zip(deltas, counts, strict=True))
            energies = {name: _sorted_gains(method, delta) for name, delta in deltas.items()}
            errors.append(sum(float(energies[name][own[name] :].sum()) for name in deltas))
    assert error_of(best, method, deltas) == pytest.approx(min(errors), rel=1e-4)


def _sorted_gains(method: str, delta: Tensor) -> Tensor:
    from scipy.fft import dctn

    if method == "lora":
        return torch.linalg.svdvals(delta.double()).square()
    spectrum = torch.from_numpy(dctn(delta.double().numpy(), norm="ortho"))
    return spectrum.square().reshape(-1).sort(descending=True).values


@pytest.mark.parametrize("method", ["spectral_delta", "lora", "foura", "fourierft_biased"])
def test_an_error_target_takes_the_fewest_components(method: str) -> None:
    deltas, row = {"a": gaussian(20, 15)}, EXTRACTORS[method]
    reached = fit(row, row.method.config(), updates(**deltas), Size("max_error", 0.75))
    one_less = fit(row, row.method.config(), updates(**deltas), Size("count", reached.counts["a"] - 1))
    energy = float(deltas["a"].double().square().sum())
    assert error_of(reached, method, deltas) <= 0.75**2 * energy < error_of(one_less, method, deltas)


def test_foura_reaches_what_lora_reaches() -> None:
    delta = gaussian(30, 21)
    found = []
    for method, settings in (("lora", {}), ("foura", {}), ("foura", {"transform": "hartley"})):
        row = EXTRACTORS[method]
        fitted = fit(row, row.method.config(**settings), updates(a=delta), Size("count", 5))
        found.append(error_of(fitted, method, {"a": delta}))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (8, 5), (7, 6)])
@pytest.mark.parametrize("method", FOURIER)
def test_fourier_coefficients_are_the_least_squares_solution(method: str, shape: tuple[int, int]) -> None:
    delta, row = gaussian(*shape), EXTRACTORS[method]
    for count in (1, 9, row.most(shape)):
        fitted = fit(row, row.method.config(), updates(a=delta), Size("count", count))
        basis = []
        for number in range(count):  # the adapter is linear in its coefficients
            one = dict(fitted.layers["a"]) | {"spectrum": torch.eye(count)[number]}
            state = Fit(fitted.config, {"a": one}, {}, {}, ())
            basis.append((delta_zero(state, method, shape)).reshape(-1))
        solution = torch.linalg.lstsq(
            torch.stack(basis, 1).double(), delta.reshape(-1, 1).double(), rcond=1e-5, driver="gelsd"
        ).solution
        best = float((delta.reshape(-1, 1).double() - torch.stack(basis, 1).double() @ solution).square().sum())
        assert error_of(fitted, method, {"a": delta}) == pytest.approx(best, rel=1e-4, abs=1e-8)
    assert best == pytest.approx(fitted.floors["a"] ** 2 * float(delta.double().square().sum()), rel=1e-4)


def delta_zero(fitted: Fit, method: str, shape: tuple[int, int]) -> Tensor:
    from spectral_surgery.adapters.base import AdapterSpec, AdapterState

    return delta_of(AdapterState(AdapterSpec(EXTRACTORS[method].method, fitted.config), fitted.layers), "a", shape)


def test_large_matrices_are_sketched_as_well_as_decomposed() -> None:
    delta = gaussian(1100, 40) @ gaussian(40, 1030, seed=1) + 1e-3 * gaussian(1100, 1030, seed=2)
    row, energies = EXTRACTORS["lora"], torch.linalg.svdvals(delta.double()).square()
    by_count = fit(row, row.method.config(), updates(a=delta), Size("count", 20))
    assert error_of(by_count, "lora", {"a": delta}) == pytest.approx(float(energies[20:].sum()), rel=1e-2)
    by_error = fit(row, row.method.config(), updates(a=delta), Size("max_error", 0.3))
    needed = int((energies.flip(0).cumsum(0).flip(0) > 0.09 * energies.sum()).sum())
    assert by_error.counts["a"] == needed
    capped = fit(row, row.method.config(), updates(a=delta), Size("max_error", 0.3), max_count=needed - 3)
    assert capped.counts["a"] == needed - 3


def test_ranks_of_layers_whose_names_end_alike() -> None:
    deltas = {"a.q": gaussian(9, 9), "b.a.q": 9 * gaussian(9, 9, seed=1), "b.a.k": 0.1 * gaussian(9, 9, seed=2)}
    row = EXTRACTORS["lora"]
    fitted = fit(row, row.method.config(), updates(**deltas), Size("bytes", 8 * 72))
    assert {name: fitted.config.for_layer(name).r for name in fitted.layers} == {
        name: count for name, count in fitted.counts.items() if count
    }
    assert error_of(fitted, "lora", deltas) < sum(float(d.double().square().sum()) for d in deltas.values())


@pytest.mark.parametrize("limit", [0.009, 0.02, 0.2])
@pytest.mark.parametrize("method", ["spectral_delta", "lora", "foura"])
def test_an_error_limit_holds_for_what_is_stored_in_16_bits(method: str, limit: float) -> None:
    row, deltas = EXTRACTORS[method], {"a": gaussian(48, 48, seed=1)}
    fitted = fit(row, row.method.config(), updates(**deltas), Size("max_error", limit), dtype=torch.bfloat16)
    assert error_of(fitted, method, deltas) <= limit**2 * float(deltas["a"].double().square().sum())


def test_an_error_below_rounding_is_refused() -> None:
    row, deltas = EXTRACTORS["lora"], {"a": gaussian(8, 8, seed=1)}
    with pytest.raises(ConfigError, match=r"max_error: expected more than [\d.e-]+,.*got [\d.e-]+"):
        fit(row, row.method.config(), updates(**deltas), Size("max_error", 0.005), dtype=torch.bfloat16)
