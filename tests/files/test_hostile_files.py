"""Every defect of a checkpoint file is one clear CheckpointError, in bounded memory and time."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from spectral_surgery.errors import CheckpointError, LimitError
from spectral_surgery.files.header import HEADER_LIMIT, read_header
from spectral_surgery.files.index import INDEX_FILE, read_index

MEBIBYTE = 1 << 20


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: object, data: int = 4, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    return claimed.to_bytes(8, "little") + text + bytes(data)


@contextmanager
def little_memory(limit: int = MEBIBYTE) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
DEFECTS = {
    "empty file": (b"", "expected a safetensors file, of 8 bytes at least, got 0 bytes"),
    "short file": (b"\x01\x02\x03", "expected a safetensors file, of 8 bytes at least, got 3 bytes"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "got a Git LFS pointer.* `git lfs pull`"),
    "torch.save": (b"PK\x03\x04" + bytes(60), r"expected safetensors, got a zip archive, as torch\.save writes"),
    "gguf": (b"GGUF" + bytes(60), "expected safetensors, got a GGUF file"),
    "text": (b"<!DOCTYPE html><html>", "expected a safetensors file with a.*got one that claims 5789751444030890300"),
    "header over the cap": (raw({}, length=HEADER_LIMIT + 1), "expected a.*got one that claims 100000001"),
    "header of 10 GB": (raw({}, length=10**10), "expected a safetensors file with a.*got one that claims 10000000000"),
    "header of 2**64": (raw({}, length=2**64 - 1), "expected a.*got one that claims 18446744073709551615"),
    "header over the file": (raw({}, length=99), "expected a whole file, got 14 bytes where the header alone has 99"),
    "no json object": (raw(b"[1, 2]  "), r"expected a safetensors file, got a header that begins with b'\[1, 2\]  '"),
    "leading space": (raw(b" {}", 0), r"expected a safetensors file, got a header that begins with b' \{\}'"),
    "empty header": (raw(b""), "expected a safetensors file, got a header that begins with b''"),
    "json cut short": (raw(b'{"a": '), "the header: expected JSON, got an error"),
    "json with a tail": (raw(b'{"a": {}} {}'), "the header: expected JSON, got an error .Extra data"),
    "bad utf-8": (raw(b'{"\xff": {}}'), "the header: expected JSON, got an error .'utf-8' codec"),
    "utf-16": (raw("{}".encode("utf-16")), r"expected.*got a header that begins with b'\\xff\\xfe\{\\x00\}\\x00'"),
    "deep nesting": (raw(b'{"a":' + b"[" * 200_000), "expected JSON, got an error .*recursion"),
    "long integer": (raw(b'{"a":' + b"9" * 5000 + b"}"), "expected JSON, got an error .*digits"),
    "repeated tensor": (raw(f"{{{ONE},{ONE}}}".encode()), "key 'a' appears 2 times"),
    "repeated field": (raw(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "key 'dtype' appears 2 times"),
    "metadata list": (raw({"__metadata__": [1]}), r"expected text by key as __metadata__, got \[1\]"),
    "metadata number": (raw({"__metadata__": {"a": 1}}), r"expected text by key as __metadata__, got \{'a': 1\}"),
    "surrogate": (raw(rf'{{"\ud800":{ONE[4:]}}}'.encode()), r"tensor.*got a name with half a surrogate pair"),
    "no entry": (raw({"a": 7}), "tensor 'a': expected dtype, shape and data_offsets, got 7"),
    "missing field": (raw({"a": {"dtype": "F32", "shape": [1]}}), r"tensor.*got \{'dtype': 'F32', 'shape': \[1\]\}"),
    "extra field": (raw({"a": {**tensor(), "x": 1}}), r"tensor.*got \{'data_offsets': \[0, 4\], 'dtype': 'F32'"),
    "unknown dtype": (raw({"a": tensor("F33")}), "tensor 'a': expected dtype BOOL, F4,.*got 'F33'"),
    "dtype list": (raw({"a": tensor(["F32"])}), r"tensor 'a': expected dtype BOOL, F4,.*got \['F32'\]"),
    "negative size": (raw({"a": tensor(shape=[-1])}), r"tensor 'a': expected a shape of up to.*got \[-1\]"),
    "fractional size": (raw({"a": tensor(shape=[1.0])}), r"tensor 'a': expected a shape of up to.*got \[1\.0\]"),
    "boolean size": (raw({"a": tensor(shape=[True])}), r"tensor 'a': expected a shape of up to.*got \[True\]"),
    "shape number": (raw({"a": tensor(shape=1)}), r"tensor 'a': expected a shape of up to 64 sizes with a.*got 1"),
    "shape of 65": (raw({"a": tensor(shape=[1] * 65)}), r"tensor 'a': expected a.*got \[1, 1, 1, 1, 1, 1, \.\.\.\]"),
    "size of 2**63": (raw({"a": tensor(shape=[2**63])}), r"tensor 'a': expected a.*got \[9223372036854775808\]"),
    "overflow": (raw({"a": tensor(shape=[2**40, 2**40])}), r"product below 2\*\*63"),
    "overflow of zero": (raw({"a": tensor(shape=[2**62, 2**62, 0])}, 0), r"product below 2\*\*63"),
    "three offsets": (raw({"a": tensor(offsets=[0, 2, 4])}), r"tensor 'a': expected data_offsets.*got \[0, 2, 4\]"),
    "offsets backward": (raw({"a": tensor(offsets=[4, 0])}), r"tensor 'a': expected data_offsets.*got \[4, 0\]"),
    "negative offset": (raw({"a": tensor(offsets=[-4, 0])}), r"tensor 'a': expected data_offsets.*got \[-4, 0\]"),
    "terabytes": (raw({"a": tensor("U8", [10**13], [0, 10**13])}), "got an end at 10000000000094; it seems truncated"),
    "data cut short": (raw({"a": tensor()}, data=3), "tensor 'a': expected.*got an end at 73; it seems truncated"),
    "size mismatch": (raw({"a": tensor(shape=[2])}), r"tensor 'a': expected 8 bytes for F32 of shape \[2\], got 4"),
    "half a byte": (raw({"a": tensor("F4", [7])}), r"tensor 'a': expected 3\.5 bytes for F4 of shape \[7\], got 4"),
    "hole": (raw({"a": tensor(offsets=[2, 6])}, 6), "expected one.*got 'a', which leaves a hole of 2 bytes after"),
    "overlap": (
        raw({"a": tensor(), "b": tensor(offsets=[2, 6])}, 6),
        "expected one tensor after the other, got 'b', which overlaps 2 bytes of the data",
    ),
    "nothing inside": (
        raw({"a": tensor(), "b": tensor(shape=[0], offsets=[2, 2])}),
        "expected one tensor after the other, got 'b', which overlaps 2 bytes of the data",
    ),
    "trailing bytes": (raw({"a": tensor()}, data=9), "expected nothing after the last tensor, got 5 bytes"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_has_its_own_message(defect: str, tmp_path: Path) -> None:
    content, message = DEFECTS[defect]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    for source in (file, tmp_path):
        with (
            little_memory(4 * MEBIBYTE),
            pytest.raises(CheckpointError, match=message) as caught,
        ):
            read_index(source)
        assert str(caught.value).startswith(f"{file}: ")
        assert len(str(caught.value)) < 1000


def test_helpers_make_valid_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw({"a": tensor(), "b": tensor("F4", [6], [4, 7])}, data=7))
    assert {n: (t.shape, t.nbytes) for n, t in read_header(file).tensors.items()} == {
        "a": ((1,), 4),
        "b": ((6,), 3),
    }


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 10**10, 3 * 10**12])
def test_a_long_header_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(length.to_bytes(8, "little"))
        stream.truncate(length + 8)  # sparse: it really is that long
    with little_memory(), pytest.raises(LimitError, match=f"got one that claims {length}"):
        read_index(file)


def test_data_is_never_read(tmp_path: Path) -> None:
    file, size = tmp_path / "model.safetensors", 10**11
    with file.open("wb") as stream:
        stream.write(raw({"a": tensor("U8", [size], [0, size])}, data=0))
        stream.truncate(stream.tell() + size)
    with little_memory():
        assert read_index(tmp_path).nbytes == size


def test_a_long_name_is_shortened_in_the_message(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw({"a" * 10**6: tensor("F33")}))
    with pytest.raises(CheckpointError, match=r"tensor 'a+\.\.\.a+': expected dtype") as caught:
        read_header(file)
    assert len(str(caught.value)) < 1000


OUTSIDE = [
    "../model.safetensors",
    "a/../../model.safetensors",
    "..\\model.safetensors",
    "/etc/model.safetensors",
    "\\\\host\\model.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_shard_outside_of_the_folder_is_refused(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="expected paths below"):
        read_index(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json: the file: expected JSON, got an error"),
        ("[]", "index.json: the file: expected JSON of one object"),
        ("{}", "expected the file of every tensor by name as weight_map, got None"),
        ('{"weight_map": ["a"]}', r"expected the file of every tensor by name as weight_map, got \['a'\]"),
        ('{"weight_map": {}}', r"expected the file of every tensor by name as weight_map, got \{\}"),
        ('{"weight_map": {"a": 7}}', r"expected a \.safetensors file for tensor 'a', got 7"),
        ('{"weight_map": {"a": ""}}', r"expected a \.safetensors file for tensor 'a', got ''"),
        ('{"weight_map": {"a": "x.bin"}}', r"expected a \.safetensors file for tensor 'a', got 'x\.bin'"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', r"expected the 1.*got 1 missing: 'x\\x00\.safetensors'"),
        ('{"weight_map": {"a": "1", "a": "2"}}', "key 'a' appears 2 times"),
        (json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}), r"got an error \(File name too long\)"),
    ],
)
def test_every_defect_of_an_index_has_its_message(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_index(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE])
def test_a_json_file_of_gigabytes_is_refused_unread(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(10**10)
    with little_memory(), pytest.raises(LimitError, match="expected at most 100000000 bytes of JSON, got 10000000000"):
        read_index(tmp_path)


VALID = save(
    {
        "layers.0.weight": torch.arange(12.0).reshape(3, 4),
        "layers.0.bias": torch.arange(4, dtype=torch.bfloat16),
        "norm": torch.zeros(3, dtype=torch.int8),
        "step": torch.tensor(7),
        "none": torch.zeros(0, 3),
    },
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")
FLIP = st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255))
FUZZ = settings(max_examples=max(300, settings.default.max_examples))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


def check_fuzzed(file: Path, content: bytes) -> None:
    """Refused with our error, or accepted by the reference reader with the same tensors."""
    file.write_bytes(content)
    try:
        tensors = read_header(file).tensors
    except CheckpointError:
        return
    spans = sorted((info.start, info.nbytes) for info in tensors.values())
    assert sum(nbytes for _, nbytes in spans) == len(content) - spans[0][0]
    with safe_open(file, framework="pt") as reference:
        assert set(reference.keys()) == tensors.keys()
        for name, info in tensors.items():
            stored = reference.get_slice(name)
            assert (tuple(stored.get_shape()), stored.get_dtype()) == (info.shape, info.dtype)


@FUZZ
@given(flips=st.lists(FLIP, min_size=1, max_size=3))
def test_flipped_bytes_are_refused_or_read_as_the_reference_does(scratch: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(VALID)
    for position, value in flips:
        content[position] = value
    check_fuzzed(scratch, bytes(content))


@FUZZ
@given(cut=st.integers(0, len(VALID)), tail=st.binary(max_size=9))
def test_cut_and_extended_files_are_refused_or_read_as_the_reference_does(scratch: Path, cut: int, tail: bytes) -> None:
    check_fuzzed(scratch, VALID[:cut] + tail)


@FUZZ
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(scratch: Path, content: bytes) -> None:
    check_fuzzed(scratch, content)
