"""Glob patterns over dotted names, and PEFT's rules over names of modules."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spectral_surgery.errors import TargetError
from spectral_surgery.targets import ModuleTargets, matching

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
    text = f", ..., got '{pattern}', which matches none of 4 tensors."
    with pytest.raises(TargetError, match=rf"^--include: expected globs over names such as .*{re.escape(text)}$"):
        matching(NAMES, ["*", pattern], option="--include")


def test_the_error_names_the_option_and_some_names() -> None:
    with pytest.raises(TargetError) as caught:
        matching(NAMES[:2], ["nope"], option="--exclude")
    assert str(caught.value) == (
        "--exclude: expected globs over names such as encoder.0.query.weight, encoder.0.query.bias, "
        "got 'nope', which matches none of 2 tensors."
    )


WORDS = st.sampled_from(["model", "layers", "h", "experts", "q_proj", "proj", "head", "0", "1", "10", "2x"])
PATHS = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
ENDS = st.lists(st.lists(WORDS, min_size=1, max_size=3).map(".".join), min_size=1, max_size=3).map(tuple)
PIECES = st.sampled_from([r".*", r"\.", "proj", "(q_|)proj", "layers", "[0-9]+"])
EXPRESSIONS = st.lists(PIECES, max_size=4).map("".join)


@example("model.layers.1.layers.0.proj", ("proj",), None, (), (1,), ("layers",))
@example("layers.1.experts.0.proj", ("proj",), None, (), (1,), ())
@given(
    name=PATHS,
    targets=ENDS | EXPRESSIONS,
    excluded=st.none() | ENDS | EXPRESSIONS,
    saved=st.lists(WORDS, max_size=2).map(tuple),
    numbers=st.none() | st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple),
    lists=st.lists(st.sampled_from(["layers", "h", "experts"]), max_size=2).map(tuple),
)
def test_modules_are_those_that_peft_takes(
    name: str,
    targets: tuple[str, ...] | str,
    excluded: tuple[str, ...] | str | None,
    saved: tuple[str, ...],
    numbers: tuple[int, ...] | None,
    lists: tuple[str, ...],
) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    ours = ModuleTargets(targets, excluded, numbers, lists, saved)
    theirs = SimpleNamespace(
        target_modules=targets,
        target_parameters=None,
        exclude_modules=excluded,
        modules_to_save=saved,
        layers_to_transform=numbers and list(numbers),
        layers_pattern=list(lists),
    )
    taken = tuners.check_target_module_exists(theirs, name)  # a match, or an object that says why not
    assert ours.matches(name) is bool(taken)
    if ours.matches(name):
        assert ours.select(["elsewhere", name, "nowhere"]).count(name) == 1
    else:
        with pytest.raises(TargetError):
            ours.select([name])
