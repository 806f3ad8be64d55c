"""Engines: who encodes the parts of a compression."""

from __future__ import annotations

from spectral_surgery.engines.base import Engine
from spectral_surgery.engines.local import LOCAL
from spectral_surgery.engines.ray import RAY
from spectral_surgery.engines.torchrun import TORCHRUN
from spectral_surgery.registry import Table

ENGINES: Table[Engine] = Table("engine", (LOCAL, TORCHRUN, RAY))
