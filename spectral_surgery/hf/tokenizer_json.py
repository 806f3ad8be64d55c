"""The tokenizer of a folder as data: what the library tokenizers would write to tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectral_surgery.errors import ConfigError, required
from spectral_surgery.hf.load_errors import loading
from spectral_surgery.hf.models import load_tokenizer


def tokenizer_json(folder: Path) -> dict[str, Any]:
    """The content of tokenizer.json, which is made where a folder has another kind of file.

    Raises:
        CheckpointError: when the folder has no tokenizer.
        ConfigError: when its tokenizer is code, and no data.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"{folder.name}: its tokenizer, {type(tokenizer).__name__}, is no table of tokens; expected one of the"
            " library tokenizers."
        )
    return json.loads(backend.to_str())  # type: ignore[no-any-return]


def names_of_splits() -> dict[str, str]:
    """Regular expressions by which texts are cut before tokens are looked up -> what llama.cpp calls them.

    Source: transformers 5.24, `integrations/gguf/gguf_tokenizer_mapping.py`.
    """
    required("transformers", "write GGUF files")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    names: dict[str, str] = {}
    for name, expression in GGUF_PRE_TOKENIZER_SPLITS.items():
        names.setdefault(expression, name)
    return names


def settled_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model with every default that transformers has.

    Raises CheckpointError when it does not know the configuration.
    """
    transformers = required("transformers", "read configurations")
    with loading(folder, "has no configuration that transformers knows"):
        found: dict[str, Any] = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    return found
