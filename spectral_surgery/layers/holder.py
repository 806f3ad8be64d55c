"""A resident form as a module: its tensors are buffers, so that they move, copy and are saved with the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectral_surgery.ops.spectral_matmul import Form


class FormHolder(nn.Module):
    """Buffers named as the fields of a form. They keep their dtypes in ``.half()`` and its like."""

    def __init__(self, form: Form) -> None:
        """Take over the tensors of a form."""
        super().__init__()
        self._kind: Callable[..., Form] = type(form)
        self._rest: dict[str, object] = {}
        for field in fields(form):  # type: ignore[arg-type]  # every form is a dataclass
            value = getattr(form, field.name)
            if isinstance(value, Tensor):
                self.register_buffer(field.name, value)
            else:
                self._rest[field.name] = value

    @property
    def form(self) -> Form:
        """The form, of the tensors as they are now."""
        return self._kind(**self._rest, **self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:  # codes and scales are exact: only the device may change
                setattr(self, name, before[name].to(buffer.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and buffer.dtype == torch.uint8 and given.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(given.shape))  # coded data has the length it has
        super()._load_from_state_dict(state_dict, prefix, *rest)
