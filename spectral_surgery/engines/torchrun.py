"""Processes that a launcher has started, on machines that share a file system: each has a share of the parts."""

from __future__ import annotations

from spectral_surgery.engines.base import Engine, Work
from spectral_surgery.engines.local import encode_units
from spectral_surgery.files.compressed.units import is_done


def encode_share(work: Work) -> bool:
    """Encode the parts of one share; whether those of all are there then."""
    encode_units(work, work.units(work.shard))
    return work.shard[1] == 1 or all(is_done(work.store, unit) for unit in work.units())


TORCHRUN = Engine("torchrun", "processes of torchrun, srun or --shard, which share a file system", encode_share)
