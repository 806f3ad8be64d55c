"""Model cards: valid metadata, our section, and a person's text byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectral_surgery.cards import card as cards
from spectral_surgery.cards.check import METRICS_FILE as TRAIN_METRICS
from spectral_surgery.cards.checkpoints import compressed_card
from spectral_surgery.cards.command_line import compress_command, healed_command, stored_command
from spectral_surgery.cards.content import CardContent
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.push import push
from spectral_surgery.commands.swap import METRICS_FILE as SWAP_METRICS
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.settings import CompressOptions
from tests.support.checkpoints import llama_like, write_folder


def content(title: str, **fields: Any) -> CardContent:
    values = {"title": title, "summary": "A model.", "usage": "As usual.", "totals": {"weights": "1"}}
    return CardContent("section", values, **fields)


FACTS = content(
    "Small",
    command="spectral-surgery compress org/base OUT --bits 4",
    rows=({"tensor": "`a|b`", "relative error": 0.123456, "bytes": 12},),
    base_model="org/base",
    relation="quantized",
    library_name="transformers",
    tags=("compressed",),
    libraries=("torch",),
)
BASE = """---
# a comment
license: other
license_name: llama3
license_link: LICENSE
language:
- en
- de
base_model: org/older
pipeline_tag: text-generation
tags: [text, 'yes']
model-index:
- name: base
  results:
  - task: {type: text-generation}
    dataset: {type: x, name: X}
    metrics: [{type: accuracy, value: 0.9}]
---

# Base

