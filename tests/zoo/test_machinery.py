"""The zoo's own machinery: how outcomes are told apart, how a sweep goes on, what the page lists."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers

from spectral_surgery.errors import ConfigError
from tests.zoo import outcome as outcomes
from tests.zoo import subject as subjects
from tests.zoo import sweep as sweeping
from tests.zoo.adapter_steps import LIVE
from tests.zoo.compare import distance, outputs
from tests.zoo.compression_steps import OTHER, dequantize
from tests.zoo.corpus import Corpus
from tests.zoo.entries import KINDS, ZOO
from tests.zoo.entry import CAUSAL, Entry
from tests.zoo.inputs import text
from tests.zoo.left_out import LEFT_OUT
from tests.zoo.outcome import NotApplicable, Outcome, Refused, Status, Wrong, attempt, command
from tests.zoo.shrink import FIRST_SPECIAL, VOCABULARY, tiny_settings
from tests.zoo.steps import NAMES, STEPS, Step, run_step
from tests.zoo.subject import EXACT, Subject, prepare
from tests.zoo.sweep import read_results, sweep
from tests.zoo.table import PAGE, names_in, page, reasons, renewed_in, results_in

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork, in Python 3.12 and later

A, B, C = (Entry(name, CAUSAL, text, model_type="llama") for name in ("a", "b", "c"))


def raises(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (NotApplicable("no text"), Status.NOT_APPLICABLE, "no text"),
        (Refused("merge: no"), Status.REFUSED, "merge: no"),
        (ConfigError("bits: no"), Status.REFUSED, "bits: no"),
        (ConfigError("two\nlines"), Status.WRONG, "two lines"),
        (Wrong("differs"), Status.WRONG, "differs"),
        (KeyError("weight"), Status.WRONG, "KeyError: 'weight' (zoo/test_machinery.py:"),
    ],
)
def test_what_a_step_raises_is_its_outcome(error: Exception, status: Status, line: str) -> None:
    found = attempt(lambda: raises(error))
    assert found.status is status
    assert found.line.startswith(line)


def test_a_step_that_returns_is_right() -> None:
    assert attempt(lambda: {"error": 0.5}).numbers == {"error": 0.5}
    assert attempt(lambda: None) == Outcome(Status.OK, seconds=attempt(lambda: None).seconds)


@pytest.mark.parametrize(
    ("code", "stderr", "error"),
    [
        (1, "reading\nError: x: no\n", Refused),
        (1, "Error: x: no\nand more\n", Wrong),
        (1, "Error: x\nError: y\n", Wrong),
        (1, "", Wrong),
        (2, "Usage: compress\nError: no such option\n", Wrong),
        (3, "Check failed: a: squared norm\n", Wrong),
    ],
)
def test_how_a_command_fails(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, error: type[Exception]) -> None:
    done = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(outcomes, "run", lambda *_: done)
    with pytest.raises(error):
        command("compress")


def test_a_command_gives_its_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "run", lambda *_: subprocess.CompletedProcess([], 0, '{"a": 1}', "said"))
    assert command("inspect") == ({"a": 1}, "said")


def test_a_step_whose_need_failed_is_not_run() -> None:
    step = Step("merge", lambda _: pytest.fail("was run"), ("inject",))
    subject = type("Nothing", (), {"found": {}})()
    found = run_step(step, subject, {"inject": Outcome(Status.REFUSED, "no")})
    assert (found.status, found.line) == (Status.NOT_APPLICABLE, "needs inject")


def test_what_a_step_says_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    step = Step("load", lambda _: raises(Refused(f"{tmp_path}/source: no")))
    subject = type("Somewhere", (), {"found": {}, "folder": tmp_path})()
    assert run_step(step, subject, {}).line == "source: no"


def test_needs_name_earlier_steps() -> None:
    for number, step in enumerate(STEPS):
        assert set(step.needs) <= set(NAMES[:number])


def right(entry: Entry, folder: Path, corpus: Corpus) -> dict[str, Outcome]:
    del folder, corpus
    return {name: Outcome(Status.OK, numbers={"of": len(entry.name)}) for name in NAMES}


def dies(entry: Entry, folder: Path, corpus: Corpus) -> dict[str, Outcome]:
    if entry is B:
        os._exit(9)
    return right(entry, folder, corpus)


def hangs(entry: Entry, folder: Path, corpus: Corpus) -> dict[str, Outcome]:
    if entry is B:
        time.sleep(60)
    return right(entry, folder, corpus)


def go(
    tmp_path: Path, entries: tuple[Entry, ...], stamp: str, check: sweeping.Check = right, **more: float
) -> list[str]:
    said: list[str] = []
    file = tmp_path / "results.jsonl"
    sweep(entries, file, stamp=stamp, check=check, corpus=Corpus(tmp_path), processes=2, say=said.append, **more)
    return said


def test_a_sweep_goes_on_where_it_ended(tmp_path: Path) -> None:
    go(tmp_path, (A,), "one")
    said = go(tmp_path, (A, B, C), "one")
    assert said[0] == "2 models to check, 1 were checked before"
    assert [line.split()[0] for line in said[1:]] == ["1/2,", "2/2,"]
    assert read_results(tmp_path / "results.jsonl").keys() == {"a", "b", "c"}
    assert go(tmp_path, (A, B, C), "one") == ["0 models to check, 3 were checked before"]


def test_other_code_is_checked_anew(tmp_path: Path) -> None:
    go(tmp_path, (A,), "one")
    assert len(go(tmp_path, (A,), "two")) == 2
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_a_line_cut_short_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    go(tmp_path, (A, B), "one")
    file.write_text(file.read_text()[:-20] + "\n")
    assert len(read_results(file, "one")) == 1
    go(tmp_path, (A, B), "one")
    assert read_results(file, "one").keys() == {"a", "b"}


@pytest.mark.parametrize(("check", "patience"), [(dies, 60.0), (hangs, 1.0)])
def test_a_model_that_takes_its_process_down_is_wrong(tmp_path: Path, check: sweeping.Check, patience: float) -> None:
    go(tmp_path, (A, B), "one", check, patience=patience)
    found = read_results(tmp_path / "results.jsonl")
    assert found["a"]["steps"]["load"]["status"] == "ok"
    assert found["b"]["steps"]["build"]["status"] == "wrong"
    assert found["b"]["steps"]["build"]["line"].startswith("the process ended with")


def test_the_fingerprint_is_of_the_sources(tmp_path: Path) -> None:
    for folder in ("spectral_surgery", "tests/zoo", "tests/support"):
        (tmp_path / folder).mkdir(parents=True)
    source, test = tmp_path / "spectral_surgery" / "a.py", tmp_path / "tests" / "zoo" / "test_a.py"
    source.write_text("one")
    test.write_text("one")
    first = sweeping.fingerprint(tmp_path)
    test.write_text("two")
    assert sweeping.fingerprint(tmp_path) == first
    source.write_text("two")
    assert sweeping.fingerprint(tmp_path) != first


def record(entry: Entry, **changed: Outcome) -> sweeping.Record:
    return sweeping.record_of(entry, right(entry, Path(), Corpus(Path())) | changed, "one")


def test_the_page_says_what_became_of_each_step() -> None:
    results = {
        "a": record(A, load=Outcome(Status.OK, numbers={"share": 0.5}), merge=Outcome(Status.REFUSED, "no | names")),
        "b": record(B, merge=Outcome(Status.REFUSED, "no | names"), heal=Outcome(Status.WRONG, "a <traceback>")),
    }
    written = page({"Decoders": (A, B, C)}, {"rag": "needs an index"}, json.loads(json.dumps(results)))
    assert names_in(written) == ["a", "b", "c"]
    row = {line.split("|")[1].strip(): line for line in written.splitlines() if line.startswith("| `")}
    assert "| ✓ 50 % |" in row["`a`"]
    assert row["`a`"].count("r [1]") == row["`b`"].count("r [1]") == row["`b`"].count("✗ [2]") == 1
    assert row["`c`"].count("| ? ") == len(NAMES)
    assert "1. no \\| names\n2. a &lt;traceback>\n" in written
    assert "3 models of 1 types, 2 of them checked: 1 with every" in written
    assert "1 with a step that is wrong" in written
    assert "| merge | 0 | 0 | 2 | 0 |" in written
    assert "- needs an index: rag" in written


def test_the_page_notes_what_is_right_in_another_way() -> None:
    noted = record(A, dequantize=Outcome(Status.OK, numbers={OTHER: 0.1}), PEFT=Outcome(Status.OK, numbers={LIVE: 0.1}))
    written = page({"Decoders": (A,)}, {}, {"a": noted})
    assert written.count("| ✓ [1] |") == written.count("| ✓ [2] |") == 1
    assert "1. right as the plain model: transformers saves it so" in written
    assert "2. right as PEFT merges" in written


class Model:
    """A compressed model that becomes a plain one and is saved."""

    def dequantize(self) -> None:
        """It is dense already."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("ours", "plain", "saved_error", "status"),
    [(1, 2, 0, Status.OK), (2, 2, 1, Status.OK), (2, 2, 0, Status.WRONG), (3, 2, 1, Status.WRONG)],
)
def test_what_is_saved_may_be_another_model_only_as_the_plain_one(
    tmp_path: Path, ours: int, plain: int, saved_error: int, status: Status
) -> None:
    held, again = Model(), Model()
    subject = SimpleNamespace(
        folder=tmp_path,
        found={"compressed": held, "wanted": {"x": torch.tensor([1.0])}},
        outputs=lambda model: {"x": torch.tensor([1.0 if model is held else float(ours)])},
        load=lambda _: (again, {}),
        keys={},
        tolerance=EXACT,
        lost="",
        saved_error=saved_error,
        saved_plain=lambda: ({"x": torch.tensor([float(plain)])}, {}),
    )
    assert attempt(lambda: dequantize(cast(Subject, subject))).status is status


