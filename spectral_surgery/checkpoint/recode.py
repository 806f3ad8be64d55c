"""A compressed checkpoint with some of its spectra, and of what it copied, replaced by others of the same shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectral_surgery.checkpoint.compressed import CompressedCheckpoint
from spectral_surgery.checkpoint.manifest import SUFFIXES, Manifest
from spectral_surgery.checkpoint.units import copy_entry, part_record, step_entry
from spectral_surgery.checkpoint.writer import Entry, tensor_entry
from spectral_surgery.spectra.codec import EncodedSpectrum, EncodingReport

Encoded = tuple[EncodedSpectrum, EncodingReport]


def recoded(
    checkpoint: CompressedCheckpoint,
    replaced: Mapping[str, Sequence[Encoded]],
    copied: Mapping[str, Tensor],
    options: Mapping[str, object],
) -> tuple[list[Entry], Manifest]:
    """Entries and manifest of the checkpoint with other spectra.

    Args:
        checkpoint: where all the rest comes from, bit for bit.
        replaced: the parts of each tensor, in order, with their reports.
        copied: other values of tensors that are not compressed.
        options: added to those of the manifest.

    Returns:
        Entries for the writer, in the order of the checkpoint, and the manifest.
    """
    entries = {name: copy_entry(info) for name, info in checkpoint.index.tensors.items()}
    records = dict(checkpoint.manifest.tensors)
    for name, parts in replaced.items():
        record = records[name]
        own = [part_record(before.rows, *part) for before, part in zip(record.parts, parts, strict=True)]
        records[name] = replace(record, parts=tuple(own))
        entries |= {entry.name: entry for entry in _entries(name, [encoded for encoded, _ in parts])}
    entries |= {name: tensor_entry(name, tensor) for name, tensor in copied.items()}
    manifest = checkpoint.manifest
    return list(entries.values()), Manifest(
        records, manifest.aliases, dict(manifest.options) | dict(options), manifest.source
    )


def _entries(name: str, parts: Sequence[EncodedSpectrum]) -> list[Entry]:
    codes, frames, step = (f"{name}.{suffix}" for suffix in SUFFIXES)
    lengths = [len(frame) for part in parts for frame in part.frames]
    offsets = torch.cumsum(torch.tensor([0, *lengths]), 0)
    steps = torch.stack([torch.cat((part.step, torch.tensor([part.offset]))) for part in parts])
    return [
        Entry(codes, "U8", (sum(lengths),), lambda: (frame for part in parts for frame in part.frames)),
        Entry(frames, "I64", tuple(offsets.shape), lambda: [offsets.numpy().tobytes()]),
        step_entry(step, steps),
    ]
