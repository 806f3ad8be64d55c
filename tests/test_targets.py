"""Glob patterns over dotted names."""

from __future__ import annotations

import re

import pytest

from spectral_surgery.errors import TargetError
from spectral_surgery.targets import matching

NAMES = ("encoder.0.query.weight", "encoder.0.query.bias", "encoder.10.key.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], set()),
        (["lm_head.weight"], {NAMES[3]}),
        (["*.weight"], {NAMES[0], NAMES[2], NAMES[3]}),
        (["encoder.*"], set(NAMES[:3])),
        (["encoder.?.*", "*.key.*"], set(NAMES[:3])),
        (["encoder.[0-5].*.weight"], {NAMES[0]}),
    ],
)
def test_matching(patterns: list[str], expected: set[str]) -> None:
    assert matching(iter(NAMES), patterns, option="--include") == expected


@pytest.mark.parametrize("pattern", ["query", "ENCODER.*", "encoder.*.weights"])
def test_a_pattern_without_a_match_is_an_error(pattern: str) -> None:
    text = (
        f"--include '{pattern}': matches none of 4 tensors; expected globs over names such as encoder.0.query.weight, "
    )
    with pytest.raises(TargetError, match=re.escape(text) + r".*, \.\.\."):
        matching(NAMES, ["*", pattern], option="--include")


def test_the_error_names_the_option_and_some_names() -> None:
    with pytest.raises(TargetError) as caught:
        matching(NAMES[:2], ["nope"], option="--exclude")
    assert str(caught.value) == (
        "--exclude 'nope': matches none of 2 tensors; "
        "expected globs over names such as encoder.0.query.weight, encoder.0.query.bias."
    )