def test_reasons_are_of_what_was_refused_or_is_wrong() -> None:
    found = record(A, merge=Outcome(Status.REFUSED, "no"), heal=Outcome(Status.WRONG, "differs"))
    assert reasons([found, record(B)]) == ["a, merge: refused: no", "a, heal: wrong: differs"]


def test_a_model_that_transformers_does_not_build_is_listed() -> None:
    built = sweeping.record_of(A, {"build": Outcome(Status.NOT_APPLICABLE, "ImportError: timm")}, "one")
    written = page({"Decoders": (A,)}, {}, {"a": built})
    assert written.count("- [1]") == len(NAMES)
    assert "1 that do not get through transformers itself" in written


def test_the_page_in_the_docs_lists_the_zoo() -> None:
    assert names_in(PAGE.read_text(encoding="utf-8")) == [*ZOO]


def test_rows_are_renewed_in_the_page_as_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(KINDS, LEFT_OUT, results_in(text), renewed_in(text)) == text
    name = next(iter(ZOO))
    renewed = results_in(text) | {name: record(ZOO[name], heal=Outcome(Status.REFUSED, "not *today*"))}
    written = page(KINDS, LEFT_OUT, renewed, [*renewed_in(text), name])
    assert name in renewed_in(written)
    assert results_in(written)[name]["steps"]["heal"]["line"] == "not *today*"
    others = results_in(text).keys() - {name}
    assert all(results_in(written)[other] == results_in(text)[other] for other in others)


