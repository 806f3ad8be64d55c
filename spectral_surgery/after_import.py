"""Do something as soon as a library is imported, whoever imports it and in whatever order.

`import spectral_surgery` must not import PEFT, which takes seconds, and yet PEFT must know our methods before it reads
the first file. A finder at the front of `sys.meta_path` sees the import of the library, lets the other finders find it,
and adds the action after the execution of its module. Nothing is imported that the user does not import.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

from spectral_surgery.errors import BackendError


class _Watch:
    """A finder for one module, that runs an action after the module."""

    def __init__(self, library: str, action: Callable[[], None]) -> None:
        self.library = library
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with the action added."""
        if name != self.library:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        execute = getattr(spec.loader, "exec_module", None) if spec is not None else None
        if spec is None or execute is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # finding alone, as find_spec does, changes nothing
                sys.meta_path.remove(self)
                self.action()

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - the loader is of this import alone
        return spec


def when_imported(library: str, home: str, name: str) -> None:
    """Call a function of this package once a library is imported; at once if it is already.

    Args:
        library: a module that executes code; a part of a library where that is imported lazily.
        home: the module of the function, imported only then.
        name: of the function, which takes nothing. A `BackendError` becomes a warning, so that the library works.
    """

    def action() -> None:
        try:
            getattr(import_module(home), name)()
        except BackendError as error:
            warnings.warn(str(error), stacklevel=2)

    module = sys.modules.get(library)
    if module is not None:
        action()
    else:
        sys.meta_path.insert(0, _Watch(library, action))
