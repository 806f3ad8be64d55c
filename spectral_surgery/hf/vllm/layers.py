"""What vLLM's linear layers and embeddings hold and compute with, when the folder is compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.manifest import FORMAT_VERSION, QUANT_METHOD, check_version
from spectral_surgery.hf.quantizer.lazy_weight import LazyWeight, Rows

Part = Rows | Tensor  # a matrix, or rows of one: a spectrum, or dense

_HEADS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of what it packs into one layer, in order of rows
_LEAST_CAPABILITY = 75  # of a CUDA device, times ten


class Settings:
    """What config.json says of a compressed folder; vLLM asks it for the method of every layer."""

    method: type[SpectralMethod]

    def get_name(self) -> str:
        """By which it is registered."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a CUDA device."""
        return _LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read ``quantization_config``. Raises FormatVersionError when it is of another format version."""
        check_version(config.get("format_version", FORMAT_VERSION), "config.json")
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> SpectralMethod | None:
        """Ours for linear layers and embeddings; None leaves others to vLLM, which get decoded weights.

        Raises ConfigError when another loader is to read the folder.
        """
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        form = get_current_vllm_config().load_config.load_format
        if form != QUANT_METHOD:
            raise ConfigError(
                f"load_format: expected {QUANT_METHOD} for a compressed folder, got {form}. Serve it with"
                f" --load-format {QUANT_METHOD} (in Python load_format='{QUANT_METHOD}')."
            )
        return self.method(prefix) if isinstance(layer, LinearBase | VocabParallelEmbedding) else None


class SpectralMethod:
    """Creates, fills and multiplies the weight of one layer.

    ``name``: of the layer; some embeddings of vLLM have none.
    """

    def __init__(self, name: str) -> None:
        self.name = name or "embedding"

    def create_weights(  # noqa: PLR0917  # some layers of vLLM pass all of them by position
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give a layer an empty parameter, whose loader collects what comes.

        Raises ConfigError when the layer is cut into parts for several devices.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ConfigError(
                f"{self.name}: expected a whole layer, got one that is cut for several devices. Spectra are not cut:"
                " serve with --tensor-parallel-size 1."
            )
        layer.weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        layer.weight.parts = {}
        layer.weight.weight_loader = take

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The output layer has the weight of the input embeddings, and what will be collected for it."""
        layer.weight = embed_tokens.weight
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make a product of what was collected. What came dense is left to vLLM.

        Raises CheckpointError when something is missing.
        """
        parts = getattr(layer.weight, "parts", {})
        found = [parts[place] for place in sorted(parts)]
        if any(isinstance(part, Rows) for part in found):
            self._check(layer, sum(part.shape[0] for part in found))
            layer.packed = Packed(found)
            return
        if found:  # in place: the same parameter may be that of a tied layer
            layer.weight.data, layer.weight.parts = torch.cat(found), {}
        self._check(layer, len(layer.weight))
        layer.quant_method = _plain_method(layer)
        layer.quant_method.process_weights_after_loading(layer)

    def _check(self, layer: Any, rows: int) -> None:
        least = getattr(layer, "org_vocab_size", layer.output_size)
        if rows < least:
            raise CheckpointError(
                f"{self.name}: expected a weight of {least} rows, got {rows} in the folder. Fetch it again."
            )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., I] to [..., O]."""
        y: Tensor = layer.packed(x, bias)
        return y

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """[...] integers to [..., I]."""
        rows: Tensor = layer.packed.rows(input_)
        return rows


def take(parameter: Any, loaded: Tensor, shard: str | int | tuple[int, ...] | None = None) -> None:
    """Collect a matrix, or a part of a layer that vLLM packs: see ``weight_loader`` there."""
    first = shard[0] if isinstance(shard, tuple) else shard
    place = _HEADS.get(first, 0) if isinstance(first, str) else first or 0
    source = loaded.source if isinstance(loaded, LazyWeight) else None
    if isinstance(source, Rows):
        source.weight.to(parameter.device)
        parameter.parts[place] = source.cast(parameter.dtype)
    else:
        dense = loaded if source is None else source.dense()
        parameter.parts[place] = dense.to(parameter.device, parameter.dtype, copy=True)


class Packed(nn.Module):
    """Matrices of one width, one above the other, each as it is held."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.weights = nn.ModuleList(part.weight for part in parts if isinstance(part, Rows))  # moved and counted

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + b: [..., I] to [..., O] in its dtype."""
        products = [
            part.turn().product(x) if isinstance(part, Rows) else functional.linear(x, part) for part in self.parts
        ]
        y = products[0] if len(products) == 1 else torch.cat(products, -1)
        return y if bias is None else y + bias

    def rows(self, ids: Tensor) -> Tensor:
        """Rows by number: [...] integers to [..., I]; of a single matrix."""
        (part,) = self.parts
        return part.look_up(ids) if isinstance(part, Rows) else functional.embedding(ids, part)


def _plain_method(layer: Any) -> Any:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

    return UnquantizedEmbeddingMethod() if isinstance(layer, VocabParallelEmbedding) else UnquantizedLinearMethod()
