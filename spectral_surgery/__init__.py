"""Model surgery and checkpoint compression in the frequency domain.

Shape letters used in all docstrings: B batch, T tokens, D model width, O out_features, I in_features, K kept
coefficients, P tile side, R rank, F = T // 2 + 1 frequency bins, N any count. Weights are [O, I] always.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from spectral_surgery.hf.after_import import when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.adapters.base import AdapterSpec, AdapterState
    from spectral_surgery.calibration.layer_moments import CalibrationData
    from spectral_surgery.codec.encode import encode
    from spectral_surgery.codec.encoded import Basis, EncodedSpectrum, EncodingReport
    from spectral_surgery.codec.quality import bits_per_weight, energy_kept, relative_error, snr_db
    from spectral_surgery.codec.quantized import QuantizedSpectrum
    from spectral_surgery.codec.rate import Target
    from spectral_surgery.commands.compress import CompressReport, Healing, compress, compress_shard
    from spectral_surgery.commands.decompress import DecompressReport, decompress
    from spectral_surgery.commands.eval import evaluate
    from spectral_surgery.commands.extract import extract
    from spectral_surgery.commands.heal import HealReport, heal
    from spectral_surgery.commands.merge import merge
    from spectral_surgery.commands.merge.unmerge import unmerge
    from spectral_surgery.commands.pull import pull
    from spectral_surgery.commands.push import push
    from spectral_surgery.commands.swap import swap
    from spectral_surgery.commands.train import train
    from spectral_surgery.commands.train.from_scratch import train_from_scratch
    from spectral_surgery.errors import SpectralSurgeryError
    from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, open_compressed
    from spectral_surgery.files.compressed.plan import CompressOptions
    from spectral_surgery.files.index import CheckpointIndex, read_index
    from spectral_surgery.files.peft.adapter_files import read_adapter, write_adapter
    from spectral_surgery.hf.fftnet.models import (
        FFTNetConfig,
        FFTNetForCausalLM,
        FFTNetForMaskedLM,
        FFTNetForSequenceClassification,
        FFTNetModel,
    )
    from spectral_surgery.hf.peft.accelerate import accelerate_peft
    from spectral_surgery.hf.quantizer.load_compressed import load_compressed
    from spectral_surgery.hub import resolve
    from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear
    from spectral_surgery.live.attach import detach, inject, state_of
    from spectral_surgery.live.compress_model import compress_model
    from spectral_surgery.live.kept_spectra import freeze_spectra, kept_spectra, train_kept, unfreeze_spectra
    from spectral_surgery.live.swap import swap_attention
    from spectral_surgery.mixers import MIXERS
    from spectral_surgery.run import Run
    from spectral_surgery.sparse.tensor import SparseSpectralTensor, sst
    from spectral_surgery.targets import ModuleTargets
    from spectral_surgery.text.heal_text import HealData
    from spectral_surgery.training.loop import DistillSettings
    from spectral_surgery.transforms import TRANSFORMS

# Where each public name lives; loaded when first used, so that importing the package stays light.
_HOMES = {
    "AdapterSpec": "adapters.base",
    "AdapterState": "adapters.base",
    "Basis": "codec.encoded",
    "CalibrationData": "calibration.layer_moments",
    "CheckpointIndex": "files.index",
    "CompressOptions": "files.compressed.plan",
    "CompressReport": "commands.compress",
    "CompressedCheckpoint": "files.compressed.checkpoint",
    "DecompressReport": "commands.decompress",
    "DistillSettings": "training.loop",
    "EncodedSpectrum": "codec.encoded",
    "EncodingReport": "codec.encoded",
    "FFTNetConfig": "hf.fftnet.models",
    "FFTNetForCausalLM": "hf.fftnet.models",
    "FFTNetForMaskedLM": "hf.fftnet.models",
    "FFTNetForSequenceClassification": "hf.fftnet.models",
    "FFTNetModel": "hf.fftnet.models",
    "HealData": "text.heal_text",
    "HealReport": "commands.heal",
    "Healing": "commands.compress",
    "METHODS": "adapters",
    "MIXERS": "mixers",
    "ModuleTargets": "targets",
    "Run": "run",
    "QuantizedSpectrum": "codec.quantized",
    "SparseSpectralTensor": "sparse.tensor",
    "SpectralConv1D": "layers",
    "SpectralEmbedding": "layers",
    "SpectralLinear": "layers",
    "SpectralSurgeryError": "errors",
    "TRANSFORMS": "transforms",
    "Target": "codec.rate",
    "accelerate_peft": "hf.peft.accelerate",
    "bits_per_weight": "codec.quality",
    "compress": "commands.compress",
    "compress_shard": "commands.compress",
    "compress_model": "live.compress_model",
    "decompress": "commands.decompress",
    "detach": "live.attach",
    "encode": "codec.encode",
    "energy_kept": "codec.quality",
    "evaluate": "commands.eval",
    "extract": "commands.extract",
    "freeze_spectra": "live.kept_spectra",
    "heal": "commands.heal",
    "inject": "live.attach",
    "kept_spectra": "live.kept_spectra",
    "load_compressed": "hf.quantizer.load_compressed",
    "merge": "commands.merge",
    "open_compressed": "files.compressed.checkpoint",
    "pull": "commands.pull",
    "push": "commands.push",
    "read_adapter": "files.peft.adapter_files",
    "read_index": "files.index",
    "relative_error": "codec.quality",
    "resolve": "hub",
    "snr_db": "codec.quality",
    "sst": "sparse.tensor",
    "state_of": "live.attach",
    "swap": "commands.swap",
    "swap_attention": "live.swap",
    "train": "commands.train",
    "train_from_scratch": "commands.train.from_scratch",
    "train_kept": "live.kept_spectra",
    "unfreeze_spectra": "live.kept_spectra",
    "unmerge": "commands.merge.unmerge",
    "write_adapter": "files.peft.adapter_files",
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
    "Healing",
    "ModuleTargets",
    "QuantizedSpectrum",
    "Run",
    "SparseSpectralTensor",
    "SpectralConv1D",
    "SpectralEmbedding",
    "SpectralLinear",
    "SpectralSurgeryError",
    "Target",
    "accelerate_peft",
    "bits_per_weight",
    "compress",
    "compress_model",
    "compress_shard",
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
when_imported("peft", f"{__name__}.hf.peft.plugin", "register")
# An unknown kind of compression would load as random weights with a mere warning.
when_imported("transformers.quantizers.auto", f"{__name__}.hf.quantizer.plugin", "register")
# Folders of FFTNet models are found by the Auto classes.
when_imported("transformers.models.auto.configuration_auto", f"{__name__}.hf.fftnet.models", "register_config")
when_imported("transformers.models.auto.modeling_auto", f"{__name__}.hf.fftnet.models", "register_models")
