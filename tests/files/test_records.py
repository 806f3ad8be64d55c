"""Manifests, records of merges and of swaps: what was written is read again, anything else is refused in one line."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.codec.encoded import EncodingReport
from spectral_surgery.errors import SpectralSurgeryError
from spectral_surgery.files.compressed.manifest import Manifest, PartRecord, TensorRecord, parse_manifest
from spectral_surgery.files.merge_record import FOLDER, RECORD_FILE, MergedTensor, MergeRecord, Source
from spectral_surgery.files.merge_record import read_record as read_merge
from spectral_surgery.files.swap_record import SwapRecord
from spectral_surgery.files.swap_record import read_record as read_swap
from spectral_surgery.transforms import TRANSFORMS

NAMES = st.text(st.characters(codec="utf-8"), max_size=12)
COUNTS = st.integers(0, 2**40)
ENERGIES = st.floats(0, 1e30)
REPORTS = st.builds(EncodingReport, COUNTS, COUNTS, COUNTS, ENERGIES, ENERGIES, ENERGIES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def tensor_records(draw: st.DrawFn) -> TensorRecord:
    columns, heights = draw(st.integers(1, 900)), draw(st.lists(st.integers(1, 600), min_size=1, max_size=4))
    ends = [sum(heights[:number]) for number in range(len(heights) + 1)]
    parts = tuple(
        PartRecord(
            rows, draw(st.integers(1, 999)), draw(st.sampled_from(list(TRANSFORMS))), draw(COUNTS), draw(REPORTS)
        )
        for rows in pairwise(ends)
    )
    axes = draw(st.sampled_from([(0, 1), (1,), (0,), ()]))
    return TensorRecord(
        draw(st.sampled_from(["F32", "BF16"])), (ends[-1], columns), (ends[-1], columns), 64, axes, parts
    )


MANIFESTS = st.builds(
    Manifest,
    st.dictionaries(NAMES, tensor_records(), max_size=3),
    st.dictionaries(NAMES, NAMES, max_size=3),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=3),
    NAMES,
    NAMES,
)
SIZES = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
SOURCES = st.builds(
    Source,
    st.integers(0, 1),
    NAMES,
    SIZES,
    st.lists(st.tuples(*[COUNTS] * 3), max_size=3).map(tuple),
    st.booleans(),
    st.booleans(),
)
MERGED = st.one_of(
    st.builds(
        MergedTensor,
        st.lists(SOURCES, min_size=1, max_size=3).map(tuple),
        st.just("update"),
        *(st.floats(1e-30, 1e30), COUNTS, COUNTS, st.text("0123456789abcdef", min_size=1), NAMES),
        st.none() | SIZES,
    ),
    st.builds(
        MergedTensor,
        st.just(()),
        st.sampled_from(["whole", "xor"]),
        *(st.just(1.0), COUNTS, COUNTS, st.none() | NAMES, NAMES),
        st.none() | SIZES,
    ),
)
MERGES = st.builds(
    MergeRecord,
    st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    st.dictionaries(NAMES, MERGED, max_size=3),
    st.dictionaries(NAMES, NAMES, max_size=3),
)
SWAPS = st.builds(
    SwapRecord,
    NAMES,
    st.lists(st.integers(0, 99), max_size=5).map(tuple),
    st.dictionaries(NAMES, st.integers(), max_size=3),
)


def places(body: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the whole of it first."""
    inside = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def replaced(draw: Any, body: Any) -> Any:
    """A JSON value with something else, or nothing, in one place."""
    path = draw(st.sampled_from(places(body)))
    if not path:
        return draw(JSON)
    changed = copy.deepcopy(body)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    if isinstance(inside, dict) and draw(st.booleans()):
        del inside[path[-1]]
    else:
        inside[path[-1]] = draw(JSON)
    return changed


def check_one_line(error: SpectralSurgeryError) -> None:
    assert "\n" not in str(error), error
    assert str(error)[-1] in ".?", error  # "Did you mean haar?"


@given(manifest=MANIFESTS)
def test_a_manifest_is_read_as_it_was_written(manifest: Manifest) -> None:
    again = parse_manifest(json.loads(manifest.to_json()))
    assert again == manifest
    assert again.to_json() == manifest.to_json()


@given(data=st.data(), manifest=MANIFESTS)
def test_a_manifest_with_anything_else_in_it_is_refused_or_whole(data: st.DataObject, manifest: Manifest) -> None:
    try:
        read = parse_manifest(replaced(data.draw, json.loads(manifest.to_json())))
    except SpectralSurgeryError as error:
        check_one_line(error)
        return
    for record in read.tensors.values():  # what was accepted can be used
        assert record.report.bits_per_weight >= 0
        assert record.report.relative_error >= 0
        assert all(record.basis(part).tile == record.tile for part in range(len(record.parts)))
    assert parse_manifest(json.loads(read.to_json())) == read


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merged")
    (root / FOLDER).mkdir()
    return root


@given(record=MERGES)
def test_a_merge_is_read_as_it_was_written(merged: Path, record: MergeRecord) -> None:
    (merged / FOLDER / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
    assert read_merge(merged) == record


@given(data=st.data(), record=MERGES)
def test_a_merge_with_anything_else_in_it_is_refused_or_whole(
    merged: Path, data: st.DataObject, record: MergeRecord
) -> None:
    body = replaced(data.draw, json.loads(record.to_json()))
    (merged / FOLDER / RECORD_FILE).write_text(json.dumps(body), encoding="utf-8")
    try:
        read = read_merge(merged)
    except SpectralSurgeryError as error:
        check_one_line(error)
        return
    (merged / FOLDER / RECORD_FILE).write_text(read.to_json(), encoding="utf-8")
    assert read_merge(merged) == read


@given(record=SWAPS)
def test_a_swap_is_read_as_it_was_written(record: SwapRecord) -> None:
    assert read_swap(json.loads(json.dumps(record.to_json()))) == record


@given(data=st.data(), record=SWAPS)
def test_a_swap_with_anything_else_in_it_is_refused_or_whole(data: st.DataObject, record: SwapRecord) -> None:
    body = replaced(data.draw, json.loads(json.dumps(record.to_json())))
    try:
        read = read_swap(body if isinstance(body, dict) else {"": body})
    except SpectralSurgeryError as error:
        check_one_line(error)
        return
    assert read_swap(read.to_json()) == read
