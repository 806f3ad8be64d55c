"""Pages of compressed folders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from spectral_surgery.cards.card import as_repository
from spectral_surgery.cards.checkpoints import compressed_card
from spectral_surgery.codec.encoded import EncodingReport
from spectral_surgery.commands.report.page import Cell, Page, Section, sides, size, table
from spectral_surgery.commands.report.records import card_says, json_of, words
from spectral_surgery.commands.report.sizes import Stored, bytes_figure, layer_figures, rate_figure, shade, shades
from spectral_surgery.commands.report.training import healing_section
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, open_compressed
from spectral_surgery.files.compressed.difference import base_name
from spectral_surgery.files.compressed.manifest import FILE_NAME, FORMAT_VERSION, SUFFIXES
from spectral_surgery.files.header import DTYPE_BITS, TensorInfo
from spectral_surgery.files.storage import size_of

HEALING = "heal.json"


def compressed_page(folder: Path, title: str) -> Page:
    """The page of a compressed folder: weights, or differences to a base."""
    checkpoint = open_compressed(folder, differences=True)
    manifest = checkpoint.manifest
    total = manifest.report
    before, after = _sizes(checkpoint)
    spectra = {
        "bits per weight": f"{total.bits_per_weight:.3f}",
        "relative error": f"{total.relative_error:.4f}",
        "coefficients kept": f"{total.density:.1%}",
    }
    sizes = {"size": size(after), "compression ratio": f"{before / after:.2f}"}
    figures = (spectra if manifest.tensors else {}) | sizes
    reports = {name: record.report for name, record in manifest.tensors.items()}
    return Page(
        _kind(manifest.options),
        title,
        figures,
        (
            _making(folder, checkpoint, (before, after)),
            *_storage(checkpoint),
            _quality(reports),
            *healing_section(json_of(folder, HEALING)),
            _tensors(checkpoint),
        ),
    )


def copied_tensors(checkpoint: CompressedCheckpoint) -> list[TensorInfo]:
    """The tensors of a compressed folder that are stored bit for bit."""
    stored = {f"{name}.{suffix}" for name in checkpoint.manifest.tensors for suffix in SUFFIXES}
    return [info for name, info in checkpoint.index.tensors.items() if name not in stored]


def _sizes(checkpoint: CompressedCheckpoint) -> tuple[int, int]:
    """Bytes of all tensors before, those of a tie counted twice as they were stored, and of all files after."""
    manifest, index = checkpoint.manifest, checkpoint.index
    sizes = {name: math.prod(record.shape) * DTYPE_BITS[record.dtype] // 8 for name, record in manifest.tensors.items()}
    sizes |= {info.name: info.nbytes for info in copied_tensors(checkpoint)}
    before = sum(sizes.values()) + sum(sizes.get(name, 0) for name in manifest.aliases.values())
    manifest_file = index.root / FILE_NAME
    files = [*index.files, *([manifest_file] if manifest_file.exists() else [])]
    return before, sum(map(size_of, files))


def _kind(options: Mapping[str, object]) -> str:
    names = (("importance", "important coefficients kept"), ("calibration", "calibrated"), ("healing", "healed"))
    how = [name for key, name in names if options.get(key)]
    target = options.get("target")
    if isinstance(target, Mapping) and target.get("kind") == "lossless":
        return "Compressed checkpoint, bit for bit"
    what = "Differences to a base" if base_name(options) else "Compressed checkpoint"
    return f"{what}, {' and '.join(how) or 'data-free'}"


def _making(folder: Path, checkpoint: CompressedCheckpoint, sizes: tuple[int, int]) -> Section:
    manifest, config = checkpoint.manifest, checkpoint.index.config
    command, versions = card_says(folder)
    origin = as_repository(config.get("_name_or_path"))
    target = manifest.options.get("target")
    named = {"calibration": "Text for the codes", "importance": "Text for importance", "healing": "Trained on"}
    facts = {
        "Model": origin or "",
        "Architecture": words(config.get("architectures") or config.get("model_type") or ""),
        "Base": base_name(manifest.options) or "",
        "Asked for": f"{words(target['kind']).replace('_', ' ')} {words(target['value'])}"
        if isinstance(target, Mapping) and {"kind", "value"} <= target.keys()
        else words(target or ""),
        **{text: words(manifest.options.get(key) or "") for key, text in named.items()},
        "Other settings": ", ".join(
            f"{name.replace('_', ' ')} {words(value)}"
            for name, value in manifest.options.items()
            if name not in (*named, "target", "base") and value not in (None, "", [], False)
        ),
        "Bytes": f"{sizes[0]:,} before, {sizes[1]:,} after",
        "Source": f"{manifest.source}, SHA-256 over names, types and shapes of its tensors" if manifest.source else "",
        "Format": f"version {FORMAT_VERSION}",
        "Made with": versions,
    }
    command = command or compressed_card(checkpoint, origin).command
    return Section("How it was made", facts={name: text for name, text in facts.items() if text}, command=command)


def _storage(checkpoint: CompressedCheckpoint) -> tuple[Section, ...]:
    copied = copied_tensors(checkpoint)
    stored = [
        Stored(
            name,
            record.report.stored_bytes,
            shade(record.report.bits_per_weight),
            f"{record.report.bits_per_weight:.3f} bits per weight, error {record.report.relative_error:.4f}",
        )
        for name, record in checkpoint.manifest.tensors.items()
    ]
    stored += [Stored(info.name, info.stored_bytes, "plain", f"{info.dtype}, {_how(info)}") for info in copied]
    legend = shades([tensor.kind for tensor in stored])
    legend += (("plain", "copied bit for bit"),) if copied else ()
    figures = bytes_figure(stored, legend)
    return (Section("Where the bytes are", figures=figures),) if figures else ()


def _how(info: TensorInfo) -> str:
    return "copied bit for bit" if info.decoder is None else "coded without loss"


def _quality(reports: Mapping[str, EncodingReport]) -> Section:
    if not reports:
        return Section("Bits and error", text="No tensor is compressed.")
    points = [(name, report.bits_per_weight, report.relative_error) for name, report in reports.items()]
    points.sort(key=lambda point: -reports[point[0]].weights)
    return Section(
        "Bits and error", figures=(*layer_figures(reports), *rate_figure(points, named=False, what="tensor"))
    )


def _tensors(checkpoint: CompressedCheckpoint) -> Section:
    manifest = checkpoint.manifest
    compressed: list[dict[str, Cell]] = [
        {
            "tensor": name,
            "shape": sides(record.shape),
            "bytes": record.report.stored_bytes,
            "bits per weight": record.report.bits_per_weight,
            "relative error": record.report.relative_error,
            "kept": record.report.density,
            "weights": record.report.weights,
            "before": record.dtype,
            "transform": " and ".join(sorted({part.transform for part in record.parts})),
        }
        for name, record in manifest.tensors.items()
    ]
    copied: list[dict[str, Cell]] = [
        {
            "tensor": info.name,
            "shape": sides(info.shape),
            "bytes": info.stored_bytes,
            "dtype": info.dtype,
            "how": _how(info),
        }
        for info in copied_tensors(checkpoint)
    ]
    tied: list[dict[str, Cell]] = [{"tensor": alias, "stored as": name} for alias, name in manifest.aliases.items()]
    tables = (*table("Compressed", compressed), *table("Copied bit for bit", copied), *table("Tied", tied))
    return Section("All tensors", tables=tables)
