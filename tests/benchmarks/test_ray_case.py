"""bench ray: what is computed from its rates, and its rows."""

from __future__ import annotations

import pytest

from benchmarks.cases.cluster import Taken, rows
from benchmarks.scale import Fleet, Rates, on_paper


def test_a_fleet_on_paper() -> None:
    fleet = Fleet(nodes=2, cores=4, line=1e9, weights=8e9, bits=4.0)
    found = {str(row["on paper"]): row["value"] for row in on_paper(Rates(1e5, 5e8, 3.6), fleet)}
    assert found["hours to encode"] == round(8e9 / (1e5 * 8) / 3600, 2)
    assert found["GB to each node"] == 8.0
    assert found["GB from each node"] == 2.0
    assert found["GB to and from the driver, each"] == 4.0
    assert found["hours of the driver's processor, meanwhile"] == pytest.approx(found["parts"] * 1e-3, abs=0.01)
    assert found["GB of memory of a node"] == round(4 * (0.7e9 + 22 * 2**23) / 1e9, 2)


def test_the_slowest_stage_decides() -> None:
    encode, write, ask, join = (
        {str(row["on paper"]): float(str(row["value"])) for row in on_paper(rates, fleet)}
        for rates, fleet in (
            (Rates(1e5, 1e12, 1e-9), Fleet()),
            (Rates(1e12, 1e12, 1e-9), Fleet(line=1e7)),
            (Rates(1e12, 1e12, 10.0), Fleet()),
            (Rates(1e12, 1e6, 1e-9), Fleet()),
        )
    )
    assert encode["hours in all"] == pytest.approx(encode["hours to encode"], rel=0.02)
    assert write["hours in all"] == pytest.approx(2 * write["hours to write parts, meanwhile"], rel=0.02)
    assert ask["hours in all"] == pytest.approx(ask["hours of the driver's processor, meanwhile"], rel=0.02)
    assert join["hours in all"] == pytest.approx(join["hours to join the parts, by the driver alone"], rel=0.02)


@pytest.mark.parametrize(("two", "met"), [(6.0, True), (6.5, False)])
def test_the_aim_can_be_missed(two: float, met: bool) -> None:
    taken = {1: [Taken(10.0, 0.1, 0.1, 0.0125)] * 3, 2: [Taken(two, 0.1, 0.1, 0.0125)] * 3}
    found = {row.get("what"): row for row in rows(Taken(9.0, 8.0, 1.0, 0.5), taken, 4, 1 << 25)}
    assert found["one node over two"]["met"] == met
    assert found["M weights a second of a core"]["found"] == round(4 * 16 * 2**20 / 8 / 1e6, 2)
    assert found["ms of the driver's core, a part"]["found"] == 12.5
