"""Operations on models in memory; nothing here opens a file."""

from spectral_surgery.live.attach import adapted_layers, detach, disabled, inject, load, set_active, state_of
from spectral_surgery.live.compression import compress_model
from spectral_surgery.live.merging import merge, merge_and_unload, unmerge
from spectral_surgery.live.swap import SwapSpec, swap_attention
from spectral_surgery.live.trained_spectra import freeze_spectra, kept_spectra, train_kept, unfreeze_spectra

__all__ = [
    "SwapSpec",
    "adapted_layers",
    "compress_model",
    "detach",
    "disabled",
    "freeze_spectra",
    "inject",
    "kept_spectra",
    "load",
    "merge",
    "merge_and_unload",
    "set_active",
    "state_of",
    "swap_attention",
    "train_kept",
    "unfreeze_spectra",
    "unmerge",
]
