"""Parts of the base that are trained whole beside an adapter: modules_to_save and biases.

The originals are kept as they are; what is trained is a named copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

BIAS_RECORD = "trained_bias"


class SavedModule(nn.Module):
    """A module with trained copies, of which one may be in use. ``copies``: by adapter name."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.copies = nn.ModuleDict()
        self.chosen: str | None = None
        self.enabled = True

    @property
    def names(self) -> list[str]:
        """Of the copies."""
        return list(self.copies)

    @property
    def used(self) -> nn.Module:
        """The module that answers now."""
        return self.copies[self.chosen] if self.enabled and self.chosen is not None else self.base_layer

    @property
    def weight(self) -> Any:
        """The weight in use, which callers ask for its dtype or device."""
        return self.used.weight

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The module in use: whatever it takes and answers."""
        return self.used

    def add(self, name: str, fresh: nn.Module) -> None:
        """Take over a copy of the base, to be trained."""
        self.copies[name] = fresh.requires_grad_(True)

    def drop(self, name: str) -> None:
        """Forget a copy."""
        del self.copies[name]
        self.chosen = None if self.chosen == name else self.chosen

    def activate(self, names: list[str]) -> None:
        """Use and train the last of these copies; none: the base."""
        self.chosen = names[-1] if names else None
        for name, module in self.copies.items():
            module.requires_grad_(name == self.chosen)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The numbers of a copy, by name inside the module."""
        return dict(self.copies[name].state_dict())

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set the numbers of a copy."""
        self.copies[name].load_state_dict(dict(tensors))


class TrainedBias(nn.Module):
    """Trained copies of the bias of a module; it hangs on that module, whose ``bias`` is the one in use."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self._host = (host,)  # in a tuple, so that it does not become a child of its child
        self.original = cast(nn.Parameter, host.bias)
        self.copies = nn.ParameterDict()
        self.chosen: str | None = None
        self._enabled = True
        host.add_module(BIAS_RECORD, self)

    @property
    def names(self) -> list[str]:
        """Of the copies."""
        return list(self.copies)

    @property
    def enabled(self) -> bool:
        """Whether the chosen copy is in use."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        """Put the chosen copy, or the original, into the host."""
        self._enabled = value
        used = self.copies[self.chosen] if value and self.chosen is not None else self.original
        self._host[0].register_parameter("bias", cast(nn.Parameter, used))

    def add(self, name: str) -> None:
        """Start a copy from the original."""
        self.copies[name] = nn.Parameter(self.original.detach().clone())

    def drop(self, name: str) -> None:
        """Forget a copy; with the last one, leave the module."""
        del self.copies[name]
        self.activate([active for active in [self.chosen] if active is not None and active != name])
        if not self.copies:
            delattr(self._host[0], BIAS_RECORD)

    def activate(self, names: list[str]) -> None:
        """Use and train the last of these copies; none: the original."""
        self.chosen = names[-1] if names else None
        for name, module in self.copies.items():
            module.requires_grad_(name == self.chosen)
        self.enabled = self._enabled

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The copy, called bias."""
        return {"bias": self.copies[name]}

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set the numbers of a copy."""
        self.copies[name].data.copy_(tensors["bias"])
