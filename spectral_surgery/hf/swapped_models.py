"""Swapped models in transformers: after `import spectral_surgery`, every from_pretrained rebuilds them.

transformers lets a quantiser change the modules of a model before it loads weights; a swap needs just that.
Source: transformers 5.23, `quantizers/base.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.files.remote_code import forget_shim
from spectral_surgery.files.swap_record import SWAP_METHOD, SwapRecord, read_record
from spectral_surgery.live.swap import swap_attention


def register() -> None:
    """Make transformers know swapped folders; once more changes nothing."""
    from transformers.quantizers import auto

    if SWAP_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(SWAP_METHOD)(config_class())
        auto.register_quantizer(SWAP_METHOD)(quantizer_class())


def __getattr__(name: str) -> object:
    made = {"SpectralSwapConfig": config_class, "SpectralSwapQuantizer": quantizer_class}
    if name in made:  # pickles find classes by their names
        return made[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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


@cache
def config_class() -> type:
    """The class of ``quantization_config`` in config.json."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    return type(
        "SpectralSwapConfig", (Settings, QuantizationConfigMixin), {"__doc__": Settings.__doc__, "__module__": __name__}
    )


class Rebuilder:
    """What transformers asks while it loads and saves swapped models; see its HfQuantizer."""

    pre_quantized: bool
    quantization_config: Settings

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse to swap on the fly."""
        if not self.pre_quantized:
            raise ConfigError(
                f"quantization_config: {SWAP_METHOD} for a folder that is not swapped; expected a swapped one. Run"
                " `spectral-surgery swap` first."
            )

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        record = self.quantization_config.record
        with torch.device("meta"):
            swap_attention(model, record.mixer, record.layers, record.settings)
        forget_shim(model.config)
        return model

    def is_serializable(self) -> bool:
        """Whether save_pretrained keeps the swap."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer takes it as it is: all its weights are ordinary ones."""
        return True


@cache
def quantizer_class() -> type:
    """`Rebuilder` as transformers wants it."""
    from transformers.quantizers.base import HfQuantizer

    return type(
        "SpectralSwapQuantizer", (Rebuilder, HfQuantizer), {"__doc__": Rebuilder.__doc__, "__module__": __name__}
    )