def test_names_are_given_once() -> None:
    assert sum(len(own) for own in KINDS.values()) == len(ZOO)


@pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="other types in another version")
def test_every_type_of_transformers_is_in_the_zoo_or_left_out_with_a_reason() -> None:
    built = {entry.type for entry in ZOO.values()}
    assert not built & LEFT_OUT.keys()
    assert not set(transformers.CONFIG_MAPPING) - built - LEFT_OUT.keys()
    assert not LEFT_OUT.keys() - set(transformers.CONFIG_MAPPING)


def test_the_durations_of_vits_are_compared_before_they_are_rounded() -> None:
    entry = ZOO["vits"]
    model = entry.build().float()
    before = outputs(entry, model)
    generator = torch.Generator().manual_seed(3)

    def change(part: torch.nn.Module, by: float) -> None:
        for parameter in part.parameters():
            parameter.data.add_(by * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))

    change(model.duration_predictor, 0.5)
    after = outputs(entry, model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {".duration_predictor"}
    change(model, 0.5)  # so that durations are other ones, and yet what is compared has its shape
    error, _ = distance(before, outputs(entry, model))
    assert 0.01 < error < math.inf
    assert not any(module._forward_hooks for module in model.modules())


def test_what_transformers_itself_loses_is_not_our_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(tmp_path)
    assert not prepare(ZOO["vit"], tmp_path / "sound", corpus).lost
    assert not (tmp_path / "sound" / "again").exists()
    load = subjects.load

    def forgets(entry: Entry, folder: Path, *rest: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
        model, keys = load(entry, folder, *rest)
        return model, keys | ({"missing_keys": ["a.weight"]} if folder.name == "again" else {})

    monkeypatch.setattr(subjects, "load", forgets)
    subject = prepare(ZOO["vit"], tmp_path / "lossy", corpus)
    assert subject.lost.startswith(
        "transformers itself: the plain model, once loaded and saved again, loads with missing"
    )
    compressed = ZOO["vit"].build()
    subject.found |= {"compressed": compressed, "wanted": subject.outputs(compressed)}
    monkeypatch.setattr(type(compressed), "dequantize", lambda _: None)
    for step in ("save again", "dequantize"):
        done = dict.fromkeys(NAMES, Outcome(Status.OK))
        found = run_step(next(own for own in STEPS if own.name == step), subject, done)
        assert (found.status, found.line) == (Status.NOT_APPLICABLE, subject.lost)


def test_settings_by_rule_are_small_and_hold_each_kind_of_layer() -> None:
    found = tiny_settings("qwen3_5_text")
    assert found["hidden_size"] == 64
    assert found["vocab_size"] == VOCABULARY
    assert set(found["layer_types"]) == {"linear_attention", "full_attention"}
    assert len(found["layer_types"]) == found["num_hidden_layers"] == 2


def test_tokens_by_rule_are_the_same_in_all_parts() -> None:
    found = tiny_settings("qwen3_vl")
    assert FIRST_SPECIAL <= found["image_token_id"] < VOCABULARY
    assert found["image_token_id"] != found["video_token_id"]


def test_changes_go_into_parts() -> None:
    found = tiny_settings("qwen3_vl", {"text_config": {"hidden_size": 32}})
    assert found["text_config"]["hidden_size"] == 32
    assert found["text_config"]["intermediate_size"] == 128
