"""Whoever stores codes gives frames of different scale layouts of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectral_surgery.codec import encoded as codec
from spectral_surgery.codec import frames
from spectral_surgery.codec.coding import choose_layout, encode_frame
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum
from spectral_surgery.codec.feedback import Codes, encode_codes, stored_codes
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import CheckpointError
from spectral_surgery.matmul.code_blocks import as_encoded

BASIS = Basis("identity", 64, ())


def by_encode(values: Tensor) -> EncodedSpectrum:
    """Codes of its own choice, of these values."""
    return encode(values.float(), Target("density", 1.0), BASIS)[0]


def by_feedback(values: Tensor) -> EncodedSpectrum:
    return encode_codes(values.float(), Codes(values, 1.0), BASIS)[0]


def by_heal(values: Tensor) -> EncodedSpectrum:
    return stored_codes(Codes(values, 1.0), BASIS)


def by_live_model(values: Tensor) -> EncodedSpectrum:
    return as_encoded(QuantizedSpectrum(values, torch.ones(1), 0.0, BASIS.transform, BASIS.tile, BASIS.axes))


PRODUCERS = [by_encode, by_feedback, by_heal, by_live_model]


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "FRAME_SIZE", 64 * 512)


@pytest.mark.parametrize("produce", PRODUCERS)
@pytest.mark.parametrize("scales", [(300.0, 0.3, 3.0, 300.0, 0.3), (0.0, 1.0, 0.0), (0.0, 0.0)])
def test_every_frame_is_about_as_small_as_alone(
    produce: Callable[[Tensor], EncodedSpectrum], scales: tuple[float, ...]
) -> None:
    """Frames of zeros are of no scale: what was chosen on them once served those of mean square one, too."""
    noise = torch.randn(len(scales) * 64, 512, generator=torch.Generator().manual_seed(0))
    values = (noise * torch.tensor(scales).repeat_interleave(64)[:, None]).round().to(torch.int32)
    encoded = produce(values)
    assert len(encoded.frames) == len(scales)
    for number, frame in enumerate(encoded.frames):
        codes = encoded.codes(number)
        flat = codes.reshape(-1).numpy()
        assert len(frame) <= 1.02 * len(encode_frame(flat, choose_layout(flat))) + 8
        if produce is not by_encode:
            assert torch.equal(codes.int(), values[64 * number : 64 * number + 64])


@pytest.mark.parametrize("produce", PRODUCERS)
def test_a_coder_that_is_wrong_is_noticed(
    produce: Callable[[Tensor], EncodedSpectrum], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "encode_frame", lambda codes, layout: encode_frame(codes[::-1].copy(), layout))
    with pytest.raises(CheckpointError, match="does not decode to what was encoded"):
        produce(torch.arange(64 * 512, dtype=torch.int32).reshape(64, 512))


def test_the_narrowest_type() -> None:
    for low, high, dtype in ((-127, 127, torch.int8), (-128, 0, torch.int16), (0, 32768, torch.int32)):
        assert frames.narrowest(torch.tensor([[low, high]], dtype=torch.int32)) == dtype
