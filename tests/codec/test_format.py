"""docs/format.md is the format: its reader, of plain numpy, reads everything that the package writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spectral_surgery.codec import feedback_rate
from spectral_surgery.codec.frame_bytes import INTEGERS, LATTICE, decode_frame, encode_frame
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.errors import FormatVersionError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.manifest import check_version, parse_manifest
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.text.settings import TextData
from tests.support.checkpoints import gaussian, llama_like, write_folder
from tests.support.codes import Codes, integers, lattice_points
from tests.support.format_page import PAGE, page_reader, python_blocks

DTYPES = (np.int8, np.int16, np.int32)


def check(codes: Codes) -> bytes:
    """The package and the page read the frame of some codes."""
    frame = encode_frame(codes)
    back = decode_frame(frame, codes.shape)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)
    read = page_reader()(frame, *codes.shape)
    assert read.dtype == codes.dtype
    np.testing.assert_array_equal(read, codes)
    return frame


@given(
    seed=st.integers(0, 1 << 30),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 9)),
    spread=st.floats(-2, 24).map(math.exp2),
    dtype=st.sampled_from(DTYPES),
    far=st.integers(0, 3),
    points=st.booleans(),
)
def test_codes_of_every_scale(
    seed: int, shape: tuple[int, int], spread: float, dtype: Any, far: int, points: bool
) -> None:
    rng = np.random.default_rng(seed)
    codes = (lattice_points if points else integers)(rng, shape, spread, dtype)
    limit = np.iinfo(dtype).max // 4
    for place in rng.integers(0, shape[0], far):  # what is the same modulo four is still a point of the lattice
        codes[place, 0] = codes[place, 0] % 4 + 4 * int(rng.integers(-limit, limit))
    check(codes)


@given(arrays.arrays(st.sampled_from(DTYPES), st.tuples(st.integers(0, 40), st.integers(0, 5))))
def test_any_codes(codes: Codes) -> None:
    check(codes)


@pytest.mark.parametrize("height", range(1, 33))
def test_every_height_of_a_block(height: int) -> None:
    rng = np.random.default_rng(height)
    check(lattice_points(rng, (height, 40), 2))  # of up to three rows all integers are points
    frame = check(lattice_points(rng, (32 + height, 40), 2))
    assert frame[0] == LATTICE


@pytest.mark.parametrize(("shape", "lanes"), [((64, 40), 1), ((129, 41), 4), ((129, 231), 16), ((601, 331), 64)])
@pytest.mark.parametrize("make", [integers, lattice_points])
def test_every_number_of_lanes(shape: tuple[int, int], lanes: int, make: Any) -> None:
    frame = check(make(np.random.default_rng(0), shape, 3, np.int8))
    assert frame[3] == lanes + 128
    assert int.from_bytes(frame[4:8], "little") > 0


def test_every_part_of_a_frame() -> None:
    """Low bits with a list, and without either; in every kind."""
    rng = np.random.default_rng(0)
    for make, kind in ((integers, INTEGERS), (lattice_points, LATTICE)):
        for spread, low in ((2, False), (3000, True)):
            codes = make(rng, (64, 60), spread)
            codes[::13, ::17] = codes[::13, ::17] % 4 + (1 << 28)
            if make is lattice_points:
                codes[0] += 2 * ((codes[:32] >> 1).sum(0) & 1)
                codes[32] += 2 * ((codes[32:] >> 1).sum(0) & 1)
            frame = check(codes)
            assert frame[0] == kind
            assert (frame[2] > 0) == low
            assert int.from_bytes(frame[8:12], "little") > 0


WHOLE = [
    CompressOptions(Target("bits", 4.0)),
    CompressOptions(Target("max_error", 1e-4), tile=20),
    CompressOptions(Target("bits", 3.0), quantizer="scalar"),
    CompressOptions(Target("max_error", 0.01)),
    CompressOptions(Target("max_error", 0.1), quantizer="scalar", tile=96),
    CompressOptions(Target("density", 0.2)),
    CompressOptions(Target("bits", 2.0), transform="auto"),
]


@pytest.mark.parametrize("options", WHOLE, ids=lambda o: f"{o.target.kind}-{o.quantizer}-{o.transform}-{o.tile}")
def test_whole_checkpoints(options: CompressOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model-4bit"
    compress(write_folder(tmp_path / "source", llama_like(torch.float32)), folder, options)
    axes = {record.axes for record in open_compressed(folder).manifest.tensors.values()}
    assert axes == {(0, 1), (1,)}, "an embedding is transformed along its columns"
    check_checkpoint(folder, monkeypatch)


def test_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = llama_like(torch.float32)
    after = {n: t + 0.01 * gaussian(*t.shape, seed=9) if t.dim() > 1 else t for n, t in before.items()}
    base, tuned = write_folder(tmp_path / "base", before), write_folder(tmp_path / "tuned", after)
    compress(tuned, tmp_path / "model-4bit", CompressOptions(Target("bits", 3.0)), base=base)
    check_checkpoint(tmp_path / "model-4bit", monkeypatch)


def test_what_is_coded_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        **llama_like(torch.float32),
        "exact.bf16": gaussian(40, 61, seed=5, dtype=torch.bfloat16),
        "exact.f16": gaussian(40, 61, seed=6, dtype=torch.float16),
        "exact.f32": gaussian(40, 61, seed=7),
        "exact.f8": (100 * gaussian(80, 61, seed=8)).to(torch.float8_e4m3fn),
        "exact.i64": torch.arange(700),
    }
    source = write_folder(tmp_path / "source", tensors)
    compress(source, tmp_path / "model-4bit", CompressOptions(Target("bits", 4.0), exclude=("exact*",)))
    names = check_checkpoint(tmp_path / "model-4bit", monkeypatch)
    assert names["exact"].keys() == {name for name in tensors if name.startswith("exact")}
    for name, found in names["exact"].items():
        expected = tensors[name].view(torch.uint8).numpy().reshape(-1).view(found.dtype)
        np.testing.assert_array_equal(found.reshape(-1), expected)


@pytest.mark.slow
def test_steps_of_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tests.commands.test_calibrate import save_model, write_text

    monkeypatch.setattr(feedback_rate, "COLUMN_STEP_BITS", 0)  # always worth it: matrices are small here
    source, text = save_model("llama", tmp_path / "model"), write_text(tmp_path / "text.txt")
    options = CompressOptions(Target("bits", 3.0), include=("*layers*",))
    compress(source, tmp_path / "model-4bit", options, calibrate=TextData(text, 64, 16))
    steps = check_checkpoint(tmp_path / "model-4bit", monkeypatch)["steps"]
    assert steps.shape[1] > 2


def check_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The page reads the codes of every frame, and the weights of the first tensor. Returns the names of the page."""
    checkpoint = open_compressed(folder, differences=True)
    for name, record in checkpoint.manifest.tensors.items():
        for number in range(len(record.parts)):
            part = checkpoint.part(name, number)
            for frame, data in enumerate(part.frames):
                codes = part.codes(frame).numpy()
                np.testing.assert_array_equal(page_reader()(bytes(data), *codes.shape), codes)
    names: dict[str, Any] = {}
    first = next(iter(checkpoint.manifest.tensors))
    if all(part.transform == "dct" for part in checkpoint.manifest.tensors[first].parts):  # what the page has
        monkeypatch.chdir(folder.parent)
        for block in python_blocks():
            exec(compile(block, str(PAGE), "exec"), names)
        dense = torch.cat([checkpoint.part(first, part).to_dense() for part in range(len(names["parts"]))]).numpy()
        written = dense.reshape(names["record"]["shape"])
        np.testing.assert_allclose(names["weights"], written, rtol=1e-4, atol=1e-6 * np.abs(written).max())
    return names


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (1, r"expected format version 2, got 1\. Compress the original again\."),
        (3, r"expected format version 2, got 3\. Upgrade spectral-surgery to read newer files\."),
        (None, r"expected format version 2, got None\. Upgrade"),
        ("1", r"expected format version 2, got '1'\. Upgrade"),
    ],
)
def test_other_versions_are_refused(version: object, advice: str) -> None:
    with pytest.raises(FormatVersionError, match=rf"^spectral_surgery\.json: {advice}"):
        parse_manifest({"quant_method": "spectral_surgery", "format_version": version})
    with pytest.raises(FormatVersionError, match=rf"^config\.json: {advice}"):
        check_version(version, "config.json")
