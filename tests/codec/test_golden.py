"""Frames that were written once decode to the same codes for ever, and equal codes give equal bytes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from spectral_surgery.codec.byte_planes import decode_planes, encode_planes
from spectral_surgery.codec.frame_bytes import INTEGERS, LATTICE, TURNED, ZEROS, decode_frame, encode_frame
from tests.codec import golden_planes
from tests.codec.golden_frames import CASES, FOLDER, LONG, read, write
from tests.support.format_page import page_reader

FILES, LONG_FILES = sorted(FOLDER.glob("*.json")), sorted(LONG.glob("*.json"))
FEW = [file for file in FILES + LONG_FILES if not re.search("(8|16|64)-lanes", file.stem)]  # the page is slow


@pytest.mark.parametrize("file", FILES + LONG_FILES, ids=lambda file: f"{file.parent.stem}-{file.stem}")
def test_it_decodes_to_its_codes(file: Path) -> None:
    golden = read(file)
    decoded = decode_frame(golden.frame, golden.codes.shape)
    assert decoded.dtype == golden.codes.dtype
    np.testing.assert_array_equal(decoded, golden.codes)


@pytest.mark.parametrize("file", FEW, ids=lambda file: f"{file.parent.stem}-{file.stem}")
def test_the_page_decodes_it(file: Path) -> None:
    golden = read(file)
    np.testing.assert_array_equal(page_reader()(golden.frame, *golden.codes.shape), golden.codes)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_codes_give_the_same_bytes(file: Path) -> None:
    golden = read(file)
    assert encode_frame(golden.codes) == golden.frame


def test_every_case_has_a_file() -> None:
    assert {file.stem for file in FILES} == set(CASES), "python -m tests.codec.golden_frames writes new ones"


@pytest.mark.parametrize(("files", "lanes"), [(FILES, {129, 132, 144, 192}), (LONG_FILES, {1, 2, 8})])
def test_every_kind_of_frame_is_there(files: list[Path], lanes: set[int]) -> None:
    """Each kind with each size of a code, low bits, a list and every number of lanes."""
    kinds: dict[int, dict[str, set[int]]] = {}
    for file in files:
        kind, size, low, count = (frame := read(file).frame)[:4]
        fields = kinds.setdefault(kind, {"size": set(), "low": set(), "lanes": set(), "list": set()})
        fields["size"].add(size)
        fields["low"].add(low > 0)
        fields["lanes"].add(count)
        fields["list"].add(int.from_bytes(frame[8:12], "little") > 0)
    assert kinds.keys() - {ZEROS} == {INTEGERS, LATTICE, TURNED}
    for kind in (INTEGERS, LATTICE):
        assert kinds[kind] == {"size": {1, 2, 4}, "low": {0, 1}, "lanes": lanes, "list": {0, 1}}


def test_none_is_written_over(tmp_path: Path) -> None:
    file = tmp_path / "case.json"
    codes = np.array([[1, -2]], np.int16)
    write(file, codes)
    np.testing.assert_array_equal(read(file).codes, codes)
    with pytest.raises(FileExistsError):
        write(file, codes)


PLANES = sorted(golden_planes.FOLDER.glob("*.json"))
LONG_PLANES = sorted(golden_planes.LONG.glob("*.json"))


@pytest.mark.parametrize("file", PLANES + LONG_PLANES, ids=lambda file: f"{file.parent.stem}-{file.stem}")
def test_planes_decode_to_their_numbers(file: Path) -> None:
    golden = golden_planes.read(file)
    decoded = decode_planes(golden.pieces, golden.layout, golden.centres, len(golden.numbers))
    np.testing.assert_array_equal(decoded, golden.numbers)
    again = encode_planes(golden.numbers, golden.layout, golden.centres)
    assert again == golden.pieces or file in LONG_PLANES


def test_every_case_of_planes_has_a_file() -> None:
    assert {file.stem for file in PLANES} == set(golden_planes.CASES)
