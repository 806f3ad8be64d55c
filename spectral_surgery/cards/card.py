"""Model cards: the part we write is marked, and all around it belongs to people.

A card is a README.md: metadata (YAML between ``---``) and Markdown. Ours stands between two comments; the first of them
carries a hash of everything outside, as it was when we made the card, so that a later edit shows.

Source: https://huggingface.co/docs/hub/model-cards; metadata are read and written as huggingface_hub's ModelCardData.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spectral_surgery.cards.content import CardContent
from spectral_surgery.errors import ConfigError

FILE_NAME = "README.md"
COMPRESSED = "compressed"

_BEGIN = "<!-- spectral-surgery:begin {} -->"
_SIGNED = re.compile(r"<!-- spectral-surgery:begin \w+ -->")
_END = "<!-- spectral-surgery:end -->"
_SECTION = re.compile(r"<!-- spectral-surgery:begin (\w+) -->.*?<!-- spectral-surgery:end -->\n?", re.DOTALL)
_METADATA = re.compile(r"\s*---\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
# what stays true of a model made from another one; results of measurements, for example, do not
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "datasets", "tags")
_OURS = ("base_model", "base_model_relation", "library_name", "tags")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HEADING = "## The card of the model it was made from"
_BASE_LINES = re.compile(r"^(base_model:[^\n]*|\s*- *'?base_model:[^\n]*)\n", re.MULTILINE)
_BLANKS = 10


def write_derived(folder: Path, content: CardContent) -> None:
    """Turn the card that was copied into a new folder from its source into that of the folder; see `derived`."""
    path = folder / FILE_NAME
    source = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None
    path.write_bytes(derived(source, content).encode())


def derived(source: str | None, content: CardContent) -> str:
    """The card of a model made from another one.

    ``source``: card of the other one. Its licence, languages, task, data sets and tags are carried over; its text
    follows ours. Metadata that cannot be read are left where they are.
    """
    text = _unix(source or "").removeprefix("\ufeff")
    try:
        old, body = metadata(text), _METADATA.sub("", text, count=1)
    except ConfigError:  # hours of work must not fail on somebody else's card
        old, body = {}, text
    inherited = {key: old[key] for key in _INHERITED if old.get(key)}
    new = content.metadata()
    if "base_model" not in new and _is_base(old.get("base_model")):
        new["base_model"] = old["base_model"]
        new |= {"base_model_relation": content.relation} if content.relation else {}
    # the Hub makes tags of base models itself, and PEFT writes paths of somebody's disk into them
    tags = [tag for tag in _listed(old.get("tags")) if not tag.startswith("base_model:")]
    if has_section(text):
        tags = [tag for tag in tags if tag != COMPRESSED]  # said of that checkpoint by us
    tags += _listed(new["tags"])
    data = _card_data({**new, **inherited, "tags": list(dict.fromkeys(tags))})
    front = f"---\n{data.to_yaml()}\n---\n\n"
    body = _SECTION.sub("", body).strip("\n")
    heading = "" if body.startswith(_HEADING) or not body else f"{_HEADING}\n\n"
    rest = f"\n{heading}{body}\n" if body else ""
    return front + _section(content, _hash(_unsigned(front + rest))) + rest


def refreshed(text: str, content: CardContent) -> str:
    """A card with our section as it should be, and every other byte as it was.

    Args:
        text: the card. Without a section of ours, one is put below the metadata.
        content: what the section says. Metadata are added where the card has none; those it has stay.

    Raises:
        ConfigError: when the metadata of the card are not YAML.
    """
    return _placed(text, _section(content, "new"), content.metadata())


def transplanted(text: str, donor: str) -> str:
    """A card with the section of another one; see `refreshed`."""
    section = _SECTION.search(_unix(donor))
    known = {key: value for key, value in metadata(donor).items() if key in _OURS}
    return _placed(text, section.group(0) if section else "", known)


def with_section(text: str, change: Callable[[str], str]) -> str:
    """A card with our section changed, and every other byte as it was."""
    return _SECTION.sub(lambda match: change(match.group(0)), text, count=1)


def _placed(text: str, section: str, new: Mapping[str, object]) -> str:
    ending = "\r\n" if "\r\n" in text else "\n"
    unix = _unix(text)
    old = metadata(unix)
    missing: dict[str, Any] = {key: value for key, value in new.items() if key not in old}
    front = _METADATA.match(unix)
    head, body = (unix[: front.end()], unix[front.end() :]) if front else ("", unix)
    if "base_model" in old and not _is_base(old["base_model"]):  # the Hub refuses cards with such a one
        head = _BASE_LINES.sub("", head)
        missing |= {key: new[key] for key in ("base_model", "base_model_relation") if key in new}
    elif "base_model" in old:
        missing.pop("base_model_relation", None)  # of a base that somebody else named
    if missing:
        lines = _card_data(missing).to_yaml()
        head = f"{head.rstrip().removesuffix('---')}{lines}\n---\n" if head else f"---\n{lines}\n---\n\n"
    match = _SECTION.search(body)
    before, after = (body[: match.start()], body[match.end() :]) if match else ("\n" if head else "", body)
    if is_edited(unix):  # no hash fits then, neither the one that is there nor this word
        signature = match.group(1) if match else "edited"
    else:
        signature = _hash(_unsigned(head + before + after))
    signed = _SIGNED.sub(_BEGIN.format(signature), section, count=1)
    return (head + before + signed + after).replace("\n", ending)


def reconciled(here: str, there: str | None) -> str | None:
    """Which of two cards to build on, when one is in a folder and one on the Hub.

    Returns the one that a person has edited; the one here when neither was, or when their texts agree; None when both
    were edited and differ.
    """
    if there is None or _outside(here) == _outside(there) or not is_edited(there):
        return here
    return None if is_edited(here) else there


def has_section(text: str) -> bool:
    """Whether a part of the card is ours."""
    return _SECTION.search(_unix(text)) is not None


def is_edited(text: str) -> bool:
    """Whether a person has written the card, or changed it outside our section."""
    section = _SECTION.search(_unix(text))
    return section is None or section.group(1) != _hash(_outside(text))


def metadata(text: str) -> dict[str, Any]:
    """Metadata of a card. Raises ConfigError when they are not a YAML mapping."""
    import yaml  # type: ignore[import-untyped]

    front = _METADATA.match(_unix(text))
    if not front:
        return {}
    try:
        written = yaml.safe_load(front.group(1)) or {}
        if not isinstance(written, dict):
            raise TypeError("it is not a mapping")
        card: dict[str, Any] = _card_data(written | {"ignore_metadata_errors": True}).to_dict()
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{FILE_NAME}: expected metadata in YAML, keys and values between two lines of ---, got what cannot be"
            f" read ({reason}). Correct or remove them."
        ) from None
    return card


def _card_data(fields: Mapping[str, Any]) -> Any:
    from huggingface_hub.repocard_data import ModelCardData  # repocard imports a client of the Hub, half a second

    return ModelCardData(**fields)


def read_card(folder: Path) -> str | None:
    """The card of a folder, None without one. Raises ConfigError when it is not UTF-8 text."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{FILE_NAME}: expected UTF-8 text, got other bytes ({error.reason}). Convert it.") from None


def is_untouched_template(text: str) -> bool:
    """Whether a card is the form that PEFT and transformers write, with nothing filled in."""
    return "# Model Card for Model ID" in text and text.count("[More Information Needed]") >= _BLANKS


def only_metadata(text: str) -> str:
    """A card without its text."""
    match = _METADATA.match(_unix(text))
    return match.group(0) if match else ""


def as_repository(name: object) -> str | None:
    """A name that can be a base_model: ``org/name``, and no path of somebody's disk."""
    fits = isinstance(name, str) and _REPOSITORY.fullmatch(name) and not Path(name).exists()
    return str(name) if fits else None


def _is_base(value: object) -> bool:
    return bool(_listed(value)) and all(as_repository(name) for name in _listed(value))


def _listed(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _section(content: CardContent, signature: str) -> str:
    return f"{_BEGIN.format(signature)}\n\n{content.text()}\n{_END}\n"


def _outside(text: str) -> str:
    return _unsigned(_SECTION.sub("", _unix(text), count=1))


def _unsigned(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")
