"""Blocks that cross a bus: every product sees its own block whole, however copies and products are interleaved."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery import matmul as op
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError
from spectral_surgery.layers import SpectralLinear
from spectral_surgery.matmul import host_offload as streamed
from spectral_surgery.matmul import transfers
from spectral_surgery.matmul.transfers import BUFFERS, Bus, HostTransfers
from tests.support.spectra import TOLERANCE, by_token, noise

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def encoded(rows: int = 200, columns: int = 160, bits: float = 2.0, axes: tuple[int, ...] = (0, 1)) -> EncodedSpectrum:
    return encode(0.02 * noise(rows, columns), Target("bits", bits), Basis(axes=axes))[0]


@dataclass
class Queues:
    """A device that runs two queues at its own pace; events order them, as CUDA's do."""

    work: dict[str, list[tuple[str, object]]] = field(default_factory=lambda: {"copies": [], "products": []})
    reached: set[object] = field(default_factory=set)

    def run(self, next_queue: Callable[[list[str]], str]) -> None:
        while any(self.work.values()):
            ready = [name for name, own in self.work.items() if own and self._may(own[0])]
            assert ready, "both queues wait for each other"
            kind, what = self.work[next_queue(ready)].pop(0)
            if kind == "do":
                what()  # type: ignore[operator]
            elif kind == "record":
                self.reached.add(what)

    def _may(self, step: tuple[str, object]) -> bool:
        return step[0] != "wait" or step[1] in self.reached


class LateTransfers:
    """Queues what CudaTransfers queues, event for event; nothing happens before the device runs."""

    def __init__(self, device: Queues, columns: int) -> None:
        self.device = device
        self.buffers = [torch.zeros(64, columns, dtype=torch.int8) for _ in range(BUFFERS)]
        self.blocks = [self.buffers[0]] * BUFFERS
        self.free: list[object] = [None] * BUFFERS
        self.copied: list[object] = [None] * BUFFERS
        device.reached.add(None)

    def start(self, buffer: int, block: Tensor) -> None:
        place = self.blocks[buffer] = self.buffers[buffer][: len(block)]
        self.copied[buffer] = object()
        copies = self.device.work["copies"]
        copies.append(("wait", self.free[buffer]))
        for row in range(len(block)):  # a copy takes its time
            copies.append(("do", partial(place[row].copy_, block[row])))
        copies.append(("record", self.copied[buffer]))

    def arrived(self, buffer: int) -> Tensor:
        self.device.work["products"].append(("wait", self.copied[buffer]))
        return self.blocks[buffer]

    def done(self, buffer: int) -> None:
        self.free[buffer] = object()
        self.device.work["products"].append(("record", self.free[buffer]))


def first(ready: list[str]) -> str:
    return ready[0]


def last(ready: list[str]) -> str:
    return ready[-1]


@pytest.mark.parametrize("pace", [first, last, *(random.Random(seed).choice for seed in range(4))])
@pytest.mark.parametrize("free", [True, False])
def test_no_block_is_overwritten_before_it_is_used(pace: Callable[[list[str]], str], free: bool) -> None:
    """Copies may run as far ahead, or products lag as far behind, as events let them: also from matrix to matrix."""
    device = Queues()
    bus = Bus(LateTransfers(device, 5))
    if not free:
        bus._transfers.done = lambda _: None  # type: ignore[method-assign]
    seen: list[tuple[Tensor, int, Tensor]] = []
    for rows, height in ((7, 2), (1, 3), (1, 3), (6, 3), (5, 1)):
        matrix = torch.randint(-99, 99, (rows, 5), dtype=torch.int8)
        for start, block in bus.blocks(matrix, height):
            result = torch.zeros_like(block)
            device.work["products"].append(("do", partial(result.copy_, block)))
            seen.append((matrix, start, result))
    device.run(pace)
    wrong = sum(not torch.equal(result, matrix[start : start + len(result)]) for matrix, start, result in seen)
    if free:
        assert wrong == 0
    elif pace is first:
        assert wrong > 0  # without the event that frees a buffer, this would be seen


def test_copies_run_ahead_by_one_block() -> None:
    """While a product is under way, the next block is on its way, in the next matrix too."""
    device = Queues()
    bus = Bus(LateTransfers(device, 3))
    for _ in range(2):
        for _, block in bus.blocks(torch.ones(2, 3, dtype=torch.int8), 1):
            del block
    order = [what for kind, what in device.work["copies"] if kind == "wait"]
    assert order[:2] == [None, None]  # both buffers at once
    records = [what for kind, what in device.work["products"] if kind == "record"]
    assert order[2:] == records[:2]  # each of the others waits for the block two before it, and for no other


