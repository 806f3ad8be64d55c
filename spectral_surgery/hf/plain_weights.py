"""Models from checkpoints that another tool has quantised, with the weights that those stand for.

transformers can load some of them itself, others only on a GPU, and FP8 only where blocks fit without a rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from spectral_surgery.errors import required
from spectral_surgery.files.header import TensorInfo, read_json
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.files.sources import is_read_as_plain


@dataclass(frozen=True)
class _Stored:
    """A tensor that is read when transformers asks for it, as it asks a safetensors file."""

    info: TensorInfo

    def __getitem__(self, key: Any) -> Tensor:
        return read_tensor(self.info)[key]

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return self.info.dtype


def from_pretrained(
    cls: Any,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    of_config: Mapping[str, Any] = MappingProxyType({}),
    trust_remote_code: bool = False,
) -> Any:
    """`cls.from_pretrained` of a local folder.

    Args:
        cls: a class of transformers, or one that finds the class.
        settings: keyword arguments, of which ``dtype`` may be ``auto``.
        of_config: keyword arguments that change the configuration.
    """
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    file = folder / "config.json"
    if not file.is_file() or not is_read_as_plain(read_json(file)):
        return cls.from_pretrained(folder, **local, **settings, **of_config)
    import transformers

    config = plain_config(transformers.AutoConfig.from_pretrained(folder, **local, **of_config))
    if not issubclass(cls, transformers.PreTrainedModel):
        with without_weights():
            cls = type(cls.from_config(config, trust_remote_code=trust_remote_code))
    weights = {name: _Stored(info) for name, info in read_index(folder).tensors.items()}
    if settings["dtype"] == "auto":
        settings = {**settings, "dtype": getattr(config, "dtype", None) or torch.bfloat16}
    loaded = cls.from_pretrained(None, config=config, state_dict=weights, local_files_only=True, **settings)
    if (folder / "generation_config.json").is_file():
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return loaded


def plain_config(config: Any) -> Any:
    """A configuration of transformers that names no quantisation by another tool, changed in place."""
    for part in (config, config.get_text_config()):
        if is_read_as_plain({"quantization_config": getattr(part, "quantization_config", None)}):
            del part.quantization_config
    return config


def without_weights() -> AbstractContextManager[object]:
    """Build modules without memory for their parameters; buffers, which no file has, get their values."""
    accelerate = required("accelerate", "build models without weights")
    return cast("AbstractContextManager[object]", accelerate.init_empty_weights(include_buffers=False))
