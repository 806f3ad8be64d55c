from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectral_surgery.errors import CheckpointError, ConfigError, LimitError
from spectral_surgery.files import writer
from spectral_surgery.files.atomic import publishing
from spectral_surgery.files.index import INDEX_FILE, read_index
from spectral_surgery.files.reader import DTYPES, read_bytes, read_tensor
from spectral_surgery.files.writer import Entry, tensor_bytes, tensor_entry, write_checkpoint, write_file

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")


def mixed() -> dict[str, torch.Tensor]:
    """Every dtype with 2-D, 1-D of odd length, 0-D and empty tensors, in an order of no meaning."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for code in (*INTEGERS, *FLOATS, "C64", "F8_E8M0"):
        dtype = DTYPES[code]
        values = torch.randint(0, 2, (4, 3), generator=generator)
        values = values.to(dtype) if code != "F8_E8M0" else values.to(torch.uint8).view(dtype)
        tensors[f"z.{code}"] = values
        tensors[f"a.{code}"] = values[0].clone()
        tensors[f"scalar.{code}"] = values[0, 0].clone()
        tensors[f"empty.{code}"] = torch.empty(0, 7, dtype=dtype)
    return tensors


def entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [tensor_entry(name, tensor) for name, tensor in tensors.items()]


def zeros(name: str, nbytes: int) -> Entry:
    return Entry(name, "U8", (nbytes,), lambda: [bytes(nbytes)])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"é\n": '"\\\u2028'}])
def test_files_are_those_of_the_reference_writer(metadata: dict, tmp_path: Path) -> None:
    tensors = mixed() | {'né\n"\\\x01\x7f\u2028\U0001f600': torch.ones(3)}
    save_file(tensors, tmp_path / "reference", metadata)
    write_file(tmp_path / "ours", entries(tensors)[::-1], metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "reference").read_bytes()


@pytest.mark.parametrize("count", range(1, 20))
def test_headers_are_padded_as_by_the_reference_writer(count: int, tmp_path: Path) -> None:
    tensors = {"n" * count: torch.ones(1)}
    save_file(tensors, tmp_path / "reference")
    write_file(tmp_path / "ours", entries(tensors), metadata={})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "reference").read_bytes()


def test_an_empty_file_is_that_of_the_reference_writer(tmp_path: Path) -> None:
    save_file({}, tmp_path / "reference")
    write_file(tmp_path / "ours", [], metadata={})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "reference").read_bytes()


def test_round_trip_through_the_reference_and_our_reader(tmp_path: Path) -> None:
    tensors = mixed()
    (file,) = write_checkpoint(tmp_path, entries(tensors))
    assert file == tmp_path / "model.safetensors"
    index = read_index(tmp_path)
    assert list(index.tensors) == sorted(tensors)
    assert index.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert same_bits(read_tensor(index.tensors[name]), tensor)
    known = {name: tensor for name, tensor in tensors.items() if "E8M0" not in name}
    with safe_open(file, framework="pt") as reference:
        for name, tensor in known.items():
            assert same_bits(reference.get_tensor(name), tensor)


def test_tensors_are_aligned(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, entries(mixed()))
    for info in read_index(tmp_path).tensors.values():
        assert info.start % DTYPES[info.dtype].itemsize == 0


def test_layouts_in_memory_do_not_matter(tmp_path: Path) -> None:
    values = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    tensors = {"t": values.T, "strided": values[:, ::2], "expanded": values[:1].expand(3, 4)}
    write_checkpoint(tmp_path, entries(tensors))
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_packed_dtypes_are_copied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [Entry("x", "F4", (2, 3), lambda: [b"\x12\x34\x56"])])
    info = read_index(tmp_path).tensors["x"]
    assert (info.dtype, info.shape) == ("F4", (2, 3))
    assert read_bytes(info, 0, 3) == b"\x12\x34\x56"


def test_the_order_of_entries_does_not_matter_inside_a_file(tmp_path: Path) -> None:
    write_file(tmp_path / "a", entries(mixed()), metadata={"x": "1", "y": "2"})
    write_file(tmp_path / "b", entries(mixed())[::-1], metadata={"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


SIZES = ([6, 6, 2, 6, 2, 2], [10, 11, 3, 7, 1, 25, 10, 0], [11], [11, 11], [3, 11, 3], [5, 5, 0])


@pytest.mark.parametrize("sizes", SIZES)
def test_shards_are_those_of_huggingface_hub(sizes: list[int], tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    tensors = {f"t{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes)}
    split = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=10)
    files = write_checkpoint(tmp_path, entries(tensors), max_shard_size=10)
    assert {file.name: set(load_file(file)) for file in files} == {
        name: set(names) for name, names in split.filename_to_tensors.items()
    }
    assert (tmp_path / INDEX_FILE).exists() == (len(files) > 1)
    assert set(read_index(tmp_path).tensors) == set(tensors)


def test_the_index_of_shards(tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = write_checkpoint(tmp_path, [zeros("b", 6), zeros("a", 4), zeros("c", 1)], max_shard_size=10)
    assert files == [tmp_path / name for name in names]
    text = (tmp_path / INDEX_FILE).read_text()
    weight_map = {"a": names[0], "b": names[0], "c": names[1]}
    expected = {"metadata": {"total_size": 11}, "weight_map": weight_map}
    assert text == json.dumps(expected, indent=2) + "\n"
    assert {path.name for path in tmp_path.iterdir()} == {*names, INDEX_FILE}


@pytest.mark.parametrize("size", [0, -1])
def test_shards_have_a_size(size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"max_shard_size: {size} is not a size; expected 1 or more"):
        write_checkpoint(tmp_path, [zeros("a", 1)], max_shard_size=size)


def test_chunks_are_streamed_one_at_a_time(tmp_path: Path) -> None:
    piece, count = 1 << 20, 32

    def chunks() -> Iterator[bytearray]:
        for i in range(count):
            yield bytearray([i]) * piece

    tracemalloc.start()
    try:
        write_checkpoint(tmp_path, [Entry("x", "U8", (count, piece), chunks)])
        assert tracemalloc.get_traced_memory()[1] < 4 * piece
    finally:
        tracemalloc.stop()
    found = read_tensor(read_index(tmp_path).tensors["x"])
    assert torch.equal(found, torch.arange(count, dtype=torch.uint8)[:, None].expand(-1, piece))


def test_chunks_may_be_of_any_kind_and_size(tmp_path: Path) -> None:
    words = memoryview(torch.tensor([1, 2], dtype=torch.int16).numpy())
    chunks = [b"", b"\x00", bytearray(b"\x00\x00\x00"), words]
    write_checkpoint(tmp_path, [Entry("x", "I16", (4,), lambda: chunks)])
    assert read_tensor(read_index(tmp_path).tensors["x"]).tolist() == [0, 0, 1, 2]


def endless() -> Iterator[bytes]:
    while True:
        yield bytes(3)


@pytest.mark.parametrize(
    ("chunks", "came"),
    [(lambda: [], 0), (lambda: [bytes(7)], 7), (lambda: [bytes(8), b"x"], 9), (endless, 9)],
)
def test_chunks_that_disagree_with_the_size_are_refused(chunks: object, came: int, tmp_path: Path) -> None:
    message = rf"expected 8 bytes of 'x', F32 \(2,\), got {came}. The producer of its"
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path, [Entry("x", "F32", (2,), chunks)])


class ProducerError(Exception):
    """Raised while a tensor is being produced."""


def test_a_failing_producer_leaves_nothing_published(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield bytes(4)
        raise ProducerError

    todo = [zeros("a", 8), Entry("b", "U8", (8,), failing), zeros("c", 8)]
    with pytest.raises(ProducerError), publishing(tmp_path / "out", overwrite=False) as folder:
        write_checkpoint(folder, todo, max_shard_size=8)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "model.safetensors").symlink_to(full)
    message = "model.safetensors: expected room for the output, got a full disk. Free some"
    for size in (1, 1 << 20):  # at the flush, at the write
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(tmp_path, [zeros("a", size)])


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected.*got an error \(\[Errno 2\] No such file or directory: '"):
        write_checkpoint(tmp_path / "nowhere", [])


@pytest.mark.parametrize(("names", "bad"), [("aba", "'a'"), (["__metadata__"], "'__metadata__'")])
def test_names_that_repeat_or_are_reserved(names: list[str], bad: str, tmp_path: Path) -> None:
    message = f"names {bad} repeat or are reserved; expected different names other than __metadata__"
    todo = [zeros(name, 1) for name in names]
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path, todo, max_shard_size=1)
    with pytest.raises(CheckpointError, match=message):
        write_file(tmp_path / "x", todo)
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a name is not text \('utf-8' codec .*; expected valid Unic"):
        write_checkpoint(tmp_path, [zeros("\ud800", 1)])
    assert list(tmp_path.iterdir()) == []


def test_headers_no_reader_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "HEADER_LIMIT", 100)
    with pytest.raises(LimitError, match=r"the header would be 120 bytes; expected at most 100."):
        write_checkpoint(tmp_path, [zeros("a" * 30, 1)])


@pytest.mark.parametrize(("dtype", "shape"), [("F33", (8,)), ("F4", (3,)), ("F32", (-1, -2))])
def test_entries_no_file_can_hold(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=rf"x: {dtype} of shape \(.*\) cannot be stored; expected whole"):
        Entry("x", dtype, shape, lambda: [])


def test_dtypes_safetensors_does_not_have() -> None:
    with pytest.raises(CheckpointError, match=r"x: torch.complex128 cannot be stored; expected torch.bool, "):
        tensor_entry("x", torch.zeros(1, dtype=torch.complex128))
