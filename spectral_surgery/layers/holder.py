"""A resident form as a module: its tensors are buffers, so that they move, copy and are saved with the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import is_not
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from spectral_surgery.matmul import Form, HostMatrix

_OF_ANY_LENGTH = ("data", "places", "beyond", "row_scale")  # stored frames, outliers, and what not all have


class FormHolder(nn.Module):
    """Buffers named as the fields of a form. They keep their dtypes in ``.half()`` and its like.

    Tensors in host memory are not buffers, so that `.to(device)` does not move them; they are in the state dict.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self._kind: Callable[..., Form] = type(form)
        self._rest: dict[str, object] = {}
        self._kept: Form | None = None
        self._of: tuple[object, ...] | None = None
        for field in fields(form):  # type: ignore[arg-type]  # every form is a dataclass
            value = getattr(form, field.name)
            if isinstance(value, Tensor):
                self.register_buffer(field.name, value)
            else:
                self._rest[field.name] = value

    @property
    def form(self) -> Form:
        """The form, of the tensors as they are now; the same one as long as they are the same."""
        now = (*self._buffers.values(), *self._rest.values())
        if torch.compiler.is_compiling():
            return self._kind(**self._rest, **self._buffers)
        if self._of is None or len(now) != len(self._of) or any(map(is_not, now, self._of)):
            self._kept, self._of = self._kind(**self._rest, **self._buffers), now
        return cast(Form, self._kept)

    def __getstate__(self) -> dict[str, Any]:
        """Copies have other tensors."""
        return self.__dict__ | {"_kept": None, "_of": None}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, and of what stays in host memory."""
        tensors = [*self.buffers(), *self._rest.values()]
        return sum(int(getattr(part, "nbytes", 0)) for part in tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        self._kept, self._of = None, None  # or the old buffers would stay in memory
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:  # codes and scales are exact: only the device may change
                setattr(self, name, before[name].to(buffer.device))
        return self

    @property
    def _hosted(self) -> dict[str, HostMatrix]:
        return {name: value for name, value in self._rest.items() if isinstance(value, HostMatrix)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: value.codes for name, value in self._hosted.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        missing, errors = rest[2], rest[4]
        self._kept, self._of = None, None
        for name, value in self._hosted.items():
            stored = state_dict.pop(prefix + name, None)
            if stored is None:
                missing.append(prefix + name)
            elif stored.shape != value.codes.shape:
                errors.append(f"{prefix}{name}: codes are {list(stored.shape)} instead of {list(value.codes.shape)}.")
            else:
                self._rest[name] = HostMatrix.of(stored)
        for name, buffer in self.named_buffers(recurse=False):
            stored = state_dict.get(prefix + name)
            if isinstance(stored, Tensor) and name in _OF_ANY_LENGTH and stored.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
