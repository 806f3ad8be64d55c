"""One table per kind of thing: tests, command-line choices, documents and benchmarks iterate it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar, overload

from spectral_surgery.errors import ConfigError


class Named(Protocol):
    """Anything that can be a row of a table."""

    @property
    def name(self) -> str:
        """The name by which users choose the row."""
        ...


T = TypeVar("T", bound=Named)
D = TypeVar("D")


class Table(Mapping[str, T]):
    """An immutable mapping from name to row, in the order the rows were given."""

    def __init__(self, kind: str, rows: Iterable[T]) -> None:
        """Index `rows` by their names.

        Args:
            kind: What a row is, for error texts: "transform", "adapter method", "mixer".

        Raises:
            ConfigError: If two rows share a name.
        """
        self.kind = kind
        self._rows: dict[str, T] = {}
        for row in rows:
            if row.name in self._rows:
                raise ConfigError(f"{kind}: expected different names, got {row.name!r} twice. Rename one of the rows.")
            self._rows[row.name] = row

    def __getitem__(self, name: str) -> T:
        """Return the row called `name`.

        Raises ConfigError if there is none; the text lists the known names and the closest one.
        """
        if name in self._rows:
            return self._rows[name]
        close = difflib.get_close_matches(name, self._rows, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{self.kind}: expected one of {', '.join(self._rows)}, got {name!r}.{hint}")

    def __iter__(self) -> Iterator[str]:
        """Iterate the names in row order."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        """Return whether a row is called `name`."""
        return name in self._rows

    @overload
    def get(self, name: str, /) -> T | None: ...
    @overload
    def get(self, name: str, /, default: T | D) -> T | D: ...
    def get(self, name: str, /, default: T | D | None = None) -> T | D | None:
        """Return the row called `name`, or `default` where there is none."""
        return self._rows.get(name, default)

    def __repr__(self) -> str:
        """Return the kind and the names."""
        return f"Table({self.kind!r}: {', '.join(self._rows)})"
