"""Tensors whose numbers no kernel of ours can read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unreadable(x: Tensor) -> bool:
    """Whether x may have no numbers to read, or somebody follows what is done with it: fake tensors, torch.func."""
    if type(x) not in (Tensor, nn.Parameter) or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None
