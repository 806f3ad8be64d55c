"""Which tensors or modules an operation applies to: glob patterns over dotted names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from spectral_surgery.errors import TargetError


def matching(names: Iterable[str], patterns: Sequence[str], *, option: str) -> set[str]:
    """Names that match at least one pattern.

    Args:
        names: dotted names.
        patterns: shell globs, where ``*`` also crosses dots: ``encoder.*.weight``.
        option: what the patterns came from, for the error.

    Returns:
        The names matched.

    Raises:
        TargetError: when a pattern matches no name.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise TargetError(
                f"{option} '{pattern}': matches none of {len(names)} tensors; "
                f"globs over names such as {some} are accepted."
            )
        found.update(hits)
    return found
