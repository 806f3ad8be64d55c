"""Where kernels for a GPU do not run, products take other ways and one warning says why."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from spectral_surgery import gpu
from spectral_surgery.matmul import dispatch
from spectral_surgery.matmul.gpu_rules import chip_of


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    gpu.available.cache_clear()
    yield
    gpu.available.cache_clear()


def _found(monkeypatch: pytest.MonkeyPatch, version: str | None, *chips: tuple[int, int]) -> None:
    """Stand-ins for Triton and for GPUs of these compute capabilities."""
    monkeypatch.setattr(gpu, "find_spec", lambda _: None if version is None else object())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(chips))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: chips[number])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"chip {number}")


@pytest.mark.parametrize(
    ("version", "chips", "said"),
    [
        (None, [(9, 0)], []),
        ("3.4.0", [(9, 0)], ["GPU kernels need Triton 3.6 or newer, got 3.4.0. Products take slower ways."]),
        ("3.9.0", [(9, 0), (7, 5)], ["GPU kernels need compute capability 8.0, which chip 1 lacks"]),
    ],
    ids=["no triton", "an old triton", "an old chip beside a new one"],
)
def test_products_fall_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str | None,
    chips: list[tuple[int, int]],
    said: list[str],
) -> None:
    _found(monkeypatch, version, *chips)
    with caplog.at_level(logging.WARNING):
        ways = {dispatch.way("cuda", 64, torch.bfloat16) for _ in range(3)}
    assert ways == {"blocks"}
    assert len(caplog.messages) == len(said)
    assert all(message.startswith(start) for message, start in zip(caplog.messages, said, strict=True))


def test_kernels_run_with_triton_on_new_chips(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _found(monkeypatch, "3.9.0", (8, 0), (9, 0))
    assert dispatch.way("cuda", 64, torch.bfloat16) == "triton"
    assert dispatch.way("cuda", 64, torch.float64) == "blocks"
    assert not caplog.messages


def test_chips_are_told_apart_by_their_capability() -> None:
    kinds = {
        (8, 0): "8.0",
        (8, 6): "8.6",
        (8, 9): "8.6",
        (9, 0): "9.0",
        (10, 0): "10.0",
        (10, 3): "10.0",
        (12, 0): "8.6",
    }
    assert {capability: chip_of(capability) for capability in kinds} == kinds
