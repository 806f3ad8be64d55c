"""A few lines of Python in a compressed or swapped folder, for users who do not import this package.

transformers meets an unknown ``quant_method`` with a warning and random weights. With ``trust_remote_code=True`` it
runs the file that ``auto_map`` in config.json names, and that file imports this package; transformers says so where it
is not installed. Without that option nothing can be done for them.
"""

from __future__ import annotations

from collections.abc import Mapping

SHIM_FILE = "shim_spectral_surgery.py"
_MODULE = SHIM_FILE.removesuffix(".py")
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
    """A configuration that names the file, unless the model brings code of its own.

    Args:
        config: content of config.json.
    """
    return {"auto_map": dict(_AUTO_MAP), **config}


def without_shim(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration that does not name the file.

    Args:
        config: content of config.json.
    """
    return {key: value for key, value in config.items() if key != "auto_map" or not is_shim(value)}


def is_shim(auto_map: object) -> bool:
    """Whether an ``auto_map`` is the one made here."""
    return isinstance(auto_map, Mapping) and any(str(own).startswith(f"{_MODULE}.") for own in auto_map.values())
