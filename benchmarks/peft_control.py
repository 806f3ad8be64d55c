"""Layers as PEFT adapts them, to compare with."""

from __future__ import annotations

from typing import Any

from torch import nn


def peft_layer(base: nn.Linear, method: str) -> nn.Module:
    """A linear layer with an adapter of PEFT, which shares the parameters of the base.

    Args:
        base: [O, I]; frozen by this.
        method: "fourierft" with 1000 coefficients, or "lora" of rank 8; both drawn at random, so that they act.

    Raises:
        BackendError: when peft is not installed.
    """
    from spectral_surgery.errors import BackendError

    try:
        import peft
    except ImportError as error:
        raise BackendError("peft: not installed; it is needed to compare with. Use pip install peft.") from error
    config: Any = (
        peft.FourierFTConfig(n_frequency=1000, target_modules=["base"])
        if method == "fourierft"
        else peft.LoraConfig(r=8, target_modules=["base"], init_lora_weights=False)
    )
    carrier = nn.Module()
    carrier.base = base
    model = peft.get_peft_model(carrier, config).base_model.model
    return model.base  # type: ignore[no-any-return]
