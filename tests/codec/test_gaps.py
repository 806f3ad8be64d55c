"""Places: every ascending list comes back, whatever the gaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.codec.gaps import most_bytes, pack_places, unpack_places
from spectral_surgery.errors import CheckpointError


@given(st.sets(st.integers(0, 3000)))
def test_places_come_back(places: set[int]) -> None:
    wanted = np.array(sorted(places), np.int64)
    packed = pack_places(wanted)
    assert packed.size <= most_bytes(3001)
    np.testing.assert_array_equal(unpack_places(packed, 3001), wanted)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 100_000])
def test_gaps_around_the_size_of_a_byte(gap: int) -> None:
    places = np.array([gap, 2 * gap + 1, 2 * gap + 2])
    np.testing.assert_array_equal(unpack_places(pack_places(places), 2 * gap + 3), places)
    with pytest.raises(CheckpointError, match=f"a code at place {2 * gap + 3} of {2 * gap + 2}"):
        unpack_places(pack_places(places), 2 * gap + 2)


def test_the_most_bytes_are_reached_by_every_place_taken_and_by_none() -> None:
    assert pack_places(np.arange(1000)).size == 1000 <= most_bytes(1000)
    assert pack_places(np.array([999])).size == 4 <= most_bytes(1000)
    assert pack_places(np.array([], np.int64)).size == 0
