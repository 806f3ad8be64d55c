"""Forward hooks for as long as a block of code lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn

KeyT = TypeVar("KeyT")


@contextmanager
def hooked(
    modules: Mapping[KeyT, nn.Module], hook: Callable[[KeyT, tuple[Any, ...], Any], None], *, before: bool = False
) -> Iterator[None]:
    """Call a hook whenever one of some modules has run."""

    def call(key: KeyT, _: nn.Module, args: tuple[Any, ...], more: Any) -> None:
        hook(key, args, more)

    with ExitStack() as handles:
        for key, module in modules.items():
            if before:
                handles.enter_context(module.register_forward_pre_hook(partial(call, key), with_kwargs=True))
            else:
                handles.enter_context(module.register_forward_hook(partial(call, key)))
        yield
