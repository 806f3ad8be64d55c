"""How transformers is told of folders that it cannot load by itself: a ``quant_method`` of config.json.

transformers lets a quantiser change the modules of a model before it loads weights; compressed folders and swapped
models need just that. Source: transformers 5.24, `quantizers/base.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from spectral_surgery.errors import ConfigError


class LoadsFolders:
    """What quantisers of ours have in common: they load what a command wrote, and it is saved and trained as it is."""

    made_by: ClassVar[str]  # a command
    is_trainable = True  # adapters on it
    is_qat_trainable = True  # all else that has gradients: Trainer asks for no adapter of PEFT
    pre_quantized: bool

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse to do it on the fly."""
        if not self.pre_quantized:
            raise ConfigError(
                f"quantization_config: expected a folder that `spectral-surgery {self.made_by}` wrote, got a plain one."
                " Run that first."
            )

    def is_serializable(self) -> bool:
        """Whether save_pretrained keeps it."""
        return True


@dataclass(frozen=True)
class QuantMethod:
    """A ``quant_method``: settings and quantiser, of which classes that transformers takes are made when asked for.

    ``stem``: beginning of the names of those classes, by which pickles find them in the module of the settings.
    """

    name: str
    stem: str
    settings: type
    quantizer: type[LoadsFolders]

    @cached_property
    def classes(self) -> dict[str, type]:
        """The class of ``quantization_config`` in config.json, and that of the quantiser, by name."""
        from transformers.quantizers.base import HfQuantizer
        from transformers.utils.quantization_config import QuantizationConfigMixin

        pairs = {"Config": (self.settings, QuantizationConfigMixin), "Quantizer": (self.quantizer, HfQuantizer)}
        names = {f"{self.stem}{end}": bases for end, bases in pairs.items()}
        return {
            name: type(name, bases, {"__doc__": bases[0].__doc__, "__module__": bases[0].__module__})
            for name, bases in names.items()
        }

    def register(self) -> None:
        """Make transformers know it; once more changes nothing."""
        from transformers.quantizers import auto

        if self.name not in auto.AUTO_QUANTIZER_MAPPING:
            config, quantizer = self.classes.values()
            auto.register_quantization_config(self.name)(config)
            auto.register_quantizer(self.name)(quantizer)

    def attribute(self, name: str) -> type:
        """One of the classes, for the ``__getattr__`` of their module."""
        if name in (f"{self.stem}Config", f"{self.stem}Quantizer"):
            return self.classes[name]
        raise AttributeError(f"module {self.settings.__module__!r} has no attribute {name!r}")
