"""Bytes that are elsewhere, behind the same functions as those of local files."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import read_header
from spectral_surgery.files.index import is_adapter, read_index
from spectral_surgery.files.reader import byte_pieces, flat_pieces, read_flat, read_tensor, same_bytes
from spectral_surgery.files.storage import PIECE, RemoteCheckpoint, pieces_of, read_into, size_of, version_of
from tests.support.checkpoints import llama_like, write_folder


@dataclass(frozen=True)
class Kept:
    """A remote file whose bytes are kept here, and what was asked of it."""

    name: str
    content: bytes = field(repr=False)
    asked: list[tuple[int, int]] = field(default_factory=list, compare=False)
    version: str = "1"

    @property
    def size(self) -> int:
        return len(self.content)

    def read_into(self, view: memoryview, start: int) -> None:
        self.asked.append((start, start + view.nbytes))
        if start + view.nbytes > self.size:
            raise CheckpointError(f"{self}: too short")
        view[:] = self.content[start : start + view.nbytes]

    def __str__(self) -> str:
        return f"org/name/{self.name}"


def remote_twin(folder: Path, empty: Path) -> RemoteCheckpoint:
    """The same checkpoint with its weights elsewhere; the other files lie in an empty folder."""
    empty.mkdir()
    weights, names = {}, []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix == ".safetensors":
            weights[empty / relative] = Kept(path.name, path.read_bytes())
        elif path.is_file():
            names.append(relative)
            (empty / relative).parent.mkdir(parents=True, exist_ok=True)
            (empty / relative).write_bytes(path.read_bytes())
    return RemoteCheckpoint(empty, weights, tuple(names), "org/name", "12ab")


@pytest.mark.parametrize("shards", [1, 3])
def test_an_index_is_the_same(tmp_path: Path, shards: int) -> None:
    folder = write_folder(tmp_path / "here", llama_like(), shards=shards)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, folder / "2_Dense" / "model.safetensors")
    here, there = read_index(folder), read_index(remote_twin(folder, tmp_path / "there"))
    assert list(there.tensors) == list(here.tensors)
    assert (there.config, there.metadata, there.skipped_files) == (here.config, here.metadata, here.skipped_files)
    assert there.other_files == here.other_files
    assert [file.name for file in there.files] == [file.name for file in here.files]
    for name, info in there.tensors.items():
        assert torch.equal(read_tensor(info), read_tensor(here.tensors[name]))
        assert same_bytes(info, here.tensors[name])
    # headers alone are read of each file, and then the tensors
    for file in there.files:
        assert isinstance(file, Kept)
        assert file.asked[0] == (0, min(file.size, 1 << 15))
    moved = pickle.loads(pickle.dumps(there.tensors))
    assert moved == there.tensors


def test_a_lone_file_and_a_missing_shard(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "here", llama_like(), shards=2)
    twin = remote_twin(folder, tmp_path / "there")
    path, file = next(iter(twin.weights.items()))
    lone = read_index(RemoteCheckpoint(path, {path: file}, (), "x", "1"))
    assert lone.config == {}
    assert lone.tensors == {name: info for name, info in read_index(twin).tensors.items() if info.file == file}
    with pytest.raises(CheckpointError, match=r"expected the 2 weight files that.*got 1 missing:"):
        read_index(replace(twin, weights={path: file}))
    assert not is_adapter(twin)


def test_an_adapter_elsewhere_is_one(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.ones(2)}, here / "adapter_model.safetensors")
    twin = remote_twin(here, tmp_path / "there")
    assert is_adapter(twin)
    with pytest.raises(CheckpointError, match=r"expected a model, got an adapter \('LORA'\) for a base model"):
        read_index(twin)


def test_a_header_longer_than_the_first_read(tmp_path: Path) -> None:
    save_file({"x": torch.arange(5)}, tmp_path / "a.safetensors", metadata={"note": "n" * 100_000})
    file = Kept("a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    header = read_header(file)
    assert read_tensor(header.tensors["x"]).tolist() == [0, 1, 2, 3, 4]
    assert [start for start, _ in file.asked[:2]] == [0, 0]  # what a server without ranges can give


def test_pieces_are_asked_for_in_growing_ranges(tmp_path: Path) -> None:
    data = torch.randint(0, 255, (5 * PIECE + 12345,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "x").write_bytes(data)
    file = Kept("x", data)
    for start, stop in ((0, len(data)), (17, 17), (17, 18), (PIECE - 3, 3 * PIECE + 5)):
        file.asked.clear()
        there, here = list(pieces_of(file, start, stop)), list(pieces_of(tmp_path / "x", start, stop))
        assert [bytes(piece) for piece in there] == [bytes(piece) for piece in here]
        assert b"".join(there) == data[start:stop]
        assert sum(b - a for a, b in file.asked) == stop - start
    file.asked.clear()
    assert bytes(next(iter(pieces_of(file, 0, len(data))))) == data[:PIECE]
    assert sum(b - a for a, b in file.asked) <= 3 * PIECE  # whoever stops early has moved little for nothing


def test_elements_piece_by_piece(tmp_path: Path) -> None:
    values = torch.randn(PIECE // 2 + 77, generator=torch.Generator().manual_seed(0))
    save_file({"x": values, "none": torch.zeros(0)}, tmp_path / "a.safetensors")
    index = read_index(tmp_path / "a.safetensors")
    assert torch.equal(torch.cat(list(flat_pieces(index.tensors["x"]))), values)
    assert list(flat_pieces(index.tensors["none"])) == list(byte_pieces(index.tensors["none"])) == []
    assert torch.equal(read_flat(index.tensors["x"], 5, 9), values[5:9])


def test_versions_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    file = Kept("x", b"abc")
    assert size_of(tmp_path / "x") == size_of(file) == 3
    assert version_of(file) == ("x", 3, "1")
    assert version_of(replace(file, version="2")) != version_of(file)
    assert version_of(tmp_path / "x")[:2] == ("x", 3)
    with pytest.raises(CheckpointError, match=r"expected a file.*got one that ends 2 bytes before what is wanted"):
        read_into(tmp_path / "x", memoryview(bytearray(4)), 1)
