"""Whoever stores codes stores the same bytes for them, and has checked that they decode."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import Tensor

from spectral_surgery.codec import encoded as codec
from spectral_surgery.codec import frames
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum
from spectral_surgery.codec.feedback import Codes, encode_codes, feedback_factor, stored_codes
from spectral_surgery.codec.feedback_rate import codes_at
from spectral_surgery.codec.frame_bytes import encode_frame
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.heal.whole_model import HealSession
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.parts import read_part
from spectral_surgery.files.compressed.plan import make_plan
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.compressed.units import UnitStore, leave_codes
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.matmul.code_blocks import as_encoded
from spectral_surgery.text.settings import TextData
from tests.support.checkpoints import write_folder

BASIS = Basis("identity", 64, ())
OPTIONS = CompressOptions(Target("bits", 4.0), transform="identity", tile=64)


def by_encode(values: Tensor, folder: Path) -> EncodedSpectrum:
    """Codes of its own choice, of these values."""
    del folder
    return encode(values.float(), Target("density", 1.0), BASIS)[0]


def by_feedback(values: Tensor, folder: Path) -> EncodedSpectrum:
    del folder
    return encode_codes(values.float(), Codes(values, 1.0), BASIS)[0]


def by_live_model(values: Tensor, folder: Path) -> EncodedSpectrum:
    del folder
    return as_encoded(spectrum_of(values))


def by_calibration(values: Tensor, folder: Path) -> EncodedSpectrum:
    """Codes that text has chosen become a unit of the compression."""
    plan = make_plan(read_index(source_of(values, folder)), OPTIONS)
    leave_codes(UnitStore(folder, "key"), plan, plan.tensors[0], values.float(), Codes(values, 1.0))
    (unit,) = plan.units
    return part_in(UnitStore(folder, "key").path(unit), values)


def by_heal(values: Tensor, folder: Path) -> EncodedSpectrum:
    source = source_of(values, folder)
    compress(source, folder / "out", OPTIONS)
    checkpoint = open_compressed(folder / "out")
    session = HealSession(
        checkpoint,
        read_index(source),
        source,
        TextData(source),
        "cpu",
        folder,
        "key",
        1,
        perf_counter,
        lambda *_: None,
        0.0,
    )
    (file,) = session.leave("layer.weight", [spectrum_of(values)], values.float())
    return part_in(file, values)


def spectrum_of(values: Tensor) -> QuantizedSpectrum:
    return QuantizedSpectrum(values, torch.ones(1), 0.0, BASIS.transform, BASIS.tile, BASIS.axes)


def source_of(values: Tensor, folder: Path) -> Path:
    return write_folder(folder / "source", {"layer.weight": values.float()})


def part_in(file: Path, values: Tensor) -> EncodedSpectrum:
    tensors, record = read_part(file, "key") or ({}, None)
    assert record is not None
    data, ends = (read_tensor(tensors[name]) for name in ("codes", "frames"))
    frames = tuple(data[start:stop].numpy().tobytes() for start, stop in pairwise(ends.tolist()))
    return EncodedSpectrum(frames, tuple(values.shape), record.rows_per_frame, torch.ones(1), 0.0, BASIS)


PRODUCERS = [by_encode, by_feedback, by_live_model, by_calibration, by_heal]
Producer = Callable[[Tensor, Path], EncodedSpectrum]


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "FRAME_SIZE", 64 * 512)


@pytest.mark.parametrize("produce", PRODUCERS)
@pytest.mark.parametrize("scales", [(300.0, 0.3, 3.0, 300.0, 0.3), (0.0, 1.0, 0.0), (0.0, 0.0)])
def test_every_frame_is_as_if_alone(produce: Producer, scales: tuple[float, ...], tmp_path: Path) -> None:
    """Also next to frames of other scales, and of zeros."""
    noise = torch.randn(len(scales) * 64, 512, generator=torch.Generator().manual_seed(0))
    values = (noise * torch.tensor(scales).repeat_interleave(64)[:, None]).round().to(torch.int32)
    encoded = produce(values, tmp_path)
    assert len(encoded.frames) == len(scales)
    for number, frame in enumerate(encoded.frames):
        codes = encoded.codes(number)
        assert codes.dtype == frames.narrowest(codes)
        assert frame == encode_frame(codes.numpy())
        if produce is not by_encode:
            assert torch.equal(codes.int(), values[64 * number : 64 * number + 64])


@pytest.mark.parametrize("produce", PRODUCERS)
def test_a_coder_that_is_wrong_is_noticed(produce: Producer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(frames, "encode_frame", lambda codes: encode_frame(codes[::-1].copy()))
    with pytest.raises(CheckpointError, match="does not decode to what was encoded"):
        produce(torch.arange(64 * 512, dtype=torch.int32).reshape(64, 512), tmp_path)


def test_what_is_only_measured_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for a rate tries many steps; only the codes that it settles on are stored, and then verified."""
    generator = torch.Generator().manual_seed(0)
    weight, moment = torch.randn(128, 512, generator=generator), torch.eye(512)
    factor = feedback_factor(moment, BASIS)
    wanted = codes_at(weight, factor, 2.0, BASIS)
    assert stored_codes(wanted, BASIS, verify=False).frames == stored_codes(wanted, BASIS).frames

    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(frames, "decode_frame", refuse)
    assert torch.equal(codes_at(weight, factor, 2.0, BASIS).values, wanted.values)
    with pytest.raises(AssertionError, match="decoded"):
        stored_codes(wanted, BASIS)


def test_the_narrowest_type() -> None:
    for low, high, dtype in ((-127, 127, torch.int8), (-128, 0, torch.int16), (0, 32768, torch.int32)):
        assert frames.narrowest(torch.tensor([[low, high]], dtype=torch.int32)) == dtype
