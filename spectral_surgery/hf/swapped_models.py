"""Swapped models in transformers: after `import spectral_surgery`, every from_pretrained rebuilds them."""

from __future__ import annotations

from typing import Any

import torch

from spectral_surgery.files.remote_code import forget_shim
from spectral_surgery.files.swap_record import SWAP_METHOD, SwapRecord, read_record
from spectral_surgery.hf.quant_method import LoadsFolders, QuantMethod
from spectral_surgery.live.swap import swap_attention


class Settings:
    """How a model was swapped."""

    record: SwapRecord

    def __init__(self, **settings: Any) -> None:
        """Take what config.json says.

        Raises:
            FormatVersionError: when a newer release wrote it.
            CheckpointError: when it is damaged.
        """
        self.record = read_record(settings)
        self.quant_method = SWAP_METHOD

    def to_dict(self) -> dict[str, Any]:
        """What config.json should say."""
        return self.record.to_json()


class Rebuilder(LoadsFolders):
    """What transformers asks while it loads and saves swapped models; see its HfQuantizer."""

    made_by = "swap"
    quantization_config: Settings

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        record = self.quantization_config.record
        with torch.device("meta"):
            swap_attention(model, record.mixer, record.layers, record.settings)
        forget_shim(model.config)
        return model


METHOD = QuantMethod(SWAP_METHOD, "SpectralSwap", Settings, Rebuilder)
__getattr__ = METHOD.attribute
