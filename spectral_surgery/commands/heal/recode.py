"""A compressed checkpoint with some of its spectra, and of what it copied, replaced by others of the same shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.lossless import raw_entries
from spectral_surgery.files.compressed.manifest import Manifest
from spectral_surgery.files.compressed.parts import joined, read_part
from spectral_surgery.files.writer import Entry, tensor_entry


def recoded(
    checkpoint: CompressedCheckpoint,
    replaced: Mapping[str, Sequence[Path]],
    key: str,
    copied: Mapping[str, Tensor],
    options: Mapping[str, object],
) -> tuple[list[Entry], Manifest]:
    """Entries and manifest of the checkpoint with other spectra.

    Raises CheckpointError when a file is missing or damaged.
    """
    kept = [info for name, info in checkpoint.index.tensors.items() if name not in copied]
    entries = {entry.name: entry for info in kept for entry in raw_entries(info)}
    records = dict(checkpoint.manifest.tensors)
    for name, files in replaced.items():
        parts = []
        for file in files:
            stored = read_part(file, key)
            if stored is None or stored[1] is None:
                raise CheckpointError(
                    f"{file}: expected the trained part of {name}, got nothing that is whole. Run again with --resume."
                )
            parts.append((stored[0], stored[1]))
        spectrum, counted = joined(name, parts)
        records[name] = replace(records[name], parts=counted)
        entries |= {entry.name: entry for entry in spectrum}
    entries |= {name: tensor_entry(name, tensor) for name, tensor in copied.items()}
    manifest = checkpoint.manifest
    return list(entries.values()), Manifest(
        records,
        manifest.aliases,
        dict(manifest.options) | dict(options),
        manifest.source,
        lossless={name: record for name, record in manifest.lossless.items() if name not in copied},
    )
