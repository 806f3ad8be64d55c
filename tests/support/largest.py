"""How large the largest tensor is that a computation makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Most:
    numel: int = 0


@contextmanager
def largest_tensor(*, floating: bool = False) -> Iterator[Most]:
    """Watch every operator, those of a backward pass included; only floating results, whole storages, if asked."""
    most = Most()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            sizes = [leaf.numel() for leaf in leaves]
            if floating:
                own = [leaf for leaf in leaves if leaf.is_floating_point() and not leaf.is_meta]
                sizes = [leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in own]
            most.numel = max(most.numel, *sizes) if sizes else most.numel
            return result

    with Watch():
        yield most
