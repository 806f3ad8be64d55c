from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files import reader
from spectral_surgery.files.header import TensorInfo, read_header
from spectral_surgery.files.reader import CODES, DTYPES, read_bytes, read_flat, read_tensor, read_together


def noise(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern may occur, so NaN too; booleans are 0 or 1."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).bool()
    sizes = (*shape[:-1], shape[-1] * dtype.itemsize)
    data = torch.randint(0, 256, sizes, generator=torch.Generator().manual_seed(0))
    return data.to(torch.uint8).view(dtype)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.fixture
def info(tmp_path: Path) -> TensorInfo:
    values = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    save_file({"w": torch.ones(3), "x": values}, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors").tensors["x"]


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_reads_bit_for_bit(code: str, tmp_path: Path) -> None:
    dtype = DTYPES[code]
    values = noise(dtype, 5, 6)
    header = {"x": {"dtype": code, "shape": [5, 6], "data_offsets": [0, values.nbytes]}}
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(bits(values)))
    found = read_tensor(read_header(tmp_path / "x").tensors["x"])
    assert (found.dtype, found.shape) == (dtype, (5, 6))
    assert bits(found) == bits(values)
    assert CODES[dtype] == code


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "none": torch.zeros(2, 0)}
    save_file(tensors, tmp_path / "x")
    found = {name: read_tensor(info) for name, info in read_header(tmp_path / "x").tensors.items()}
    assert found["scalar"].shape == ()
    assert found["scalar"] == 2.5
    assert found["empty"].shape == (0, 3)
    assert found["none"].shape == (2, 0)
    assert found["none"].dtype == torch.float32


def test_ranges(info: TensorInfo) -> None:
    assert read_flat(info, 0, 12).tolist() == list(range(12))
    assert read_flat(info, 4, 7).tolist() == [4, 5, 6]
    assert read_flat(info, 12, 12).tolist() == []
    assert read_bytes(info, 2, 5) == bytearray([1, 0, 2])
    assert isinstance(read_bytes(info, 0, 0), bytearray)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 25), (25, 25)])
def test_ranges_outside_of_the_tensor_are_refused(start: int, stop: int, info: TensorInfo) -> None:
    message = f"bytes {start} to {stop} of 'x' asked for; expected 0 to 24. Check the range."
    with pytest.raises(CheckpointError, match=message):
        read_bytes(info, start, stop)


def test_elements_outside_of_the_tensor_are_refused(info: TensorInfo) -> None:
    with pytest.raises(CheckpointError, match="bytes 0 to 26 of 'x' asked for"):
        read_flat(info, 0, 13)


def test_a_file_that_shrank_is_refused(info: TensorInfo) -> None:
    content = info.file.read_bytes()
    info.file.write_bytes(content[:-5])
    assert read_flat(info, 0, 2).tolist() == [0, 1]
    with pytest.raises(CheckpointError, match=r"expected a file.*got one that ends 5 bytes before what is wanted"):
        read_tensor(info)


def test_a_file_that_vanished_is_refused(info: TensorInfo) -> None:
    info.file.unlink()
    with pytest.raises(CheckpointError, match=r"expected a readable file, got an error \(No such file or directory\)"):
        read_tensor(info)


def test_packed_dtypes_are_read_as_bytes_only(info: TensorInfo) -> None:
    packed = replace(info, dtype="F4", shape=(48,))
    assert len(read_bytes(packed, 0, packed.nbytes)) == 24
    with pytest.raises(CheckpointError, match=r"'x' is F4, several elements to a byte; expected BOOL, U8, .*"):
        read_tensor(packed)


def test_tensors_have_memory_of_their_own(info: TensorInfo) -> None:
    found = read_tensor(info)
    found[0, 0] = 99
    assert read_tensor(info)[0, 0] == 0
    info.file.write_bytes(bytes(info.file.stat().st_size))
    assert found[2, 3] == 11


def test_a_range_costs_its_own_size(tmp_path: Path) -> None:
    size = 10**11
    header = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (tmp_path / "x").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(stream.tell() + size)  # sparse
    info = read_header(tmp_path / "x").tensors["x"]
    tracemalloc.start()
    try:
        assert len(read_flat(info, size - 10**6, size)) == 10**6
        assert tracemalloc.get_traced_memory()[1] < 1.2 * 10**6
    finally:
        tracemalloc.stop()


def test_small_tensors_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one read where they lie side by side, and another one behind a gap or when it would be large."""
    infos = []
    for file in ("a", "b"):
        save_file({f"{file}{n:02d}": noise(torch.int64, 3 + n) for n in range(12)}, tmp_path / f"{file}.safetensors")
        infos += list(read_header(tmp_path / f"{file}.safetensors").tensors.values())
    wanted = [info for info in reversed(infos) if info.name not in ("a05", "b00")]
    reads: list[int] = []
    real = reader.read_into
    monkeypatch.setattr(reader, "read_into", lambda *args: (reads.append(args[1].nbytes), real(*args)))
    for limit, count in ((1 << 22, 3), (200, 10)):
        monkeypatch.setattr(reader, "_TOGETHER", limit)
        reads.clear()
        found = dict(read_together(wanted))
        assert len(reads) == count
        assert found.keys() == set(wanted)
        assert all(bytes(data) == bytes(read_bytes(info, 0, info.nbytes)) for info, data in found.items())
    assert list(read_together([])) == []