def test_whoever_stops_early_leaves_the_bus_usable() -> None:
    bus = Bus(HostTransfers())
    matrix = torch.arange(12, dtype=torch.int8).reshape(6, 2)
    blocks = bus.blocks(matrix, 1)
    next(blocks)
    blocks.close()
    assert torch.equal(torch.cat([block for _, block in bus.blocks(matrix, 4)]), matrix)
    assert list(bus.blocks(matrix[:0], 4)) == []


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(streamed, "BUFFER_BYTES", 16 * 160)
    transfers.bus.cache_clear()
    yield
    transfers.bus.cache_clear()


@pytest.mark.usefixtures("small_blocks", "processor")
@pytest.mark.parametrize(("bits", "kind"), [(2.0, "int4"), (3.0, "int5"), (5.0, "int8"), (8.0, "int12")])
@pytest.mark.parametrize("axes", [(0, 1), (1,)])
def test_is_the_form_that_it_streams(bits: float, kind: str, axes: tuple[int, ...]) -> None:
    spectrum = encoded(bits=bits, axes=axes)
    form, whole = (op.resident_form(spectrum, name) for name in ("streamed", kind))
    assert form.layout == kind  # type: ignore[attr-defined]
    assert form.host.nbytes == whole.codes.nbytes + whole.lowest.nbytes  # type: ignore[attr-defined]
    assert form.codes.nbytes == form.lowest.nbytes == 0  # type: ignore[attr-defined]
    dense = spectrum.to_dense()
    for tokens in (1, 9, 260):
        for dtype, most in TOLERANCE.items():
            x, back = noise(tokens, 160).to(dtype), noise(tokens, 200).to(dtype)
            for one in (form, whole):
                assert by_token(op.form_matmul(x, [one]), x.double() @ dense.double().T) < most
                assert by_token(op.form_matmul_transposed(back, [one]), back.double() @ dense.double()) < most
    assert torch.equal(form.levels(torch.tensor([199, 0, 7])), whole.levels(torch.tensor([199, 0, 7])))


def test_codes_stay_on_the_host() -> None:
    layer = SpectralLinear.from_quantized(encoded(), resident="streamed")
    moved = copy.deepcopy(layer).to("meta")
    held = moved.spectrum.forms[0]
    assert held.scale.device.type == "meta"
    assert held.host.codes.device.type == "cpu"  # type: ignore[attr-defined]
    assert layer.spectrum.nbytes >= 200 * 80
    assert sum(buffer.nbytes for buffer in layer.buffers()) < 100


def test_states_that_do_not_fit() -> None:
    layer = SpectralLinear.from_quantized(encoded(), resident="streamed")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*host"):
        layer.load_state_dict({name: value for name, value in state.items() if not name.endswith(".host")})
    name = next(name for name in state if name.endswith(".host"))
    with pytest.raises(RuntimeError, match=r"host: codes are \[3, 80\] instead of \[200, 80\]"):
        layer.load_state_dict(state | {name: state[name][:3]})


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BUFFER_BYTES", 79)
    with pytest.raises(ConfigError, match=r"'streamed': a row of 80 bytes; expected up to 79. Use int8\."):
        op.resident_form(encoded(), "streamed")
    wide = replace(encoded().decode(), codes=torch.full((200, 160), 5000, dtype=torch.int16))
    with pytest.raises(ConfigError, match="resident 'int12': codes reach"):
        op.resident_form(wide, "streamed")


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_streams_to_a_gpu(bits: float) -> None:
    """Many layers one after the other, queued at once: every block must have been the right one."""
    spectra = [encode(noise(160, 160, seed=n), Target("bits", bits))[0] for n in range(12)]
    layers = nn.Sequential(*(SpectralLinear.from_quantized(own, resident="streamed") for own in spectra)).cuda()
    assert all(layer.spectrum.forms[0].host.codes.is_pinned() for layer in layers)
    for tokens in (1, 260):
        x = noise(tokens, 160, seed=tokens)
        expected = x.double()
        for own in spectra:
            expected = expected @ own.to_dense().double().T
        for _ in range(5):
            y = layers(x.cuda())
        assert float((y.double().cpu() - expected).norm() / expected.norm()) < 1e-4
        given = x.cuda().requires_grad_()
        (gradient,) = torch.autograd.grad(layers(given).sum(), given)
        wanted = torch.ones(tokens, 160, dtype=torch.float64)
        for own in reversed(spectra):
            wanted = wanted @ own.to_dense().double()
        assert float((gradient.double().cpu() - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.gpu
@gpu
def test_a_gpu_holds_two_blocks_and_no_matrix() -> None:
    layer = SpectralLinear.from_quantized(encoded(8192, 4096, bits=2.0), resident="streamed").cuda()
    x = noise(1, 4096).cuda()
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2 << 20
