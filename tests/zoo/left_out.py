"""Types that transformers knows and the zoo does not build, with the reason."""

from __future__ import annotations

LEFT_OUT: dict[str, str] = {}
