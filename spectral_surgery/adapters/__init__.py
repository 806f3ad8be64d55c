"""Adapters: small trainable weight updates of linear layers."""

from __future__ import annotations

from typing import Any

from spectral_surgery.adapters.base import AdapterMethod
from spectral_surgery.adapters.foura import FOURA
from spectral_surgery.adapters.fourierft import FOURIERFT
from spectral_surgery.adapters.fourierft_biased import FOURIERFT_BIASED
from spectral_surgery.adapters.lora import LORA
from spectral_surgery.adapters.spectral_delta import SPECTRAL_DELTA
from spectral_surgery.registry import Table

METHODS: Table[AdapterMethod[Any]] = Table("adapter method", [FOURIERFT, FOURIERFT_BIASED, FOURA, SPECTRAL_DELTA, LORA])
