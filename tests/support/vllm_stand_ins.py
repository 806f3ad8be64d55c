"""Stand-ins for what the plug-in asks of vLLM, where it is not installed: registries, base classes and packed layers.

Their interfaces are those of vLLM 0.32; that they are is tested by `benchmarks vllm`, which runs vLLM itself.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectral_surgery.hf.vllm.classes import classes

PADDED = 64  # rows of a vocabulary are a multiple of this


@dataclass(frozen=True)
class LoadConfig:
    load_format: str = "spectral_surgery"
    model_loader_extra_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    model_or_path: str
    revision: str | None = None
    subfolder: str | None = None
    prefix: str = ""
    fall_back_to_pt: bool = True
    allow_patterns_overrides: list[str] | None = None


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra: Any) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        del layer


class LinearMethodBase(QuantizeMethodBase):
    pass


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


class Plain(LinearMethodBase):
    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra: Any) -> None: ...

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, layer.weight, bias)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return functional.embedding(ids, layer.weight)


class LinearBase(nn.Module):
    """A layer that is packed of several: ``sizes`` are their rows, ``cut`` the devices that share it."""

    def __init__(self, config: Any, columns: int, sizes: list[int], prefix: str, cut: int = 1) -> None:
        super().__init__()
        self.output_size = sum(sizes)
        self.quant_method = config.get_quant_method(self, prefix)
        parts = [size // cut for size in sizes]
        self.quant_method.create_weights(
            self, columns, parts, columns, self.output_size, torch.float32, weight_loader=None
        )


class VocabParallelEmbedding(nn.Module):
    def __init__(self, config: Any, rows: int, columns: int, prefix: str) -> None:
        super().__init__()
        self.org_vocab_size, self.output_size = rows, -(-rows // PADDED) * PADDED
        self.quant_method = config.get_quant_method(self, prefix)
        if not callable(getattr(self.quant_method, "embedding", None)):
            raise NotImplementedError("an embedding has to look up")
        self.quant_method.create_weights(
            self, columns, [self.output_size], columns, self.output_size, params_dtype=torch.float32, weight_loader=None
        )


class DefaultModelLoader:
    def __init__(self, load_config: LoadConfig) -> None:
        unknown = set(load_config.model_loader_extra_config) - {"num_threads"}
        if unknown or load_config.load_format != "safetensors":
            raise ValueError(f"{load_config} is not for this loader")
        self.load_config = load_config

    def _prepare_weights(self, model: str, *_: Any) -> tuple[str, list[str], bool, str]:
        return model, sorted(map(str, Path(model).glob("*.safetensors"))), True, "model.safetensors.index.json"

    def _get_weights_iterator(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        yield source.prefix + "read.by.vllm", torch.zeros(1)


@dataclass
class Vllm:
    """What was registered, and what the running configuration says."""

    configs: dict[str, type] = field(default_factory=dict)
    loaders: dict[str, type] = field(default_factory=dict)
    load_config: LoadConfig = field(default_factory=LoadConfig)


def put(registry: dict[str, type]) -> Any:
    return lambda name: lambda cls: registry.setdefault(name, cls)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    state = Vllm()
    layers = "vllm.model_executor.layers."
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: SimpleNamespace(load_config=state.load_config)},
        "vllm.model_executor": {},
        layers[:-1]: {},
        layers + "linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": Plain,
        },
        layers + "vocab_parallel_embedding": {
            "VocabParallelEmbedding": VocabParallelEmbedding,
            "UnquantizedEmbeddingMethod": Plain,
        },
        layers + "quantization": {"register_quantization_config": put(state.configs)},
        layers + "quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.model_executor.model_loader": {"register_model_loader": put(state.loaders)},
        "vllm.model_executor.model_loader.default_loader": {"DefaultModelLoader": DefaultModelLoader},
    }
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    classes.cache_clear()
    yield state
    classes.cache_clear()
