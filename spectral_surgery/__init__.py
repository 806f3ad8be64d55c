"""Model surgery and checkpoint compression in the frequency domain.

Shape letters used in all docstrings: B batch, T tokens, D model width, O out_features, I in_features, K kept
coefficients, P tile side, R rank, F = T // 2 + 1 frequency bins, N any count. Weights are [O, I] always.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from spectral_surgery.integrations.after_import import when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.adapters.base import AdapterSpec, AdapterState
    from spectral_surgery.checkpoint.adapter_files import read_adapter, write_adapter
    from spectral_surgery.checkpoint.compressed import CompressedCheckpoint, open_compressed
    from spectral_surgery.checkpoint.index import CheckpointIndex, read_index
    from spectral_surgery.checkpoint.plan import CompressOptions
    from spectral_surgery.errors import SpectralSurgeryError
    from spectral_surgery.hub import resolve
    from spectral_surgery.integrations.fftnet_models import (
        FFTNetConfig,
        FFTNetForCausalLM,
        FFTNetForMaskedLM,
        FFTNetForSequenceClassification,
        FFTNetModel,
    )
    from spectral_surgery.integrations.load import load_compressed
    from spectral_surgery.integrations.peft_accelerate import accelerate_peft
    from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear
    from spectral_surgery.mixers import MIXERS
    from spectral_surgery.spectra.codec import Basis, EncodedSpectrum, EncodingReport
    from spectral_surgery.spectra.encode import encode
    from spectral_surgery.spectra.quality import bits_per_weight, energy_kept, relative_error, snr_db
    from spectral_surgery.spectra.quantized import QuantizedSpectrum
    from spectral_surgery.spectra.select import Target
    from spectral_surgery.spectra.sparse import SparseSpectralTensor, sst
    from spectral_surgery.surgery.attach import detach, inject, state_of
    from spectral_surgery.surgery.compress_live import compress_model
    from spectral_surgery.surgery.kept import freeze_spectra, kept_spectra, train_kept, unfreeze_spectra
    from spectral_surgery.surgery.swap import swap_attention
    from spectral_surgery.targets import ModuleTargets
    from spectral_surgery.transforms import TRANSFORMS
    from spectral_surgery.workflows.calibrate import compress_calibrated
    from spectral_surgery.workflows.compress import CompressReport, compress
    from spectral_surgery.workflows.compress_heal import compress_healed
    from spectral_surgery.workflows.decompress import DecompressReport, decompress
    from spectral_surgery.workflows.distill import DistillSettings
    from spectral_surgery.workflows.evaluate import evaluate
    from spectral_surgery.workflows.extract import extract
    from spectral_surgery.workflows.heal import HealReport, heal
    from spectral_surgery.workflows.heal_text import HealData
    from spectral_surgery.workflows.layer_moments import CalibrationData
    from spectral_surgery.workflows.merge import merge
    from spectral_surgery.workflows.pull import pull
    from spectral_surgery.workflows.push import push
    from spectral_surgery.workflows.swap import swap
    from spectral_surgery.workflows.train import train
    from spectral_surgery.workflows.train_from_scratch import train_from_scratch
    from spectral_surgery.workflows.unmerge import unmerge

# Where each public name lives; loaded when first used, so that importing the package stays light.
_HOMES = {
    "AdapterSpec": "adapters.base",
    "AdapterState": "adapters.base",
    "Basis": "spectra.codec",
    "CalibrationData": "workflows.layer_moments",
    "CheckpointIndex": "checkpoint.index",
    "CompressOptions": "checkpoint.plan",
    "CompressReport": "workflows.compress",
    "CompressedCheckpoint": "checkpoint.compressed",
    "DecompressReport": "workflows.decompress",
    "DistillSettings": "workflows.distill",
    "EncodedSpectrum": "spectra.codec",
    "EncodingReport": "spectra.codec",
    "FFTNetConfig": "integrations.fftnet_models",
    "FFTNetForCausalLM": "integrations.fftnet_models",
    "FFTNetForMaskedLM": "integrations.fftnet_models",
    "FFTNetForSequenceClassification": "integrations.fftnet_models",
    "FFTNetModel": "integrations.fftnet_models",
    "HealData": "workflows.heal_text",
    "HealReport": "workflows.heal",
    "METHODS": "adapters",
    "MIXERS": "mixers",
    "ModuleTargets": "targets",
    "QuantizedSpectrum": "spectra.quantized",
    "SparseSpectralTensor": "spectra.sparse",
    "SpectralConv1D": "layers",
    "SpectralEmbedding": "layers",
    "SpectralLinear": "layers",
    "SpectralSurgeryError": "errors",
    "TRANSFORMS": "transforms",
    "Target": "spectra.select",
    "accelerate_peft": "integrations.peft_accelerate",
    "bits_per_weight": "spectra.quality",
    "compress": "workflows.compress",
    "compress_calibrated": "workflows.calibrate",
    "compress_healed": "workflows.compress_heal",
    "compress_model": "surgery.compress_live",
    "decompress": "workflows.decompress",
    "detach": "surgery.attach",
    "encode": "spectra.encode",
    "energy_kept": "spectra.quality",
    "evaluate": "workflows.evaluate",
    "extract": "workflows.extract",
    "freeze_spectra": "surgery.kept",
    "heal": "workflows.heal",
    "inject": "surgery.attach",
    "kept_spectra": "surgery.kept",
    "load_compressed": "integrations.load",
    "merge": "workflows.merge",
    "open_compressed": "checkpoint.compressed",
    "pull": "workflows.pull",
    "push": "workflows.push",
    "read_adapter": "checkpoint.adapter_files",
    "read_index": "checkpoint.index",
    "relative_error": "spectra.quality",
    "resolve": "hub",
    "snr_db": "spectra.quality",
    "sst": "spectra.sparse",
    "state_of": "surgery.attach",
    "swap": "workflows.swap",
    "swap_attention": "surgery.swap",
    "train": "workflows.train",
    "train_from_scratch": "workflows.train_from_scratch",
    "train_kept": "surgery.kept",
    "unfreeze_spectra": "surgery.kept",
    "unmerge": "workflows.unmerge",
    "write_adapter": "checkpoint.adapter_files",
}

__all__ = [
    "METHODS",
    "MIXERS",
    "TRANSFORMS",
    "AdapterSpec",
    "AdapterState",
    "Basis",
    "CalibrationData",
    "CheckpointIndex",
    "CompressOptions",
    "CompressReport",
    "CompressedCheckpoint",
    "DecompressReport",
    "DistillSettings",
    "EncodedSpectrum",
    "EncodingReport",
    "FFTNetConfig",
    "FFTNetForCausalLM",
    "FFTNetForMaskedLM",
    "FFTNetForSequenceClassification",
    "FFTNetModel",
    "HealData",
    "HealReport",
    "ModuleTargets",
    "QuantizedSpectrum",
    "SparseSpectralTensor",
    "SpectralConv1D",
    "SpectralEmbedding",
    "SpectralLinear",
    "SpectralSurgeryError",
    "Target",
    "accelerate_peft",
    "bits_per_weight",
    "compress",
    "compress_calibrated",
    "compress_healed",
    "compress_model",
    "decompress",
    "detach",
    "encode",
    "energy_kept",
    "evaluate",
    "extract",
    "freeze_spectra",
    "heal",
    "inject",
    "kept_spectra",
    "load_compressed",
    "merge",
    "open_compressed",
    "pull",
    "push",
    "read_adapter",
    "read_index",
    "relative_error",
    "resolve",
    "snr_db",
    "sst",
    "state_of",
    "swap",
    "swap_attention",
    "train",
    "train_from_scratch",
    "train_kept",
    "unfreeze_spectra",
    "unmerge",
    "write_adapter",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# PEFT has to know our methods before it reads an adapter, and importing this package does not import PEFT.
when_imported("peft", f"{__name__}.integrations.peft_plugin", "register")
# An unknown kind of compression would load as random weights with a mere warning.
when_imported("transformers.quantizers.auto", f"{__name__}.integrations.transformers_plugin", "register")
# Folders of FFTNet models are found by the Auto classes.
when_imported(
    "transformers.models.auto.configuration_auto", f"{__name__}.integrations.fftnet_models", "register_config"
)
when_imported("transformers.models.auto.modeling_auto", f"{__name__}.integrations.fftnet_models", "register_models")
