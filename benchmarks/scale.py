"""How long a model takes that is larger than anything here, computed from rates that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.case import Row
from spectral_surgery.engines.cluster import PROCESS_BYTES
from spectral_surgery.files.compressed.plan import BYTES_PER_WEIGHT, PART_WEIGHTS


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        encode: weights a second that one core encodes.
        join: bytes of the result a second that the driver joins.
        ask: seconds of the driver's processor that a part takes.
    """

    encode: float
    join: float
    ask: float


@dataclass(frozen=True)
class Fleet:
    """Machines, and a model for them.

    Attributes:
        nodes: how many machines.
        cores: of each.
        line: bytes a second to and from each, and to and from where the source and the result are.
        weights: of the model, which has bfloat16.
        bits: of the result, for each weight.
    """

    nodes: int = 16
    cores: int = 8
    line: float = 10e9 / 8
    weights: float = 1e12
    bits: float = 4.0


def on_paper(rates: Rates, fleet: Fleet = Fleet()) -> list[Row]:
    """Hours, bytes and memory. Reading and encoding are taken one after the other, as a task does them.

    The source comes from many disks, as on the Hub, to the line of each node; parts go to one shared disk, whose line
    is as fast as that of a node, and from there through the driver back to it.
    """
    source, result = 2 * fleet.weights, fleet.bits / 8 * fleet.weights
    encode = fleet.weights / (rates.encode * fleet.nodes * fleet.cores)
    read = source / (fleet.line * fleet.nodes)
    write = result / fleet.line  # while others encode
    join = result / min(rates.join, fleet.line)
    parts = fleet.weights / PART_WEIGHTS
    driver = parts * rates.ask
    rows = [
        ("hours to encode", encode / 3600),
        ("hours to read the source", read / 3600),
        ("hours to write parts, meanwhile", write / 3600),
        ("hours of the driver's processor, meanwhile", driver / 3600),
        ("hours to join the parts, by the driver alone", join / 3600),
        ("hours in all", (max(encode + read, write, driver) + join) / 3600),
        ("GB to each node", source / fleet.nodes / 1e9),
        ("GB from each node", result / fleet.nodes / 1e9),
        ("GB to and from the driver, each", result / 1e9),
        ("GB of memory of a node", fleet.cores * (PROCESS_BYTES + BYTES_PER_WEIGHT * PART_WEIGHTS) / 1e9),
        ("parts", parts),
    ]
    return [{"on paper": what, "value": round(value, 2)} for what, value in rows]
