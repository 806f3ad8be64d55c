"""Layers whose weights stay in host memory, on a device that has a block no sooner than it arrives and no longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralExperts, SpectralLinear, SpectralWeight
from spectral_surgery.matmul import host_offload
from spectral_surgery.matmul.transfers import BUFFERS, Bus
from tests.support.spectra import noise, relative

ROWS, COLUMNS, BLOCK = 200, 160, 16 * 160
RATES = {"int4": 2.0, "int5": 3.0, "int8": 5.0, "int12": 8.0}


@dataclass
class Device:
    """Buffers that have noise but between the arrival of a block and the end of what computes with it."""

    buffers: list[Tensor] = field(default_factory=lambda: [torch.empty(0, dtype=torch.int8)] * BUFFERS)
    coming: list[Tensor | None] = field(default_factory=lambda: [None] * BUFFERS)
    events: list[tuple[str, int]] = field(default_factory=list)
    copied: int = 0
    held: int = 0
    peak: int = 0

    def start(self, buffer: int, block: Tensor) -> None:
        assert self.coming[buffer] is None, "a copy into a block that is in use"
        self.coming[buffer] = block
        self.buffers[buffer] = torch.full_like(block, 85)
        self.events.append(("start", buffer))
        self.copied += block.nbytes
        self.held += block.nbytes
        self.peak = max(self.peak, self.held)

    def arrived(self, buffer: int) -> Tensor:
        block = self.coming[buffer]
        assert block is not None
        self.events.append(("arrived", buffer))
        return self.buffers[buffer].copy_(block)

    def done(self, buffer: int) -> None:
        self.events.append(("done", buffer))
        self.buffers[buffer].fill_(85)
        self.held -= self.buffers[buffer].nbytes
        self.coming[buffer] = None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()
    shared = Bus(found)
    monkeypatch.setattr(host_offload, "BUFFER_BYTES", BLOCK)
    monkeypatch.setattr(host_offload, "bus", lambda _: shared)
    yield found
    assert found.held == 0
    assert found.peak <= BUFFERS * BLOCK


def spectrum(layout: str, seed: int = 0) -> EncodedSpectrum:
    return encode(0.02 * noise(ROWS, COLUMNS, seed=seed), Target("bits", RATES[layout]), Basis())[0]


def weight(layout: str, seed: int = 0) -> SpectralWeight:
    held = SpectralWeight.from_spectra(spectrum(layout, seed), "streamed")
    assert held.forms[0].layout == layout  # type: ignore[attr-defined]
    return held


def host_bytes(*weights: SpectralWeight) -> int:
    return sum(one.forms[0].host.nbytes for one in weights)  # type: ignore[attr-defined]


def in_order(events: list[tuple[str, int]]) -> bool:
    """Whether every block arrives once, after it was started, and is done before its buffer is written again."""
    after = {"start": "arrived", "arrived": "done", "done": "start"}
    own = [[event for event, number in events if number == buffer] for buffer in range(BUFFERS)]
    return all(some[::3] == ["start"] * (len(some) // 3) for some in own) and all(
        after[one] == other for some in own for one, other in pairwise(some)
    )


@pytest.mark.parametrize("layout", RATES)
@pytest.mark.parametrize("build", [SpectralLinear, SpectralConv1D.from_weight], ids=["linear", "conv1d"])
def test_a_layer_streams_its_compressed_bytes(
    layout: str, build: Callable[[SpectralWeight], nn.Module], device: Device
) -> None:
    held = weight(layout)
    layer, dense = build(held), spectrum(layout).to_dense().double()
    dense = dense.T if isinstance(layer, SpectralConv1D) else dense
    for tokens in (1, 3, 40):
        device.copied = 0
        x = noise(tokens, dense.shape[1]).requires_grad_()
        y = layer(x)
        assert relative(y.detach(), x.detach().double() @ dense.T) < 1e-5
        assert device.copied == host_bytes(held)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert relative(gradient, dense.sum(0).expand(tokens, -1)) < 1e-5
        assert device.copied == 2 * host_bytes(held)
    assert in_order(device.events)
    # the next block is on its way before somebody waits for this one
    assert [event for event, _ in device.events[:4]] == ["start", "start", "arrived", "done"]


@pytest.mark.parametrize("layout", RATES)
def test_layers_that_run_one_after_the_other(layout: str, device: Device) -> None:
    spectra = [encode(0.1 * noise(160, 160, seed=n), Target("bits", RATES[layout]), Basis())[0] for n in range(3)]
    layers = [SpectralLinear.from_quantized(own, resident="streamed") for own in spectra]
    x = noise(2, 160)
    expected = x.double()
    for own in spectra:
        expected = expected @ own.to_dense().double().T
    assert relative(nn.Sequential(*layers)(x).detach(), expected) < 1e-5
    assert device.copied == host_bytes(*(layer.spectrum for layer in layers))
    assert in_order(device.events)


@pytest.mark.parametrize("layout", RATES)
def test_experts_stream_those_that_have_tokens(layout: str, device: Device) -> None:
    weights = [weight(layout, seed) for seed in range(3)]
    counts = (2, 0, 3)
    x = noise(5, COLUMNS)
    y = SpectralExperts(weights)(x, counts)
    dense = [spectrum(layout, seed).to_dense().double() for seed in range(3)]
    expected = torch.cat([part @ one.T for part, one in zip(x.double().split(list(counts)), dense, strict=True)])
    assert relative(y.detach(), expected) < 1e-5
    assert device.copied == host_bytes(weights[0], weights[2])
    assert in_order(device.events)


@pytest.mark.parametrize("layout", RATES)
def test_an_embedding_looks_rows_up_in_host_memory(layout: str, device: Device) -> None:
    table = SpectralEmbedding(weight(layout))
    ids = torch.tensor([[3, 199, 0], [3, 3, 70]])
    assert relative(table(ids).detach(), spectrum(layout).to_dense().double()[ids]) < 1e-5
    assert device.copied == 0  # no block: only these rows
    head = SpectralLinear(table.spectrum)  # tied, as language models have it
    x = noise(1, COLUMNS)
    assert relative(head(x).detach(), x.double() @ spectrum(layout).to_dense().double().T) < 1e-5
    assert device.copied == host_bytes(table.spectrum)


def test_whoever_fails_in_the_middle_leaves_the_device_usable(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SpectralLinear(weight("int8"))
    x, arrived = noise(1, COLUMNS), device.arrived
    calls = iter(range(99))

    def fails(buffer: int) -> Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return arrived(buffer)

    with monkeypatch.context() as patch:
        patch.setattr(device, "arrived", fails)
        with pytest.raises(torch.OutOfMemoryError):
            layer(x)
    assert device.held == 0
    assert relative(layer(x).detach(), x.double() @ spectrum("int8").to_dense().double().T) < 1e-5
