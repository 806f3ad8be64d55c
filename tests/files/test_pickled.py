"""PyTorch's files: the same tensors as torch.load gives, read by ranges; what could run code is refused."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.pickled import find_pickled, holds_pickled
from spectral_surgery.files.reader import read_flat, read_tensor
from tests.support.checkpoints import contents, llama_like, write_folder


class Runs:
    """A pickle of it would run a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def tensors() -> dict[str, Tensor]:
    base = torch.randn(6, 10)
    made = {
        "plain": torch.randn(5, 7),
        "half": torch.randn(3, 4).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "view": base[2:4],
        "transposed": base.t(),
        "columns": base[:, 1:7:2],
        "integers": torch.arange(12).reshape(3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    return made | {"tied": made["plain"]}


def test_tensors_are_those_of_torch(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    expected = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    index = read_index(find_pickled(tmp_path))
    assert list(index.tensors) == sorted(expected)
    for name, info in index.tensors.items():
        value = expected[name].detach()
        found = read_tensor(info)
        assert found.dtype == value.dtype
        assert torch.equal(found, value), name
        flat = value.reshape(-1)
        assert torch.equal(read_flat(info, len(flat) // 3, len(flat)), flat[len(flat) // 3 :])


def test_a_folder_of_shards_compresses_to_the_bytes_of_safetensors(tmp_path: Path) -> None:
    weights = llama_like()
    plain = write_folder(tmp_path / "plain", weights)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    names = list(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, pickled / file)
        weight_map |= dict.fromkeys(part, file)
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file in plain.glob("*.json"):
        (pickled / file.name).write_bytes(file.read_bytes())
    assert holds_pickled(pickled)
    options = CompressOptions(Target("bits", 3.0))
    compress(plain, tmp_path / "a", options)
    compress(find_pickled(pickled), tmp_path / "b", options)
    one, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    for files in (one, other):
        files.pop("README.md")  # names the source
    assert one == other


def test_what_could_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Runs(ran)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only=True") as caught:
        find_pickled(tmp_path)
    assert "\n" not in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.ones(2)}}, "holds 'dict'; expected tensors by name"),
        ([torch.ones(2)], "expected tensors by name"),
        (collections.OrderedDict(a=torch.ones(2), epoch=3), "holds 'int'"),
    ],
)
def test_anything_but_tensors_by_name(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        find_pickled(tmp_path)


def test_damaged_and_old_files(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), file)
    whole = file.read_bytes()
    old = tmp_path / "old.bin"
    torch.save(tensors(), old, _use_new_zipfile_serialization=False)
    for content in (b"", whole[: len(whole) // 2], whole[:-30], old.read_bytes(), b"no pickle at all"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin: ") as caught:
            find_pickled(tmp_path)
        assert "\n" not in str(caught.value)


def test_missing_shards_and_folders_without(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no pytorch_model\.bin"):
        find_pickled(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    with pytest.raises(CheckpointError, match=r"'x\.bin' of the files"):
        find_pickled(tmp_path)
