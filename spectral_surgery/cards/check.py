"""Whether a folder is what it claims to be, before others get it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from spectral_surgery.cards.adapters import adapter_card
from spectral_surgery.cards.card import as_repository, metadata, read_card
from spectral_surgery.cards.checkpoints import compressed_card, merged_card, plain_card
from spectral_surgery.cards.content import CardContent
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.checkpoint import is_compressed, open_compressed
from spectral_surgery.files.compressed.manifest import FILE_NAME
from spectral_surgery.files.header import FLOATS, FLOATS8, named, read_json
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.merge_record import is_merged, read_record
from spectral_surgery.files.reader import flat_pieces
from spectral_surgery.progress import Progress, silent

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
METRICS_FILE = "metrics.json"  # of train alone, which also leaves folders that are not published

Kind = Literal["compressed", "adapter", "dense"]


@dataclass(frozen=True)
class Checked:
    """A folder that can be published.

    ``complete``: whether that is all that is known; else the command that made the folder may have said more.
    """

    kind: Kind
    index: CheckpointIndex
    content: CardContent
    complete: bool


def check_folder(folder: Path, *, progress: Progress = silent) -> Checked:
    """Check a folder: headers, completeness, and what its kind promises.

    Of a compressed checkpoint every checksum of the manifest is verified; of an adapter the configuration, and that
    its values are finite.

    Raises CheckpointError when it is incomplete or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder with a checkpoint or an adapter, got no such folder. Check the path."
        )
    if (folder / FILE_NAME).exists():
        return _compressed(folder, progress)
    if (folder / ADAPTER_CONFIG).exists():
        return _adapter(folder)
    index = read_index(folder)
    if is_compressed(folder):
        raise CheckpointError(
            f"{folder.name}: expected a complete folder, got a compressed one (config.json says so) without"
            f" {FILE_NAME}. Compress again, or fetch it again."
        )
    content = merged_card(read_record(folder), index) if is_merged(folder) else plain_card(index)
    return Checked("dense", index, content, complete=False)


def _compressed(folder: Path, progress: Progress) -> Checked:
    checkpoint = open_compressed(folder, differences=True)
    records = checkpoint.manifest.tensors
    for name in checkpoint.manifest.lossless:
        for _ in flat_pieces(checkpoint.index.tensors[name]):  # compares the checksum of each frame
            pass
    for number, (name, record) in enumerate(records.items()):
        for part in range(len(record.parts)):
            checkpoint.part(name, part)  # compares the checksum
        progress(number + 1, len(records), name)
    origin = as_repository(metadata(read_card(folder) or "").get("base_model"))
    return Checked("compressed", checkpoint.index, compressed_card(checkpoint, origin), complete=True)


def _adapter(folder: Path) -> Checked:
    config: Mapping[str, object] = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise CheckpointError(
            f"{folder.name}/{ADAPTER_CONFIG}: expected the name of a method as peft_type, got"
            f" {named([config.get('peft_type')])}. Save the adapter again."
        )
    if not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder.name}: expected an adapter in the format of PEFT, got none: {ADAPTER_FILE} is missing. Save it"
            " again."
        )
    index = read_index(folder, adapters=True)
    for name, info in index.tensors.items():
        floating = info.dtype in (*FLOATS, *FLOATS8)
        if floating and not all(bool(torch.isfinite(piece.float()).all()) for piece in flat_pieces(info)):
            raise CheckpointError(
                f"{folder.name}: expected finite numbers, got NaN or infinite values in {name}. Train the adapter"
                " again."
            )
    metrics = read_json(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else {}
    return Checked("adapter", index, adapter_card(config, index, metrics), complete=bool(metrics))
