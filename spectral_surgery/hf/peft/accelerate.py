"""The fast FourierFT forward for models that PEFT has made."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.errors import TargetError, required
from spectral_surgery.fourier import Places, adapted_linear, fold, fourier_delta

_CACHE = "_folded_places"


def accelerate_peft(model: nn.Module, enabled: bool = True) -> int:
    """Give the FourierFT layers of a PEFT model a forward that never forms ΔW, or give PEFT's back.

    Everything else stays PEFT's: several adapters, switching, disabling, merging, saving, dtypes and the names in state
    dicts. The outputs and gradients are equal up to rounding. Layers that PEFT adds later keep that of PEFT until
    this is called again. Returns how many layers have the fast forward now, or that of PEFT.

    Args:
        model: a PeftModel, or a model with FourierFT adapters loaded by transformers; changed in place.

    Raises:
        BackendError: when PEFT is not installed.
        TargetError: when the model has no FourierFT layers of PEFT.
    """
    FourierFTLinear = required("peft.tuners.fourierft", "accelerate its models").FourierFTLinear  # noqa: N806 - a class
    layers = [module for module in model.modules() if isinstance(module, FourierFTLinear)]
    if not layers:
        raise TargetError(
            f"{type(model).__name__}: expected a model from get_peft_model or PeftModel with FourierFTConfig, got no"
            " FourierFT layers of PEFT. Adapters put on by inject are fast already."
        )
    for layer in layers:
        layer.__class__ = fast_class() if enabled else FourierFTLinear
        vars(layer).pop(_CACHE, None)
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
        names = [name for name in self.active_adapters if name in self.fourierft_spectrum]
        if len(names) == 1 and not args and _is_plain(self.base_layer, x):
            spectrum, scaling = self.fourierft_spectrum[names[0]], self.fourierft_scaling[names[0]]
            base = cast(nn.Linear, self.base_layer)
            return adapted_linear(x, base.weight, base.bias, spectrum, self._places(names[0]), scaling)
        result = cast(Tensor, self.base_layer(x, *args))
        for name in names:
            spectrum, scaling = self.fourierft_spectrum[name], self.fourierft_scaling[name]
            result = result + fourier_delta(
                x.to(spectrum.dtype), spectrum, self._places(name), self.out_features, scaling
            )
        return result.to(x.dtype)

    def _places(self, name: str) -> Places:
        """Where the coefficients are, on the device of the spectrum; PEFT has [2, K] on the CPU."""
        known = vars(self).setdefault(_CACHE, {})
        indices, device = self.indices[name], self.fourierft_spectrum[name].device
        source, places = known.get(name, (None, None))
        if source is not indices or places.indices.device != device:
            positions = (indices[0] * self.in_features + indices[1]).to(device)
            places = fold(positions, self.out_features, self.in_features)
            known[name] = (indices, places)
        return cast(Places, places)


def _is_plain(base: nn.Module, x: Tensor) -> bool:
    """Whether x Wᵀ + b is all that a module does, so that its update may be added on the way."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    if type(base) is not nn.Linear or any(hooks) or "forward" in vars(base):
        return False
    # inside a half-precision weight an update would be rounded to that weight's steps, which PEFT does not do
    same = type(base.weight) is nn.Parameter and base.weight.dtype == x.dtype == torch.float32
    return same and not torch.is_autocast_enabled(x.device.type)


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
