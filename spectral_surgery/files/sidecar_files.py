"""The files beside the weights: configuration and tokenizer, copied as bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.manifest import QUANT_METHOD
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.remote_code import SHIM_FILE, is_shim, shim_text, with_shim, without_shim
from spectral_surgery.files.storage import Checkpoint, path_of
from spectral_surgery.files.swap_record import SWAP_METHOD

CONFIG_FILE = "config.json"


def check_apart(source: Checkpoint, out: Path) -> None:
    """Refuse to write a checkpoint over or into the one it is made from.

    Raises CheckpointError when out is the source, inside it or around it.
    """
    a, b = path_of(source).resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise CheckpointError(f"{out}: expected a folder apart from the source, got one that overlaps {source}.")


def copy_companions(index: CheckpointIndex, folder: Path, config: Mapping[str, object], *, without: str = "") -> None:
    """Copy every file that holds no weights, and write the configuration.

    A configuration that only this package understands gets the shim, see `remote_code.with_shim`; any other loses it.

    Args:
        config: new content of config.json, written when the checkpoint has one and it differs.
        without: a file to leave out.
    """
    for name in index.other_files:
        if str(name) in (without, SHIM_FILE):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(index.root / name, target)
    quantised = config.get("quantization_config")
    ours = isinstance(quantised, dict) and quantised.get("quant_method") in (QUANT_METHOD, SWAP_METHOD)
    config = with_shim(config) if ours else without_shim(config)
    if ours and is_shim(config["auto_map"]):
        (folder / SHIM_FILE).write_text(shim_text(config), encoding="utf-8")
    if index.config and config != index.config:
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
