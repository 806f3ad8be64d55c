"""Manifests and compressed folders that lie, are damaged or come from elsewhere."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError, FormatVersionError, LimitError, SpectralSurgeryError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.manifest import indented, read_manifest
from spectral_surgery.files.compressed.settings import CompressOptions
from tests.support.checkpoints import gaussian, write_folder

W = "model.w"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    write_folder(root / "source", {W: gaussian(700, 500), "norm": torch.ones(5)})
    compress(root / "source", root / "out", CompressOptions(Target("bits", 3.0)))
    return root / "out"


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "spectral_surgery.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def restore(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_manifest_round_trip(pristine: Path) -> None:
    manifest = read_manifest(pristine)
    assert manifest.to_json() == (pristine / "spectral_surgery.json").read_text()
    assert manifest.report.weights == 350_000


def set_at(*path: object, value: object) -> Callable[[dict[str, Any]], None]:
    def change(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


TENSOR = ("tensors", W)
PART = (*TENSOR, "parts", 0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (set_at("format_version", value=3), FormatVersionError, r"spectral_surgery\.json:.*got 3.*Upgrade"),
        (set_at("format_version", value=1), FormatVersionError, r"spectral_su.*got 1.*Compress the original again"),
        (set_at("format_version", value=None), FormatVersionError, r"spectral_surgery\.json: expected.*got None"),
        (set_at("quant_method", value="gptq"), CheckpointError, r"spectral_surgery\.json:.*got another one"),
        (set_at("tensors", value=[]), CheckpointError, "damaged"),
        (lambda body: body.pop("aliases"), CheckpointError, "damaged"),
        (set_at(*TENSOR, "shape", value=[1 << 40, 1 << 40]), LimitError, r"model\.w: expected.*got shape .* for"),
        (set_at(*TENSOR, "shape", value=[-700, -500]), CheckpointError, "is not a size"),
        (set_at(*TENSOR, "matrix", value=[700, 501]), LimitError, r"model\.w: expected the sizes.*got shape .* for"),
        (set_at(*TENSOR, "dtype", value="F31"), CheckpointError, r"model\.w: expected.*got F31, 64 and \(0, 1\)"),
        (set_at(*TENSOR, "tile", value=0), CheckpointError, r"model\.w: expected a.*got F32, 0 and \(0, 1\)"),
        (set_at(*TENSOR, "tile", value=10**9), CheckpointError, r"model\.w:.*got F32, 1000000000 and \(0, 1\)"),
        (set_at(*TENSOR, "axes", value=[0, 7]), CheckpointError, "axes"),
        (set_at(*TENSOR, "parts", value=[]), LimitError, r"model\.w: expected parts that cover 700.*got others"),
        (set_at(*PART, "rows", value=[0, 699]), LimitError, r"model\.w: expected parts that cover.*got others"),
        (set_at(*PART, "rows", value=[1, 700]), LimitError, r"model\.w: expected parts that cover.*got others"),
        (set_at(*PART, "rows_per_frame", value=0), CheckpointError, "rows_per_frame is 0"),
        (set_at(*PART, "rows_per_frame", value=1), CheckpointError, "expected what the manifest says"),
        (set_at(*PART, "transform", value="fft9"), SpectralSurgeryError, "transform: expected one of.*got 'fft9'"),
        (set_at(*PART, "crc32", value=1), CheckpointError, "expected part 0 with its checksum"),
        (set_at(*PART, "report", value={}), CheckpointError, "damaged"),
        (set_at("aliases", "head", value="nowhere"), CheckpointError, "got one without nowhere, to which it is tied"),
        (set_at("tensors", "ghost", value=None), CheckpointError, "damaged"),
    ],
)
def test_a_manifest_that_lies(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], error: type[Exception], text: str
) -> None:
    edit(folder, change)
    tracemalloc.start()
    with pytest.raises(error, match=text):
        decompress(folder, tmp_path / "plain")
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert not (tmp_path / "plain").exists()


def test_no_manifest_or_not_json(folder: Path) -> None:
    (folder / "spectral_surgery.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_compressed(folder)
    (folder / "spectral_surgery.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"cannot be read|not a manifest"):
        open_compressed(folder)
    (folder / "spectral_surgery.json").unlink()
    with pytest.raises(CheckpointError, match=r"out:.*got no spectral_surgery\.json.*Is it compressed at all"):
        open_compressed(folder)


def test_a_missing_spectrum(folder: Path) -> None:
    restore(folder, lambda tensors: tensors.pop(f"{W}.spectral_step"))
    with pytest.raises(CheckpointError, match=r"model\.w\.spectral.*got a tensor of the manifest that is in no file"):
        open_compressed(folder)


@pytest.mark.parametrize("value", [-1, 1 << 62, 0])
def test_frame_offsets_out_of_order(folder: Path, tmp_path: Path, value: int) -> None:
    restore(folder, lambda tensors: tensors[f"{W}.spectral_frames"].__setitem__(-1, value))
    with pytest.raises(LimitError, match="expected offsets in"):
        decompress(folder, tmp_path / "plain")


def test_steps_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    restore(folder, lambda tensors: tensors[f"{W}.spectral_step"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="expected finite steps"):
        decompress(folder, tmp_path / "plain")


@pytest.mark.parametrize("place", [0, 20, 5000, -1])
def test_a_flipped_byte_of_codes_is_found(folder: Path, tmp_path: Path, place: int) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{W}.spectral_codes"][place] ^= 1

    restore(folder, flip)
    with pytest.raises(CheckpointError, match="expected part 0 with its checksum"):
        decompress(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_text_is_that_of_the_json_module(value: object) -> None:
    assert indented(value) == json.dumps(value, sort_keys=True, indent=1)
