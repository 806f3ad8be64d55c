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
    from spectral_surgery.checkpoint.compressed import CompressedCheckpoint, open_compressed
    from spectral_surgery.checkpoint.index import CheckpointIndex, read_index
    from spectral_surgery.checkpoint.plan import CompressOptions
    from spectral_surgery.errors import SpectralSurgeryError
    from spectral_surgery.hub import resolve
    from spectral_surgery.integrations.load import load_compressed
    from spectral_surgery.integrations.peft_accelerate import accelerate_peft
    from spectral_surgery.spectra.codec import Basis, EncodedSpectrum, EncodingReport, encode
    from spectral_surgery.spectra.quality import bits_per_weight, energy_kept, relative_error, snr_db
    from spectral_surgery.spectra.quantized import QuantizedSpectrum
    from spectral_surgery.spectra.select import Target
    from spectral_surgery.spectra.sparse import SparseSpectralTensor, sst
    from spectral_surgery.transforms import TRANSFORMS
    from spectral_surgery.workflows.compress import CompressReport, compress
    from spectral_surgery.workflows.decompress import DecompressReport, decompress

# Where each public name lives; loaded when first used, so that importing the package stays light.
_HOMES = {
    "Basis": "spectra.codec",
    "CheckpointIndex": "checkpoint.index",
    "CompressOptions": "checkpoint.plan",
    "CompressReport": "workflows.compress",
    "CompressedCheckpoint": "checkpoint.compressed",
    "DecompressReport": "workflows.decompress",
    "EncodedSpectrum": "spectra.codec",
    "EncodingReport": "spectra.codec",
    "QuantizedSpectrum": "spectra.quantized",
    "SparseSpectralTensor": "spectra.sparse",
    "SpectralSurgeryError": "errors",
    "TRANSFORMS": "transforms",
    "Target": "spectra.select",
    "accelerate_peft": "integrations.peft_accelerate",
    "bits_per_weight": "spectra.quality",
    "compress": "workflows.compress",
    "decompress": "workflows.decompress",
    "encode": "spectra.codec",
    "energy_kept": "spectra.quality",
    "load_compressed": "integrations.load",
    "open_compressed": "checkpoint.compressed",
    "read_index": "checkpoint.index",
    "relative_error": "spectra.quality",
    "resolve": "hub",
    "snr_db": "spectra.quality",
    "sst": "spectra.sparse",
}

__all__ = [
    "TRANSFORMS",
    "Basis",
    "CheckpointIndex",
    "CompressOptions",
    "CompressReport",
    "CompressedCheckpoint",
    "DecompressReport",
    "EncodedSpectrum",
    "EncodingReport",
    "QuantizedSpectrum",
    "SparseSpectralTensor",
    "SpectralSurgeryError",
    "Target",
    "accelerate_peft",
    "bits_per_weight",
    "compress",
    "decompress",
    "encode",
    "energy_kept",
    "load_compressed",
    "open_compressed",
    "read_index",
    "relative_error",
    "resolve",
    "snr_db",
    "sst",
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
