"""One row of the zoo: a tiny model of a type, and how it is built, run and loaded."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.inputs import READ, Inputs
from tests.zoo.settings import Settings

CAUSAL = "AutoModelForCausalLM"
MASKED = "AutoModelForMaskedLM"
MODEL = "AutoModel"
SEQ2SEQ = "AutoModelForSeq2SeqLM"
CLASSIFIER = "AutoModelForSequenceClassification"
IMAGE_CLASSIFIER = "AutoModelForImageClassification"
IMAGE_TEXT = "AutoModelForImageTextToText"
CTC = "AutoModelForCTC"

NOISE = 0.05  # added to every parameter: many start at 0 or 1, where mistakes do not show
SMALL_SHARD = "200KB"


@dataclass(frozen=True)
class Entry:
    """A tiny model.

    ``settings`` are those of the configuration, or a function without arguments that gives the configuration.
    ``loader`` is the class of transformers that builds and loads it. ``reads_text`` says whether a calibration text
    can be given: by default where the inputs are text alone. Half of the entries are bfloat16, a third is saved in
    shards, by a checksum of the name; ``only_float32`` for models that cannot run otherwise.
    """

    name: str
    loader: str
    inputs: Inputs
    settings: Settings | Callable[[], Any] = field(default_factory=dict)
    model_type: str = ""
    reads_text: bool | None = None
    only_float32: bool = False
    short: bool = False  # takes at most 16 tokens
    mixer: str = ""  # swapped for attention
    own_code: Callable[[], Any] | None = None  # makes the model from code that is saved beside it
    inside: tuple[str, ...] = ()  # modules whose outputs are compared too: those of the model show them only rounded

    @property
    def type(self) -> str:
        return self.model_type or self.name

    @property
    def dtype(self) -> torch.dtype:
        odd = zlib.crc32(self.name.encode()) % 2
        return torch.bfloat16 if odd and not self.only_float32 else torch.float32

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32

    @property
    def sharded(self) -> bool:
        return zlib.crc32(self.name.encode()) % 3 == 0

    @property
    def text(self) -> bool:
        return self.inputs in READ if self.reads_text is None else self.reads_text

    def config(self) -> Any:
        from transformers import AutoConfig

        if callable(self.settings):
            return self.settings()
        return AutoConfig.for_model(self.type, **self.settings)

    def loader_class(self) -> Any:
        return find_class(self.loader, self.type)

    def build(self) -> Any:
        """The model in eval mode, always with the same weights."""
        torch.manual_seed(0)
        if self.own_code is not None:
            model = self.own_code().float()
        else:
            config, loader = self.config(), self.loader_class()
            model = (loader.from_config(config) if self.loader.startswith("Auto") else loader(config)).float()
        stir(model)
        return to_dtype(model, self.dtype).eval()

    def make_inputs(self, model: Any, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of forward, floating ones in the dtype of the model."""
        torch.manual_seed(seed)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), self.dtype)
        made = self.inputs(model)
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}


def find_class(name: str, model_type: str) -> Any:
    """A class of transformers by name, also one that is only in the module of its type."""
    import importlib

    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        config = transformers.CONFIG_MAPPING[model_type]
        found = getattr(importlib.import_module(config.__module__.replace("configuration_", "modeling_")), name)
    return found


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another dtype, but for the angles of positions, which stay float32: as transformers loads it."""
    angles = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    model.to(dtype)
    for module, name, buffer in angles:
        setattr(module, name, buffer)
    return model


def stir(model: nn.Module) -> None:
    """Change all parameters and running statistics a little, so that none is 0 or 1 throughout."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # each shared one once
            if parameter.is_floating_point():
                parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(NOISE * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.add_(0.2 * torch.rand(buffer.shape, generator=generator))
            elif name.endswith((".embed", ".embed_avg", "embed_sum")):  # codebooks
                buffer.add_(0.5 * torch.randn(buffer.shape, generator=generator))
