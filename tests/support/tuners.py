"""Every method that PEFT knows from us, and those of its own that we write files for, on one small model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.files.peft.adapter_config import DIALECTS


class Block(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 16)
        self.lin1 = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.lin1(torch.tanh(self.lin0(x)))
        return y


class Small(nn.Module):
    """Embedding, two blocks, head; the same weights at every call."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.emb = nn.Embedding(30, 12)
            self.layers = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(12, 8)
        self.to(dtype).eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


IDS = torch.arange(24).reshape(2, 12)


def answer(model: nn.Module) -> Tensor:
    """Output for a fixed batch."""
    with torch.no_grad():
        y: Tensor = model(IDS)
    return y


def stir(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Move what is trained, so that it acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what a model holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Tuner:
    """A method of PEFT.

    Attributes:
        name: for the test's name.
        peft_type: of its configuration.
        prefix: of the names of its parameters.
        settings: that fit the small model, with a start that changes nothing.
        fast: whether PEFT's layers get our forward.
    """

    name: str
    peft_type: str
    prefix: str
    settings: dict[str, Any] = field(default_factory=dict)
    fast: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether its layers are ours, and not PEFT's."""
        return self.peft_type not in DIALECTS

    def config(self, targets: Any = ("lin0", "head"), **others: Any) -> Any:
        """A configuration."""
        from peft import PeftConfig

        chosen = list(targets) if isinstance(targets, tuple) else targets
        return PeftConfig.from_peft_type(
            peft_type=self.peft_type, **{**self.settings, "target_modules": chosen, **others}
        )

    def put(self, model: nn.Module, targets: Any = ("lin0", "head"), **others: Any) -> Any:
        """A fresh adapter on a model."""
        from peft import get_peft_model

        options = {name: others.pop(name) for name in ("autocast_adapter_dtype",) if name in others}
        return self.ready(get_peft_model(model, self.config(targets, **others), **options))

    def ready(self, model: Any) -> Any:
        """The model with our forward, where that is the point; in eval mode."""
        from spectral_surgery import accelerate_peft

        if self.fast:
            accelerate_peft(model)
        return model.eval()

    def load(self, model: nn.Module, folder: Any, **options: Any) -> Any:
        """A stored adapter on a model."""
        from peft import PeftModel

        return self.ready(PeftModel.from_pretrained(model, folder, **options))

    def trained(self, dtype: torch.dtype = torch.float32, **others: Any) -> Any:
        """An adapter that acts, on the small model."""
        model = self.put(Small(dtype), **others)
        stir(model)
        return model


_SMALL: dict[str, dict[str, Any]] = {
    "foura": {"r": 4},
    "spectral_delta": {"n_frequency": 30},
    "fourierft_biased": {"n_frequency": 30, "scaling": 20.0},
}
OURS = [
    Tuner(row.name, row.peft_type, f"{row.name}_", _SMALL[row.name])
    for row in METHODS.values()
    if row.peft_type not in DIALECTS
]
_FOURIERFT = {"n_frequency": 30, "scaling": 20.0, "init_weights": True}
LORA = Tuner("lora", "LORA", "lora_", {"r": 4})
THEIRS = [
    Tuner("fourierft", "FOURIERFT", "fourierft_", _FOURIERFT),
    Tuner("fourierft-fast", "FOURIERFT", "fourierft_", _FOURIERFT, fast=True),
    LORA,
]
TUNERS = [*OURS, *THEIRS]
