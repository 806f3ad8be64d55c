"""Token mixers: what may stand in place of attention."""

from __future__ import annotations

from typing import Any

from spectral_surgery.mixers.base import Mixer, MixerMethod
from spectral_surgery.mixers.cache import MixerCache
from spectral_surgery.mixers.causal_fftnet import CAUSAL_FFTNET, CausalFFTNetMixer, CausalFFTNetMixerConfig
from spectral_surgery.mixers.components import (
    AdaptiveSpectralFilter,
    FourierTransform,
    InverseFourierTransform,
    ModReLU,
)
from spectral_surgery.mixers.fftnet import FFTNET, FFTNetMixer, FFTNetMixerConfig
from spectral_surgery.mixers.fnet import CAUSAL_FNET, FNET, CausalFNetMixer, FNetMixer
from spectral_surgery.mixers.hybrid import CAUSAL_HYBRID, HYBRID, HybridSpectralAttention
from spectral_surgery.mixers.probe import Leak, leak, require_causal
from spectral_surgery.mixers.projected import ProjectedMixer
from spectral_surgery.mixers.spectral_mixing import (
    CAUSAL_SPECTRAL_MIXING,
    SPECTRAL_MIXING,
    CausalSpectralMixing,
    SpectralMixing,
)
from spectral_surgery.mixers.spectral_mlp import CAUSAL_SPECTRAL_MLP, SPECTRAL_MLP, SpectralMLPBlock
from spectral_surgery.mixers.window_attention import WindowAttention
from spectral_surgery.registry import Table

__all__ = [
    "MIXERS",
    "AdaptiveSpectralFilter",
    "CausalFFTNetMixer",
    "CausalFFTNetMixerConfig",
    "CausalFNetMixer",
    "CausalSpectralMixing",
    "FFTNetMixer",
    "FFTNetMixerConfig",
    "FNetMixer",
    "FourierTransform",
    "HybridSpectralAttention",
    "InverseFourierTransform",
    "Leak",
    "Mixer",
    "MixerCache",
    "MixerMethod",
    "ModReLU",
    "ProjectedMixer",
    "SpectralMLPBlock",
    "SpectralMixing",
    "WindowAttention",
    "leak",
    "require_causal",
]

MIXERS: Table[MixerMethod[Any]] = Table(
    "mixer",
    [
        *(FNET, CAUSAL_FNET, FFTNET, CAUSAL_FFTNET, SPECTRAL_MIXING, CAUSAL_SPECTRAL_MIXING),
        *(SPECTRAL_MLP, CAUSAL_SPECTRAL_MLP, HYBRID, CAUSAL_HYBRID),
    ],
)
