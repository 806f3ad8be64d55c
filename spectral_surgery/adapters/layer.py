"""A module that carries adapters: the output of the base layer plus that of every active adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import Adapter
from spectral_surgery.errors import ConfigError

Kind = Literal["linear", "conv", "embedding"]


def kind_of(module: nn.Module) -> Kind | None:
    """How a module uses its weight; None when it cannot carry an adapter.

    Any module with in_features and out_features maps [..., I] to [..., O]: Linear, quantised linears, SpectralLinear;
    but see `regroups`.
    """
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d):
        return "conv"
    is_linear = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
    return "linear" if is_conv1d(module) or (is_linear and not regroups(module)) else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer that stores [I, O], dense or ours: it is known by its name."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def regroups(module: nn.Module) -> bool:
    """Whether a linear layer gives something else than [..., O], so that an update of [..., O] cannot be added.

    Subclasses of nn.Linear may multiply groups of their inputs by parts of the weight. They are run without numbers;
    one that does not run so counts as plain.
    """
    cls = getattr(module, "stands_for", type(module))  # of a compressed layer, the class that it was
    if not isinstance(module, nn.Linear) or cls.forward is nn.Linear.forward:
        return False
    shape, weight = shape_of(module), module._parameters.get("weight")
    if weight is not None and (type(weight) is not nn.Parameter or weight.shape != shape or weight.dtype.itemsize < 2):
        return False  # quantised
    dtype = torch.float32 if weight is None else weight.dtype
    hollow = cls.__new__(cls)
    tensors = {
        kind: {
            name: None if x is None else torch.empty_like(x, device="meta") for name, x in vars(module)[kind].items()
        }
        for kind in ("_parameters", "_buffers")
    }
    tensors["_parameters"]["weight"] = torch.empty(shape, dtype=dtype, device="meta")
    vars(hollow).update(vars(module) | tensors)
    tokens = shape[0]  # which every grouping of the outputs divides
    try:
        y = cls.forward(hollow, torch.empty(tokens, shape[1], dtype=dtype, device="meta"))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return not isinstance(y, Tensor) or y.shape != (tokens, shape[0])


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(O, I) of the weight of a module for which `kind_of` is not None; a convolution is [O, I * kh * kw]."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.weight[0].numel()
    if is_conv1d(module):
        rows, columns = cast(Tensor, module.weight).shape
        return columns, rows
    return int(cast(int, module.out_features)), int(cast(int, module.in_features))


def forms_of(modules: Mapping[str, nn.Module]) -> tuple[frozenset[str], dict[str, tuple[int, ...]]]:
    """(which modules are embeddings, sides of the kernels of those that are convolutions), as `AdapterState` has it."""
    embeddings = frozenset(name for name, module in modules.items() if isinstance(module, nn.Embedding))
    return embeddings, {n: tuple(m.weight.shape[2:]) for n, m in modules.items() if isinstance(m, nn.Conv2d)}


def residual(kind: Kind, base: nn.Module, adapter: nn.Module, x: Tensor) -> Tensor:
    """What an adapter adds to the output of a module. Returns like the output of base; float32 for embeddings.

    Args:
        x: its input: [..., I], [B, C, H, W], or ids.

    Raises:
        NotMergeableError: for a convolution or an embedding, when the adapter has no one weight update.
    """
    update = cast(Adapter, adapter)
    if kind == "linear":
        return cast(Tensor, adapter(x))
    if kind == "embedding":
        scale: Any = getattr(base, "embed_scale", 1.0)  # of scaled embeddings, which multiply what they look up
        return update.rows(x) * (scale.to(cast(Tensor, base.weight).dtype) if isinstance(scale, Tensor) else scale)
    conv = cast(nn.Conv2d, base)
    if conv.padding_mode != "zeros":
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    padding = conv.padding if conv.padding_mode == "zeros" else 0
    delta = update.delta_weight().reshape(conv.weight.shape).to(x.dtype)
    return torch.conv2d(x, delta, None, conv.stride, padding, conv.dilation, conv.groups)


def fused(base: nn.Module, adapter: nn.Module, x: Tensor) -> Tensor | None:
    """Output of a plain linear with one adapter inside its weight, where the adapter knows that to be cheaper.

    Returns [..., O], or None to take the sum of both outputs.

    ``x``: [..., I].
    """
    fused = getattr(adapter, "fused_linear", None)
    if fused is None or type(base) is not nn.Linear or _is_observed(base):
        return None
    return cast("Tensor | None", fused(x, base.weight, base.bias))


def _is_observed(base: nn.Module) -> bool:
    # its hooks, or a forward put over it (offloading, sharding, calibration), must see the call
    return bool(base._forward_hooks or base._forward_pre_hooks or base._backward_hooks) or "forward" in base.__dict__


class AdaptedLayer(nn.Module):
    """base(x) plus the sum of weight * adapter(x) over the active adapters.

    Attributes:
        base_layer: the module as it was; never changed here.
        active: weight by name of the adapters in use; order is kept.
        merged: what undoes the merge while the active adapters are inside the weight of the base.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        kind = kind_of(base_layer)
        if kind is None:
            raise ConfigError(
                "target_modules: expected Linear, Conv1D, Conv2d, Embedding and modules that map in_features to"
                f" out_features, got {type(base_layer).__name__}, which cannot carry an adapter. Choose others."
            )
        self.kind: Kind = kind
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: dict[str, float] = {}
        self.enabled = True
        self.merged: object | None = None

    @property
    def weight(self) -> Any:
        """The weight of the base, which callers ask for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The bias of the base."""
        return self.base_layer.bias

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return shape_of(self.base_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the base with its active adapters, in the dtype of the base's output."""
        y: Tensor
        if self.merged is not None and not self.enabled:
            raise ConfigError("disable: expected separate adapters, got merged ones. Unmerge the model first.")
        if self.merged is not None or not (self.enabled and self.active):
            y = self.base_layer(x)
            return y
        fused = self._fused(x)
        if fused is not None:
            return fused
        y = self.base_layer(x)
        for name, weight in self.active.items():
            added = residual(self.kind, self.base_layer, self.adapters[name], x)
            y = y + (added if weight == 1 else weight * added).to(y.dtype)
        return y

    @property
    def names(self) -> list[str]:
        """Of the adapters."""
        return list(self.adapters)

    def add(self, name: str, adapter: nn.Module) -> None:
        """Put an adapter on, on the device of the base; it is not in use yet."""
        tensor = next((t for t in (*self.base_layer.parameters(), *self.base_layer.buffers())), None)
        self.adapters[name] = adapter if tensor is None else adapter.to(tensor.device)

    def drop(self, name: str) -> None:
        """Take an adapter off. Raises ConfigError when it is merged."""
        self._check_not_merged()
        del self.adapters[name]
        self.active.pop(name, None)

    def set_active(self, weights: Mapping[str, float]) -> None:
        """Choose the adapters in use. Raises ConfigError for a name that is not here, or while merged."""
        self._check_not_merged()
        for name in weights:
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise ConfigError(f"adapter: expected one of this layer ({known}), got '{name}'.")
        self.active = dict(weights)

    def _check_not_merged(self) -> None:
        if self.merged is not None:
            raise ConfigError(
                f"adapters {', '.join(self.active)}: expected a model with adapters beside its weights, got merged"
                " ones. Unmerge it first."
            )

    def _fused(self, x: Tensor) -> Tensor | None:
        (name, weight), *others = self.active.items()
        return None if others or weight != 1 else fused(self.base_layer, self.adapters[name], x)
