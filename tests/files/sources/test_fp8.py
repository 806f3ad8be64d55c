from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.reader import read_bytes, read_flat, read_tensor
from tests.files.test_storage import Kept, remote_twin
from tests.support.quantised import FP8_SETTINGS, fp8, plain, write

NAME = "model.layers.0.mlp.up_proj.weight"
BLOCKS = ((128, 128), (16, 32), (1, 128), (128, 1))
SHAPES = ((256, 128), (200, 100), (130, 257), (1, 5))


def source(folder: Path, tensors: dict[str, Tensor], **settings: object) -> CheckpointIndex:
    return read_index(write(folder, tensors, FP8_SETTINGS | settings))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_read_as_the_numbers_they_stand_for(
    shape: tuple[int, int], block: tuple[int, int], tmp_path: Path
) -> None:
    values, scales = fp8(torch.randn(shape), block)
    index = source(tmp_path, {NAME: values, f"{NAME}_scale_inv": scales}, weight_block_size=list(block))
    info = index.tensors[NAME]
    assert list(index.tensors) == [NAME]
    assert (info.dtype, info.shape, info.nbytes) == ("BF16", shape, 2 * math.prod(shape))
    assert index.nbytes == values.nbytes + scales.nbytes
    expected = plain(values, scales, block)
    assert torch.equal(read_tensor(info), expected)
    again = pickle.loads(pickle.dumps(info))  # workers are given it
    count = expected.numel()
    for start, stop in ((0, 1), (shape[1], count), (3, min(shape[1] + 2, count)), (count - 1, count - 1)):
        assert torch.equal(read_flat(again, start, stop), expected.reshape(-1)[start:stop])
    whole = expected.view(torch.uint8).reshape(-1)
    assert list(read_bytes(info, 3, 9)) == whole[3:9].tolist()


@pytest.mark.parametrize(
    ("scales", "settings"),
    [
        (lambda t: t.abs().max().reshape(()), None),
        (lambda t: t.abs().max().reshape(1), None),
        (lambda t: t.abs().amax(1), None),
        (lambda t: t.abs().amax(1, keepdim=True), None),
        (lambda t: t.abs().max().reshape(1, 1), [128, 128]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_scale_for_a_matrix_or_for_a_row(
    scales: Callable[[Tensor], Tensor], settings: list[int] | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = torch.randn(60, 70)
    found = (scales(weight) / 448).to(dtype)
    values = (weight / found.float().reshape(-1, 1)).to(torch.float8_e4m3fn)
    tensors = {NAME: values, f"{NAME}_scale": found, f"{NAME[:-7]}.input_scale": torch.ones(1)}
    index = source(tmp_path, tensors, weight_block_size=settings)
    assert list(index.tensors) == [NAME]
    assert torch.equal(read_tensor(index.tensors[NAME]), (values.float() * found.float().reshape(-1, 1)).bfloat16())


def test_stacked_experts_have_blocks_of_their_own(tmp_path: Path) -> None:
    made = [fp8(torch.randn(40, 50) * (1 + e), (16, 16)) for e in range(3)]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: torch.stack([v for v, _ in made]), f"{name}_scale_inv": torch.stack([s for _, s in made])}
    info = source(tmp_path, tensors, weight_block_size=[16, 16]).tensors[name]
    expected = torch.stack([plain(v, s, (16, 16)) for v, s in made])
    assert torch.equal(read_tensor(info), expected)
    assert torch.equal(read_flat(info, 30 * 50, 90 * 50), expected.reshape(-1)[30 * 50 : 90 * 50])


def test_exponents_as_bytes(tmp_path: Path) -> None:
    values = torch.randn(32, 64).to(torch.float8_e4m3fn)
    powers = torch.randint(118, 130, (32, 2), dtype=torch.uint8)
    tensors = {NAME: values, f"{NAME}_scale_inv": powers}
    info = source(tmp_path, tensors, weight_block_size=[1, 32], scale_fmt="ue8m0").tensors[NAME]
    expected = plain(values, torch.exp2(powers.float() - 127), (1, 32))
    assert torch.equal(read_tensor(info), expected)


def test_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    values, scales = fp8(torch.randn(256, 384), (128, 128))
    info = source(tmp_path, {NAME: values, f"{NAME}_scale_inv": scales}).tensors[NAME]
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
    assert torch.equal(read_tensor(info), expected)


def test_a_lone_file_has_no_configuration_to_ask(tmp_path: Path) -> None:
    values, scales = fp8(torch.randn(130, 257), (128, 128))
    save_file({NAME: values, f"{NAME}_scale_inv": scales}, tmp_path / "some.safetensors")
    index = read_index(tmp_path / "some.safetensors")
    assert torch.equal(read_tensor(index.tensors[NAME]), plain(values, scales, (128, 128)))


def test_what_is_not_quantised_stays_and_the_configuration_is_plain(tmp_path: Path) -> None:
    values, scales = fp8(torch.randn(128, 128), (128, 128))
    norm = torch.randn(128).bfloat16()
    folder = write(tmp_path, {NAME: values, f"{NAME}_scale_inv": scales, "model.norm.weight": norm}, FP8_SETTINGS)
    index = read_index(folder)
    assert index.why_not_plain is None
    assert "quantization_config" not in index.config
    assert index.tensors["model.norm.weight"].decoder is None
    assert torch.equal(read_tensor(index.tensors["model.norm.weight"]), norm)
    assert any("fp8" in note for note in index.notes)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NAME: torch.zeros(4, 4).to(torch.float8_e4m3fn)}, "has no scales; expected .*_scale_inv"),
        (
            {NAME: torch.zeros(300, 4).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.ones(2, 1)},
            r"has the shape \[2, 1\] for a weight of \[300, 4\]; expected \[3, 1\]",
        ),
        ({NAME: torch.zeros(4, 4, dtype=torch.int8), f"{NAME}_scale_inv": torch.ones(1, 1)}, "expected an FP8 weight"),
    ],
)
def test_scales_that_are_missing_or_do_not_fit(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        source(tmp_path, tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    values, scales = fp8(torch.randn(256, 128), (128, 128))
    scales[1, 0] = bad
    info = source(tmp_path, {NAME: values, f"{NAME}_scale_inv": scales}).tensors[NAME]
    read_flat(info, 0, 128 * 128)
    with pytest.raises(CheckpointError, match="NaN or infinite scales"):
        read_flat(info, 128 * 128, 129 * 128)


@pytest.mark.parametrize("block", [[128], "128", [0, 128], [128.0, 128]])
def test_impossible_blocks(block: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weight_block_size"):
        source(tmp_path, {NAME: torch.zeros(4, 4)}, weight_block_size=block)


def test_blocks_that_are_elsewhere_are_read_by_ranges(tmp_path: Path) -> None:
    """As on the Hub: of a range of rows, no more than those and their scales are moved."""
    values, scales = fp8(torch.randn(1024, 256), (128, 128))
    here = write(tmp_path / "here", {NAME: values, f"{NAME}_scale_inv": scales}, FP8_SETTINGS)
    twin = read_index(remote_twin(here, tmp_path / "there"))
    info = twin.tensors[NAME]
    (file,) = twin.files
    assert isinstance(file, Kept)
    file.asked.clear()
    expected = read_tensor(read_index(here).tensors[NAME])
    assert torch.equal(read_flat(info, 300 * 256, 500 * 256), expected[300:500].reshape(-1))
    moved = sum(stop - start for start, stop in file.asked)
    assert moved == 200 * 256 + 2 * 2 * 4  # rows 300 to 499 lie in two rows of blocks
