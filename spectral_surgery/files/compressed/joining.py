"""Parts that give way to the weight files they are joined to, so that a result takes its bytes on the disk once.

A part is removed when its tensor is in a weight file, on the disk. The manifest is written down before the first one
is: with it and the headers of unfinished weight files, a run that goes on finds such tensors again, and lets them stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from spectral_surgery.errors import CheckpointError, LimitError
from spectral_surgery.files.atomic import replace_file
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.manifest import SUFFIXES, Manifest, TensorRecord, parse_manifest
from spectral_surgery.files.header import TensorInfo, read_header
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.writer import Entry, copy_entry

_FILE = "joining.json"


@dataclass(frozen=True)
class JoinedTensor:
    """A compressed tensor that an earlier attempt has put into a weight file."""

    record: TensorRecord
    infos: tuple[TensorInfo, ...]

    def entries(self) -> list[Entry]:
        """To be written to the very place where they are."""
        return [copy_entry(info) for info in self.infos]


def write_down(units: Path, key: str, manifest: Manifest) -> None:
    """Remember a manifest in the folder of the parts, before any of them is removed."""
    body = {"key": key, "manifest": json.loads(manifest.to_json())}
    replace_file(units / _FILE, json.dumps(body).encode())


def joined_before(units: Path, key: str, folder: Path, paths: Mapping[str, list[Path]]) -> dict[str, JoinedTensor]:
    """Tensors whose parts an earlier attempt has removed, and that are intact in the weight files it has left.

    Args:
        units: folder of the parts.
        key: of the work.
        folder: of the weight files.
        paths: files of the parts of each tensor, by its name.
    """
    manifest = _manifest(units / _FILE, key)
    gone = {name for name, files in paths.items() if not all(file.exists() for file in files)}
    if manifest is None or not gone:
        return {}
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= read_header(file).tensors
        except CheckpointError:  # killed before its header was written
            continue
    index = CheckpointIndex(folder, tensors, (), (), (), {}, {})
    found = CompressedCheckpoint(index, manifest)
    names = sorted(gone & manifest.tensors.keys())
    intact = (name for name in names if _is_intact(found, name))
    return {
        name: JoinedTensor(manifest.tensors[name], tuple(tensors[f"{name}.{suffix}"] for suffix in SUFFIXES))
        for name in intact
    }


def _manifest(path: Path, key: str) -> Manifest | None:
    if not path.exists():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return parse_manifest(body["manifest"]) if body["key"] == key else None
    except (ValueError, KeyError, TypeError, CheckpointError):
        return None


def _is_intact(checkpoint: CompressedCheckpoint, name: str) -> bool:
    """Whether every part has its checksum."""
    if not all(f"{name}.{suffix}" in checkpoint.index.tensors for suffix in SUFFIXES):
        return False
    try:
        for part in range(len(checkpoint.manifest.tensors[name].parts)):
            checkpoint.part(name, part)
    except (CheckpointError, LimitError):
        return False
    return True


def giving_way(entries: list[Entry], files: list[Path]) -> list[Entry]:
    """The entries of a tensor; the files of its parts are removed when all of them are on the disk."""
    left = {entry.name for entry in entries}

    def stored(name: str) -> Callable[[], None]:
        def remove() -> None:
            left.discard(name)
            for file in files if not left else ():
                file.unlink(missing_ok=True)

        return remove

    return [replace(entry, stored=stored(entry.name)) for entry in entries]
