"""inspect: what a checkpoint holds, from headers; and what its spectra promise, from samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.quantizers.lattice import SAVED
from spectral_surgery.codec.quantizers.scalar import for_bits, for_density
from spectral_surgery.codec.rate import Magnitudes, Target
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.checkpoint import is_compressed, open_compressed
from spectral_surgery.files.compressed.difference import base_name
from spectral_surgery.files.compressed.plan import PlannedTensor, make_plan
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.header import DTYPE_BITS, TensorInfo, read_json
from spectral_surgery.files.index import CheckpointIndex, is_adapter, read_index
from spectral_surgery.files.reader import read_flat
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.progress import Progress, silent

DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5)
RATES = (2.0, 3.0, 4.0)
_SAMPLE = 1 << 20  # weights read of a tensor at most
_OF_ADAPTERS = (
    *("peft_type", "base_model_name_or_path", "task_type", "target_modules", "modules_to_save", "bias"),
    *("r", "lora_alpha", "alpha", "n_frequency", "scaling"),
)
_PLACEHOLDER = CompressOptions(Target("bits", 4.0))


@dataclass(frozen=True)
class Spectrum:
    """What the spectrum of one tensor promises, estimated on at most 2^20 of its weights.

    Attributes:
        energy_kept: fraction of the energy in the largest coefficients, at DENSITIES.
        energy_kept_weights: the same for the weights themselves.
        errors: relative error of a quantised spectrum, at RATES bits of entropy.
        error_at_a_fifth: relative error when 20 % of the coefficients are kept.
    """

    name: str
    weights: int
    energy_kept: tuple[float, ...]
    energy_kept_weights: tuple[float, ...]
    errors: tuple[float, ...]
    error_at_a_fifth: float

    def row(self) -> dict[str, object]:
        """Plain values for a table."""
        shares = {f"energy in {d:.0%}": value for d, value in zip(DENSITIES, self.energy_kept, strict=True)}
        errors = {f"error at {rate:g} bits": value for rate, value in zip(RATES, self.errors, strict=True)}
        return {"tensor": self.name, **shares, "same, weights 20%": self.energy_kept_weights[3], **errors}


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        kind: ``dense``, ``quantised`` elsewhere, ``compressed``, or ``adapter``.
        tensors: name, shape, dtype, bytes and fate of each, where fate is what compress would do.
        tied: second name -> first name.
        skipped_files: weights in other formats beside them.
        summary: of a compressed folder, what its manifest says, of spectra and of what is coded without loss; of an
            adapter, what its configuration says.
        notes: what is odd about it, and why compress refuses it, in sentences.
    """

    kind: str
    tensors: tuple[dict[str, object], ...]
    tied: dict[str, str]
    nbytes: int
    skipped_files: tuple[str, ...]
    summary: dict[str, object]
    spectra: tuple[Spectrum, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return vars(self) | {"spectra": [vars(spectrum) for spectrum in self.spectra]}


def inspect(
    source: Checkpoint,
    *,
    spectrum: bool = False,
    include: tuple[str, ...] = (),
    compare: bool = True,
    progress: Progress = silent,
) -> Inspection:
    """Look at a checkpoint without building a model.

    Args:
        source: a folder, dense, quantised, compressed or of an adapter, or a .safetensors file.
        spectrum: also read samples of the tensors and estimate what their spectra promise.
        compare: read tensors that may be tied; without, as for an outline of a remote checkpoint, none is taken to be.

    Raises:
        CheckpointError: when the source is not a usable checkpoint.
        ConfigError: when spectra of anything else than a dense one are asked for.
    """
    if is_compressed(source):
        if spectrum:
            raise ConfigError(
                f"{source.name}: expected a dense model for --spectrum, got a compressed one. Decompress it."
            )
        return _compressed(source)
    index = read_index(source, adapters=True)
    adapter = is_adapter(source)
    refused = index.why_not_plain
    if spectrum and (adapter or refused):
        what = "expected a model for --spectrum, got an adapter. Give its base." if adapter else f"{refused}"
        raise ConfigError(f"{source.name}: {what}")
    if adapter:
        return _adapter(index)
    if refused:
        notes = (*index.notes, f"compress refuses it: {refused}")
        skipped = tuple(map(str, index.skipped_files))
        return Inspection("quantised", _rows(index), {}, index.nbytes, skipped, {}, notes=notes)
    options = CompressOptions(_PLACEHOLDER.target, include=include)
    try:
        plan = make_plan(index, options, compare=compare)
    except ConfigError:  # nothing to compress is an answer here, not an error
        skipped = tuple(map(str, index.skipped_files))
        return Inspection("dense", _rows(index, {}), {}, index.nbytes, skipped, {}, notes=index.notes)
    fates = plan.copied | {alias: f"tied to {name}" for alias, name in plan.aliases.items()}
    spectra = []
    for number, tensor in enumerate(plan.tensors if spectrum else ()):
        spectra.append(measure(tensor))
        progress(number + 1, len(plan.tensors), tensor.info.name)
    skipped = tuple(map(str, index.skipped_files))
    rows = _rows(index, fates)
    return Inspection("dense", rows, plan.aliases, index.nbytes, skipped, {}, tuple(spectra), index.notes)


def measure(tensor: PlannedTensor, basis: Basis | None = None) -> Spectrum:
    """Estimate what the spectrum of a tensor promises. Raises ConfigError when the sample is not finite."""
    basis = basis or Basis(axes=tensor.axes)
    step = min(basis.tile, tensor.rows)
    starts = range(0, tensor.rows, step)
    stride = max(1, len(starts) * step * tensor.columns // _SAMPLE)
    plain, transformed = [], []
    for start in starts[::stride]:
        stop = min(start + step, tensor.rows)
        rows = read_flat(tensor.info, start * tensor.columns, stop * tensor.columns).float()
        plain.append(rows)
        transformed.append(basis.forward(rows.reshape(stop - start, -1)).reshape(-1))
    weights = torch.cat(plain)
    if not bool(torch.isfinite(weights).all()):
        raise ConfigError(f"{tensor.info.name}: expected finite weights, got NaN or infinite ones. Exclude it.")
    spectrum = Magnitudes(torch.cat(transformed).numpy())
    if not spectrum.rms:
        return Spectrum(tensor.info.name, weights.numel(), (1.0,) * 5, (1.0,) * 5, (0.0,) * 3, 0.0)
    fifth = for_density(spectrum, spectrum.quantile(0.2)).estimate(spectrum).distortion
    return Spectrum(
        tensor.info.name,
        weights.numel(),
        _energy_curve(spectrum),
        _energy_curve(Magnitudes(weights.numpy())),
        tuple(float(np.sqrt(for_bits(spectrum, rate + SAVED).estimate(spectrum).distortion)) for rate in RATES),
        float(np.sqrt(fifth)),
    )


def _energy_curve(magnitudes: Magnitudes) -> tuple[float, ...]:
    return tuple(1 - magnitudes.dropped(magnitudes.quantile(density)) for density in DENSITIES)


def _rows(index: CheckpointIndex, fates: dict[str, str] | None = None) -> tuple[dict[str, object], ...]:
    """Name, shape, dtype and bytes of each tensor, and where compress takes the checkpoint, what it would do."""

    def fate(name: str) -> dict[str, object]:
        if fates is None:
            return {"compress would": "refuse it"}
        return {"compress would": f"copy it: {fates[name]}" if name in fates else "compress it"}

    return tuple(
        {"name": name, "shape": list(info.shape), "dtype": info.dtype, "bytes": info.stored_bytes, **fate(name)}
        for name, info in index.tensors.items()
    )


def _adapter(index: CheckpointIndex) -> Inspection:
    config = read_json(index.root / "adapter_config.json")
    summary = {key: config[key] for key in _OF_ADAPTERS if config.get(key) not in (None, [], {})}
    notes = ("compress and inject take models: merge the adapter into its base, or give that base.",)
    return Inspection("adapter", _rows(index), {}, index.nbytes, (), summary, notes=notes)


def _compressed(source: Checkpoint) -> Inspection:
    checkpoint = open_compressed(source, differences=True)
    manifest = checkpoint.manifest
    rows: list[dict[str, object]] = [
        {
            "name": name,
            "shape": list(record.shape),
            "dtype": record.dtype,
            "bytes": record.report.stored_bytes,
            "bits_per_weight": record.report.bits_per_weight,
            "relative_error": record.report.relative_error,
            "transform": "+".join(sorted({part.transform for part in record.parts})),
        }
        for name, record in manifest.tensors.items()
    ]
    infos = [checkpoint.index.tensors[name] for name in manifest.lossless]
    rows += [
        {
            "name": info.name,
            "shape": list(info.shape),
            "dtype": info.dtype,
            "bytes": info.stored_bytes,
            "bits_per_weight": 8 * info.stored_bytes / info.numel,
            "relative_error": 0.0,
            "transform": "none, lossless",
        }
        for info in infos
    ]
    before = base_name(manifest.options)
    summary: dict[str, object] = {"differences_to": before} if before else {}
    summary |= {"compressed_tensors": len(manifest.tensors), "lossless_tensors": len(infos)}
    if manifest.tensors:
        total = manifest.report
        summary |= {
            "weights": total.weights,
            "bits_per_weight": total.bits_per_weight,
            "relative_error": total.relative_error,
            "density": total.density,
        }
    if infos:
        stored, before_bits = (sum(sizes) for sizes in zip(*map(_bits, infos), strict=True))
        summary |= {"lossless_numbers": sum(info.numel for info in infos), "lossless_of_original": stored / before_bits}
    summary["options"] = manifest.options
    return Inspection("compressed", tuple(rows), manifest.aliases, checkpoint.index.nbytes, (), summary)


def _bits(info: TensorInfo) -> tuple[int, int]:
    """Stored bits of a tensor, and those of its numbers."""
    return 8 * info.stored_bytes, DTYPE_BITS[info.dtype] * info.numel