Its text.
"""


def front(card: str) -> dict[str, object]:
    body: dict[str, object] = yaml.safe_load(re.split(r"^---\s*\n", card, flags=re.MULTILINE)[1])
    return body


def test_a_new_card() -> None:
    card = cards.derived(None, FACTS)
    assert front(card) == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["spectral-surgery", "compressed"],
    }
    for line in (
        "# Small",
        "```bash\nspectral-surgery compress org/base OUT --bits 4\n```",
        "- weights: 1",
        "| tensor | relative error | bytes |",
        "| `a\\|b` | 0.1235 | 12 |",
        f"Made with spectral-surgery 0.1.0, torch {version('torch')}.",
    ):
        assert f"{line}\n" in card
    assert not cards.is_edited(card)
    assert cards.refreshed(card, FACTS) == card


def test_a_card_from_that_of_the_base() -> None:
    card = cards.derived(BASE, FACTS)
    data = front(card)
    assert data["base_model"] == "org/base"
    assert data["license_name"] == "llama3"
    assert data["language"] == ["en", "de"]
    assert data["tags"] == ["text", "yes", "spectral-surgery", "compressed"]
    assert "model-index" not in data  # measured on another model
    assert card.endswith("\n## The card of the model it was made from\n\n# Base\n\nIts text.\n")
    again = cards.derived(card, FACTS)
    assert again.count("The card of the model it was made from") == 1
    assert again.count("spectral-surgery:begin") == 1
    unknown = content("T")
    assert front(cards.derived(card, unknown))["base_model"] == "org/base"


@pytest.mark.parametrize(
    "source", ["---\na: [\n---\nText", "---\njust words\n---\nText", "Text", "\ufeff---\na: 1\n---\nText"]
)
def test_a_strange_card_of_the_base_does_no_harm(source: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(source.encode() + b"\xff")
    cards.write_derived(tmp_path, FACTS)
    card = (tmp_path / "README.md").read_text()
    assert front(card)["base_model"] == "org/base"
    assert "Text" in card


@pytest.mark.parametrize(
    "text",
    [
        BASE,
        BASE.replace("\n", "\r\n"),
        "# Only text\n",
        "",
        "---\ntags: [a]\n---\nText without a line end",
        "---\nbase_model: me/mine\nlibrary_name: x # kept\ntags: [a]\n---   \n\n\nText",
    ],
)
def test_a_persons_text_stays_byte_for_byte(text: str) -> None:
    card = cards.refreshed(text, FACTS)
    begin, end = card.index("<!-- spectral-surgery:begin"), card.index("spectral-surgery:end -->")
    around = card[:begin] + card[end + len("spectral-surgery:end -->") :]
    unix, mine = around.replace("\r\n", "\n").split("\n"), iter(text.replace("\r\n", "\n").rstrip("\n").split("\n"))
    line = next(mine)
    for kept in unix:  # every line of the person is there, in order
        if kept.rstrip() == line.rstrip():
            line = next(mine, "<none>")
    assert line in ("<none>", "")
    assert ("\r\n" in text) == ("\r\n" in card)
    assert "\n" not in card.replace("\r\n", "") or "\r\n" not in card
    assert cards.refreshed(card, FACTS) == card
    other = cards.refreshed(card, content("Other"))
    assert "# Other" in other
    assert "# Small" not in other
    assert cards.refreshed(other, FACTS) == card
    data = front(card.replace("\r\n", "\n"))
    assert data["tags"] in (["text", "yes"], ["a"], ["spectral-surgery", "compressed"])  # those it has stay
    assert cards.is_edited(card)


@pytest.mark.parametrize("base", ["''", "/home/me/model", "./model"])
def test_a_base_that_the_hub_refuses_is_corrected(base: str) -> None:
    text = f"---\nbase_model: {base}\nlicense: mit\ntags:\n- 'base_model:adapter:{base}'\n- mine\n---\n\nMine\n"
    for card in (cards.refreshed(text, FACTS), cards.derived(text, FACTS)):
        assert front(card)["base_model"] == "org/base"
        assert front(card)["license"] == "mit"
        assert [tag for tag in front(card)["tags"] if tag != "mine"] in ([], ["spectral-surgery", "compressed"])
        assert card.endswith("\nMine\n")
    nobody = content("T")
    assert "base_model" not in front(cards.refreshed(text, nobody)).keys() | front(cards.derived(text, nobody)).keys()


def test_a_template_without_answers_is_nobodys_text() -> None:
    template = "---\nlicense: mit\n---\n\n# Model Card for Model ID\n" + "- **X:** [More Information Needed]\n" * 20
    assert cards.is_untouched_template(template)
    assert not cards.is_untouched_template(BASE)
    assert cards.only_metadata(template) == "---\nlicense: mit\n---\n"
    assert cards.only_metadata("Text") == ""


def test_metadata_that_cannot_be_read() -> None:
    for text in ("---\na: [\n---\n", "---\n- a\n---\n"):
        with pytest.raises(ConfigError, match=r"README\.md: expected metadata in YAML,.*got what cannot be read"):
            cards.refreshed(text, FACTS)


CARD = cards.derived(None, FACTS)
NEWER = cards.derived(None, content("Newer", base_model="org/base"))
EDITED = CARD + "\nMine\n"


@pytest.mark.parametrize(
    ("here", "there", "kept"),
    [
        (CARD, None, "here"),
        (CARD, CARD, "here"),
        (NEWER, CARD, "here"),
        (EDITED, CARD, "here"),
        (CARD, EDITED, "there"),
        (CARD, "somebody's", "there"),
        (EDITED, EDITED, "here"),
        (EDITED, EDITED.replace("Mine", "Yours"), "neither"),
    ],
)
def test_which_of_two_cards_is_kept(here: str, there: str | None, kept: str) -> None:
    assert cards.reconciled(here, there) == {"here": here, "there": there, "neither": None}[kept]


def test_a_section_moves_to_another_card() -> None:
    moved = cards.transplanted("---\nlicense: mit\n---\nMine\n", CARD)
    assert front(moved) == {"license": "mit", **front(CARD)}
    assert "# Small\n" in moved
    assert moved.endswith("-->\nMine\n")


def test_what_can_be_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "model").mkdir(parents=True)
    found = [cards.as_repository(name) for name in ("org/name", "/home/me/model", "./model", "out/model", "name", 3)]
    assert found == ["org/name", None, None, None, None, None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CompressOptions(Target("bits", 4.0)), "--bits 4"),
        (CompressOptions(Target("density", 0.2), "hadamard", 32), "--sparsity 0.2 --transform hadamard --tile 32"),
        (
            CompressOptions(Target("max_error", 0.05), include=("*q*", "a b"), copy_nonfinite=True, min_weights=1),
            "--max-error 0.05 --include '*q*' --include 'a b' --min-weights 1 --copy-nonfinite",
        ),
        (CompressOptions(Target("bits", 3.0), allocation="even"), "--bits 3"),
        (
            CompressOptions(Target("density", 0.2), calibration="3 words, 1f2e", allocation="even"),
            "--sparsity 0.2 --allocation even --calibrate TEXT",
        ),
    ],
)
def test_the_command_that_makes_the_same_bytes(options: CompressOptions, words: str) -> None:
    command = compress_command(options)
    assert command == f"spectral-surgery compress SOURCE OUT {words}"
    assert stored_command(command, "SOURCE", "org/base") == f"spectral-surgery compress org/base OUT {words}"
    assert healed_command(healed_command(command)) == f"{command} --heal TEXT"


@pytest.mark.parametrize("text", [None, 3, "rm -rf /", "spectral-surgery x\n```\n# Mine", "spectral-surgery ``` x"])
def test_what_is_not_a_command_of_ours_is_not_shown(text: object) -> None:
    assert stored_command(text, "SOURCE", "org/base") == ""


def test_what_is_made_from_a_compressed_checkpoint_is_not_called_compressed() -> None:
    plain = content("Plain", relation="quantized")
    data = front(cards.derived(cards.derived(BASE, FACTS), plain))
    assert data["tags"] == ["text", "yes", "spectral-surgery"]
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    theirs = "---\ntags: [compressed]\n---\nText"
    assert front(cards.derived(theirs, plain))["tags"] == ["compressed", "spectral-surgery"]


def test_long_tables_are_cut() -> None:
    make: Callable[[int], CardContent] = lambda n: content("T", rows=[{"tensor": str(i)} for i in range(n)])  # noqa: E731
    assert "and 60 more." in cards.derived(None, make(100))
    assert "more." not in cards.derived(None, make(40))


def test_our_section_can_be_changed_alone() -> None:
    assert cards.with_section(EDITED, str.upper).count("A MODEL.") == 1
    changed = cards.with_section(EDITED, lambda section: section.replace("A model.", "Another."))
    assert changed == EDITED.replace("A model.", "Another.")
    assert cards.with_section("Mine", str.upper) == "Mine"


def test_a_folder_without_its_command_has_a_card(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "source", llama_like()), tmp_path / "out"
    compress(source, out, CompressOptions(Target("bits", 4.0)))
    command = "spectral-surgery compress org/base OUT --bits 4\n"
    card = compressed_card(open_compressed(out), "org/base")
    assert f"```bash\n{command}```" in cards.derived(None, card)
    manifest = json.loads((out / "spectral_surgery.json").read_text())
    del manifest["command"]
    (out / "spectral_surgery.json").write_text(json.dumps(manifest))
    older = compressed_card(open_compressed(out), "org/base")
    assert cards.derived(None, older) == cards.derived(None, replace(card, command=""))


def test_only_a_training_keeps_folders_back(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", llama_like())
    for name in ("checkpoints", "control"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    (folder / SWAP_METRICS).write_text("{}")
    assert {"checkpoints/notes.txt", "control/notes.txt"} <= push(folder, "me/model", dry_run=True).files.keys()
    (folder / TRAIN_METRICS).write_text("{}")
    assert not {"checkpoints/notes.txt", "control/notes.txt"} & push(folder, "me/model", dry_run=True).files.keys()
