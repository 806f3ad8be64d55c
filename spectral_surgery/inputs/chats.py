"""Chats, as JSONL: messages, or a prompt and a completion, through the chat template of the model; images with them.

Each chat is read by itself, from its beginning, as models are run on it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from spectral_surgery.errors import ConfigError
from spectral_surgery.files.peft.task import is_causal, needs_decoder_input
from spectral_surgery.hf.processors import load_processor
from spectral_surgery.inputs.folders import readable
from spectral_surgery.inputs.images import read_image
from spectral_surgery.inputs.kind import Config, Kind, Reading
from spectral_surgery.inputs.model_input import NOT_JUDGED, ModelInput
from spectral_surgery.text.sequences import check_vocabulary

Message = dict[str, Any]
_CHAT = ("messages", "prompt")
_IMAGES = ("images", "image")
_MALFORMED = (KeyError, TypeError, AttributeError, ValueError)
_PLACES = ("image", "path", "url")  # in a part of a message
_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})  # have an axis of the batch


@dataclass(frozen=True)
class Chat:
    """A line of a file.

    Attributes:
        messages: as chat templates take them.
        plain: the same as one text, for models without a template; empty where it was given as messages.
        images: files, in the order in which they are shown.
    """

    messages: Sequence[Message]
    plain: str
    images: tuple[Path, ...]


def _rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Objects and the numbers of their lines."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(line)
            rows.append((number, row))
    return rows


def _has_chats(file: Path, config: Config, *, images: bool) -> bool:
    """Whether the first line of a file is a chat, with images or without."""
    if file.suffix not in (".jsonl", ".json") or not is_causal(config) or needs_decoder_input(config):
        return False
    try:
        with file.open(encoding="utf-8") as lines:
            row = json.loads(next(line for line in lines if line.strip()))
    except (OSError, ValueError, StopIteration):
        return False  # whoever reads all of it says what is wrong
    if not isinstance(row, dict) or not any(name in row for name in _CHAT):
        return False
    try:
        return images == bool(_shown(row))
    except _MALFORMED:
        return not images  # as above


def _shown(row: Mapping[str, Any]) -> list[str]:
    """The images of a row, as they are named in it."""
    given = [row[name] for name in _IMAGES if row.get(name)]
    beside = [str(name) for names in given for name in (names if isinstance(names, list) else [names])]
    parts = [part for message in _messages(row) for part in _parts(message) if part.get("type") == "image"]
    inside = [str(part[name]) for part in parts for name in _PLACES if part.get(name)]
    return inside or beside


def _messages(row: Mapping[str, Any]) -> list[Message]:
    if "messages" in row:
        return list(row["messages"])
    turns: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        given = row.get(name) or []
        turns += [{"role": role, "content": given}] if isinstance(given, str) else given
    return turns


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _chat(row: Mapping[str, Any], folder: Path) -> Chat:
    messages, names = _messages(row), _shown(row)
    if not all(isinstance(message["role"], str) for message in messages):
        raise TypeError
    if names:
        whole = [{"role": message["role"], "content": _parts(message)} for message in messages]
        for message in whole:  # templates ask for the kind alone
            shown = [part["type"] == "image" for part in message["content"]]
            message["content"] = [
                {"type": "image"} if image else part for image, part in zip(shown, message["content"], strict=True)
            ]
        if not any(part["type"] == "image" for message in whole for part in message["content"]):
            first = next((message for message in whole if message["role"] == "user"), whole[0])
            first["content"] = [{"type": "image"}] * len(names) + first["content"]
        messages = whole
    texts = [row.get("prompt"), row.get("completion", "")]
    plain = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else ""
    return Chat(messages, plain, tuple(folder / name for name in names))


def _chats(reading: Reading) -> list[Chat]:
    file, found = reading.data.file, []
    try:
        rows = _rows(file)
    except ValueError:
        raise ConfigError(f"{file}: expected a JSON object in UTF-8 on every line, got something else.") from None
    for number, row in rows:
        try:
            chat = _chat(row, file.parent)
        except _MALFORMED:
            chat = Chat((), "", ())
        if not chat.messages:
            raise ConfigError(
                f"{file}: line {number}: expected messages with a role and a content each, or a prompt and a"
                f" completion, got {', '.join(row) or 'nothing'}. Mend or remove the line."
            )
        found.append(chat)
    counts = [bool(chat.images) for chat in found]
    if any(counts) and not all(counts):
        number = rows[counts.index(False)][0]
        raise ConfigError(f"{file}: line {number}: expected an image, as on other lines, got none. Use two files.")
    return found


def _templated(teller: Any, chat: Chat, reading: Reading) -> str:
    """A chat as text, by the template of a tokenizer or processor."""
    if getattr(teller, "chat_template", None) is None:
        raise ConfigError(
            f"{reading.folder}: expected a tokenizer with a chat template for {reading.data.file}, got one without."
            " Add chat_template.jinja, or give text, or prompts and completions without images."
        )
    try:
        return str(teller.apply_chat_template(list(chat.messages), tokenize=False))
    except (TemplateError, *_MALFORMED) as error:
        raise ConfigError(
            f"{reading.data.file}: expected chats that the template of {reading.folder.name} takes, got"
            f" {' '.join(str(error).split())}."
        ) from None


def _read_text(reading: Reading, items: Sequence[Chat], samples: int) -> list[ModelInput]:
    tokenizer, inputs = reading.tokenizer, []
    for chat in items[: samples or None]:
        if chat.plain and tokenizer.chat_template is None:
            ids = tokenizer(chat.plain)["input_ids"]
        else:
            text = _templated(tokenizer, chat, reading)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has them
        inputs.append(list(ids[: reading.longest]))
    check_vocabulary(inputs, reading.model, reading.data.file)
    return [_as_input(ids, tokenizer.pad_token_id or 0) for ids in inputs if ids]


def _as_input(ids: Sequence[int], padding: int) -> ModelInput:
    given = torch.tensor(ids)
    return ModelInput.of({"input_ids": given, "attention_mask": torch.ones_like(given)}, padding, _next(ids))


def _next(ids: Sequence[int], left_out: Iterable[object] = ()) -> list[int]:
    """The token after each; none after the last, and none that stands for a part of an image."""
    return [*(NOT_JUDGED if token in left_out else token for token in ids[1:]), NOT_JUDGED]


def _read_images(reading: Reading, items: Sequence[Chat], samples: int) -> list[ModelInput]:
    processor = load_processor(reading.folder, trust_remote_code=reading.data.trust_remote_code)
    takes, config = list(inspect.signature(reading.model.forward).parameters), reading.model.config
    pictures = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}

    def read(chat: Chat, text: str) -> dict[str, Tensor]:
        images = [read_image(path) for path in chat.images]
        try:
            made = processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False)
        except (ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{reading.data.file}: expected as many images as the chat shows, got {len(images)} for one that"
                f" {reading.folder.name} refuses ({' '.join(str(error).split())})."
            ) from None
        return {name: made[name][0] if name in _TEXT else made[name] for name in made if name in takes}

    def one(chat: Chat) -> ModelInput:
        text = _templated(processor, chat, reading)
        tensors = read(chat, text)
        ids = tensors["input_ids"].tolist()
        check_vocabulary([ids], reading.model, reading.data.file)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return ModelInput(
            shapes,
            partial(read, chat, text),
            processor.tokenizer.pad_token_id or 0,
            tuple(_next(ids, pictures)),
            joined=frozenset(shapes) - _TEXT,
        )

    return readable(reading, items, samples, one)


CHATS = Kind(
    "chats",
    "chats",
    512,
    "chats",
    "no token is found by the tokenizer of",
    "AutoModel",
    by_objective=True,
    given=frozenset({"input_ids"}),
    is_for=partial(_has_chats, images=False),
    items=_chats,
    inputs=_read_text,
)
IMAGE_CHATS = Kind(
    "chats with images",
    "chats with images",
    128,
    "chats",
    "there is none for",
    "",
    by_objective=False,
    given=frozenset({"pixel_values"}),
    is_for=partial(_has_chats, images=True),
    items=_chats,
    inputs=_read_images,
)
