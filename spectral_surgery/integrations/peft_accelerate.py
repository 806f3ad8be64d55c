"""The fast FourierFT forward for models that PEFT has made."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from spectral_surgery.errors import BackendError, TargetError
from spectral_surgery.ops.fourier_delta import fourier_delta


def accelerate_peft(model: nn.Module, enabled: bool = True) -> int:
    """Give the FourierFT layers of a PEFT model a forward that never forms ΔW, or give PEFT's back.

    Everything else stays PEFT's: several adapters, switching, disabling, merging, saving, dtypes and the names in state
    dicts. The outputs and gradients are equal up to rounding. Layers that PEFT adds later keep its own forward until
    this is called again.

    Args:
        model: a PeftModel, or a model with FourierFT adapters loaded by transformers; changed in place.
        enabled: False to undo it.

    Returns:
        How many layers have the fast forward now, or PEFT's own.

    Raises:
        BackendError: when PEFT is not installed.
        TargetError: when the model has no FourierFT layers of PEFT.
    """
    try:
        from peft.tuners.fourierft import FourierFTLinear
    except ImportError:
        raise BackendError(
            "peft: not installed; it is needed to accelerate its models. pip install 'spectral-surgery[hf]'"
        ) from None
    layers = [module for module in model.modules() if isinstance(module, FourierFTLinear)]
    if not layers:
        raise TargetError(
            f"{type(model).__name__}: has no FourierFT layers of PEFT; models from get_peft_model or PeftModel with"
            " FourierFTConfig are accepted. Adapters put on by inject are fast already."
        )
    for layer in layers:
        layer.__class__ = fast_class() if enabled else FourierFTLinear
        vars(layer).pop("_flat_positions", None)
    return len(layers)


class FastForward:
    """A forward for PEFT's FourierFTLinear, to be put before it in the order of resolution."""

    # of PEFT's layer
    base_layer: nn.Module
    out_features: int
    in_features: int
    disable_adapters: bool
    merged: bool
    active_adapters: list[str]
    fourierft_spectrum: nn.ParameterDict
    fourierft_scaling: dict[str, float]
    indices: dict[str, Tensor]

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Output of the base plus that of the active adapters, in the dtype of x, as PEFT has it."""
        if self.disable_adapters or self.merged:
            return cast(Tensor, super().forward(x, *args))  # type: ignore[misc]
        result = cast(Tensor, self.base_layer(x, *args))
        for name in self.active_adapters:
            if name in self.fourierft_spectrum:
                spectrum = self.fourierft_spectrum[name]
                residual = fourier_delta(
                    x.float(), spectrum.float(), self._positions(name), self.out_features, self.fourierft_scaling[name]
                )
                result = result + residual.to(spectrum.dtype)
        return result.to(x.dtype)

    def _positions(self, name: str) -> Tensor:
        """[K] int64 on the device of the spectrum, row * I + column; PEFT has [2, K] on the CPU."""
        known = vars(self).setdefault("_flat_positions", {})
        indices, device = self.indices[name], self.fourierft_spectrum[name].device
        source, flat = known.get(name, (None, None))
        if source is not indices or flat.device != device:
            flat = (indices[0] * self.in_features + indices[1]).to(device)
            known[name] = (indices, flat)
        return cast(Tensor, flat)


@cache
def fast_class() -> type[Any]:
    """PEFT's FourierFTLinear with the fast forward."""
    from peft.tuners.fourierft import FourierFTLinear

    return type("FastFourierFTLinear", (FastForward, FourierFTLinear), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """FastFourierFTLinear, where pickle looks for it."""
    if name == "FastFourierFTLinear":
        return fast_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
