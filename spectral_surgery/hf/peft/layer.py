"""A layer with adapters of one of our methods, as PEFT wants its layers: what does not depend on PEFT's classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import Adapter, AdapterMethod
from spectral_surgery.adapters.layer import Kind, fused, kind_of, residual, shape_of
from spectral_surgery.errors import ConfigError, NotMergeableError


@dataclass(eq=False)
class MergedWeight:
    """What is merged into a weight; layers with a weight in common, such as tied embeddings, have one of these.

    Attributes:
        base: the weight as it was; None while nothing is merged.
        parts: (layer, name of the adapter), in order.
    """

    base: Tensor | None = None
    parts: list[tuple[MethodLayer, str]] = field(default_factory=list)


class MethodLayer(nn.Module):
    """base(x) plus the active adapters; combined with PEFT's BaseTunerLayer by `hf.peft.plugin`.

    The adapters are in a ModuleDict called ``<method>_adapter``, so that PEFT's names of tensors are those of our files
    once it has taken the name of the adapter out.
    """

    method: AdapterMethod[Any]
    # of BaseTunerLayer
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        """Wrap a module, or a layer of another PEFT method.

        Raises ConfigError when it is of a kind that cannot carry an adapter.
        """
        super().__init__()
        self.base_layer = base_layer
        kind = kind_of(self.get_base_layer())
        if kind is None:
            raise ConfigError(
                "target_modules: expected Linear, Conv1D, Conv2d, Embedding and modules that map in_features to"
                f" out_features, got {type(base_layer).__name__}, which cannot carry an adapter of"
                f" {self.method.name}. Choose others."
            )
        self.kind: Kind = kind
        self.out_features, self.in_features = shape_of(self.get_base_layer())
        setattr(self, f"{self.method.name}_adapter", nn.ModuleDict())
        self._disable_adapters = False
        self._active_adapter: str | list[str] = adapter_name
        self.merged_adapters = []
        self.merged_weight = MergedWeight()

    @property
    def adapters(self) -> nn.ModuleDict:
        """By name."""
        return cast(nn.ModuleDict, getattr(self, f"{self.method.name}_adapter"))

    def update_layer(self, adapter_name: str, config: Any, *, inference_mode: bool) -> None:
        """Add a fresh adapter.

        Args:
            inference_mode: whether it is frozen.

        Raises:
            ConfigError: when a setting does not fit the layer.
        """
        self.adapters[adapter_name] = self.method.build(config, self.out_features, self.in_features)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Output of the base with its active adapters, in the dtype of the base's output."""
        if self.disable_adapters and self.merged_adapters:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged_adapters else self.active_adapters
        active = [self.adapters[name] for name in names if name in self.adapters]
        y: Tensor | None = fused(self.base_layer, active[0], x) if len(active) == 1 else None
        if y is not None:
            return y
        y = cast(Tensor, self.base_layer(x, *args))
        for adapter in active:
            y = y + residual(self.kind, self.get_base_layer(), adapter, x).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The weight update, oriented and shaped like the weight of the base, in the dtype of the adapter.

        Raises NotMergeableError when the adapter has no one weight update.
        """
        return self._delta(adapter).to(next(self.adapters[adapter].parameters()).dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight of the base, in float32 or float64 with one cast; the weight as it was is kept.

        Adapters merged one after the other give the same bits as merged at once.

        Args:
            safe_merge: refuse a sum that is not finite; the weight stays as it is then.
            adapter_names: which; None for the active ones. Those that are merged already are left out.

        Raises:
            NotMergeableError: for a quantised base, an adapter without one weight update, or a sum that is not finite.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        if not names:
            return
        weight = cast(nn.Parameter, self.get_base_layer().weight)
        if _dtype_of(self.get_base_layer()) is None:
            raise NotMergeableError(
                f"{type(self.get_base_layer()).__name__}: expected floating-point weights of 16 bits and more for"
                f" merging, got {weight.dtype}. Load the base without quantization."
            )
        record = self.merged_weight
        base = weight.data if record.base is None else record.base
        fresh = [(self, name) for name in names]
        merged = _sum(base, [*record.parts, *fresh])
        if safe_merge and not bool(torch.isfinite(merged).all()):
            broken = next((name for name in names if not bool(torch.isfinite(self._delta(name)).all())), names[-1])
            raise NotMergeableError(
                f"adapter {broken}: expected sums that are finite in {base.dtype}, got NaNs detected in the merged"
                f" weights. The adapter {broken} seems to be broken. Train it again, and check the base."
            )
        record.base, record.parts = base, [*record.parts, *fresh]
        weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the weight as it was before merging, bit for bit; what other layers merged into it stays."""
        record = self.merged_weight
        if record.base is not None and self.merged_adapters:
            weight = cast(nn.Parameter, self.get_base_layer().weight)
            base = record.base.to(weight.device, weight.dtype)  # the model may have been moved or cast since
            record.parts = [part for part in record.parts if part[0] is not self]
            weight.data = _sum(base, record.parts)
            record.base = base if record.parts else None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into a LoRA: for linear layers that store weights as [O, I]."""
        del adapter_name
        return self.kind == "linear" and hasattr(self.get_base_layer(), "in_features")

    def cast_adapter(self, adapter_name: str) -> None:
        """Store an adapter in the dtype of the base; it still computes in float32, or float64 on a float64 base."""
        dtype = _dtype_of(self.get_base_layer())
        if adapter_name in self.adapters and dtype is not None:
            self.adapters[adapter_name].to(dtype)

    def _delta(self, name: str) -> Tensor:
        # float32, or float64 of a float64 adapter, oriented and shaped like the weight of the base
        delta = cast(Adapter, self.adapters[name]).delta_weight()
        base = self.get_base_layer()
        transposed = self.kind == "linear" and not hasattr(base, "in_features")  # transformers' Conv1D
        return (delta.T if transposed else delta).reshape(cast(Tensor, base.weight).shape)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to a 16-bit dtype of the base and back, which rounds what is loaded
        if adapter_name not in self.adapters:
            return
        base, adapter = self.get_base_layer(), self.adapters[adapter_name]
        weight = getattr(base, "weight", None)
        target = device if device is not None or weight is None else weight.device
        if target is not None and not any(parameter.is_meta for parameter in adapter.parameters()):
            adapter.to(target, torch.float64 if _dtype_of(base) == torch.float64 else None)


@torch.no_grad()
def _sum(base: Tensor, parts: list[tuple[MethodLayer, str]]) -> Tensor:
    """A weight plus updates, added in float32 or float64 and cast once; the weight itself for no updates."""
    if not parts:
        return base
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    for layer, name in parts:
        total = total + layer._delta(name).to(total)
    return total.to(base.dtype)


def _dtype_of(base: nn.Module) -> torch.dtype | None:
    """Of the weight; None without one, and for integers and 8-bit floats, which mean nothing without their scales."""
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
        return weight.dtype
    return None
