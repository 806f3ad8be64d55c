"""A few lines of Python in a compressed or swapped folder, for users who do not import this package.

transformers meets an unknown ``quant_method`` with a warning and random weights. With ``trust_remote_code=True`` it
runs the file that ``auto_map`` in config.json names, and that file imports this package; transformers says so where it
is not installed. A model that brings code has it imported by the file, after this package. Without that
option nothing can be done for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHIM_FILE = "shim_spectral_surgery.py"
_MODULE = SHIM_FILE.removesuffix(".py")
_OF = "__of__"  # between a class of the model's code and its module
_CLASSES = (
    *("", "ForCausalLM", "ForMaskedLM", "ForSeq2SeqLM", "ForSequenceClassification", "ForTokenClassification"),
    *("ForQuestionAnswering", "ForImageClassification", "ForImageTextToText", "ForSpeechSeq2Seq"),
)
_AUTO_MAP = {f"AutoModel{task}": f"{_MODULE}.AutoModel{task}" for task in _CLASSES}

SHIM = '''"""Loads this folder, which spectral_surgery made; importing that package teaches transformers how."""

import spectral_surgery  # noqa: F401
import transformers


class _Loader:
    """Stands for a class of transformers, which knows the architecture."""

    name = ""

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        """Nothing: the code of the model is that of transformers."""

    @classmethod
    def from_pretrained(cls, *args, **settings):
        """Load as without this file, now that the format is known."""
        return getattr(transformers, cls.name).from_pretrained(*args, **{**settings, "trust_remote_code": False})


def __getattr__(name):
    if not name.startswith("AutoModel"):
        raise AttributeError(name)
    return type(name, (_Loader,), {"name": name})
'''


def with_shim(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration that names the file; classes of the model's code are found through it.

    Code of another repository (``org/name--module.Class``) is named as before: the file cannot import it.
    """
    entries = _entries(config.get("auto_map"))
    if any(key.startswith("AutoModel") for key in entries):
        return {**config, "auto_map": {key: _through_shim(key, value) for key, value in entries.items()}}
    return {**config, "auto_map": {**_AUTO_MAP, **entries}}


def notes_on(config: Mapping[str, object]) -> tuple[str, ...]:
    """What users of a folder have to know that the file does not do for them, in sentences.

    It cannot stand before code of another repository: a revision that is asked of that code would not reach it.
    """
    entries = {
        key: str(value) for key, value in _entries(config.get("auto_map")).items() if key.startswith("AutoModel")
    }
    others = sorted({value.partition("--")[0] for value in entries.values() if "--" in value})
    if not others or is_shim(entries):
        return ()
    return (
        f"its code is in another repository ({', '.join(others)}): to load the compressed folder, import"
        " spectral_surgery first; with trust_remote_code=True alone, transformers gives random weights and a warning",
    )


def without_shim(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration that does not name the file."""
    if not is_shim(config.get("auto_map")):
        return dict(config)
    entries = own_auto_map(config.get("auto_map"))
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    return {**rest, "auto_map": entries} if entries else rest


def shim_text(config: Mapping[str, object]) -> str:
    """What the file says."""
    classes = {_through(value) for value in _entries(config.get("auto_map")).values()} - {None}
    if not classes:
        return SHIM
    lines = [
        f"from .{origin[1]} import {origin[0]} as {origin[0]}{_OF}{origin[1]}  # noqa: F401"
        for origin in classes
        if origin
    ]
    return SHIM.partition("import transformers")[0] + "\n".join(["", *sorted(lines), ""])


def is_shim(auto_map: object) -> bool:
    """Whether an ``auto_map`` names the file."""
    return any(_after_repository(value).startswith(f"{_MODULE}.") for value in _entries(auto_map).values())


def own_auto_map(auto_map: object) -> dict[str, object]:
    """What an ``auto_map`` names besides the file, and through it."""
    entries: dict[str, object] = {}
    for key, value in _entries(auto_map).items():
        origin = _through(value)
        if origin is not None:
            repository, mark, _ = str(value).rpartition("--")
            entries[key] = f"{repository}{mark}{origin[1]}.{origin[0]}"
        elif not is_shim({key: value}):
            entries[key] = value
    return entries


def forget_shim(config: Any) -> None:
    """Let a configuration of a loaded model name the model's code alone: save_pretrained does not write the file."""
    if is_shim(getattr(config, "auto_map", None)):
        entries = own_auto_map(config.auto_map)
        del config.auto_map
        if entries:
            config.auto_map = entries


def _entries(auto_map: object) -> dict[str, object]:
    return {str(key): value for key, value in auto_map.items()} if isinstance(auto_map, Mapping) else {}


def _after_repository(value: object) -> str:
    return str(value).rpartition("--")[2]


def _through_shim(key: str, value: object) -> object:
    module, dot, name = str(value).partition(".")
    ours = key == "AutoConfig" or key.startswith("AutoModel")
    return f"{_MODULE}.{name}{_OF}{module}" if ours and dot and "--" not in module and module != _MODULE else value


def _through(value: object) -> tuple[str, str] | None:
    """Class and module that are found through the file."""
    module, _, name = _after_repository(value).partition(".")
    class_name, mark, source = name.partition(_OF)
    return (class_name, source) if module == _MODULE and mark else None
