"""Places of a few marked items among many, as bytes and back: the lengths of the gaps between them.

One byte a gap: 0 to 254 is a gap followed by an item, 255 are 255 places without one. Entropy coded, that comes close
to the entropy of the marks at any density below a half, and reading it takes time only for the items, not for the gaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.intp]

_SKIP = 255


def pack_places(places: npt.NDArray[Any]) -> Bytes:
    """[k] ascending places to their gap bytes."""
    gaps = np.diff(places, prepend=-1) - 1
    skips = gaps // _SKIP
    ends = np.cumsum(skips + 1)
    packed = np.full(int(ends[-1]) if ends.size else 0, _SKIP, np.uint8)
    packed[ends - 1] = gaps - skips * _SKIP
    return packed


def most_bytes(count: int) -> int:
    """More gap bytes than this cannot belong to places below ``count``."""
    return count + count // _SKIP


def unpack_places(packed: Bytes, count: int) -> Places:
    """The inverse of `pack_places`.

    Args:
        packed: gap bytes.

    Raises:
        CheckpointError: when a place is not below ``count``.
    """
    if not packed.size:
        return packed.astype(np.intp)
    items = packed != _SKIP if packed.max() == _SKIP else None
    if items is None:  # widened before they are summed, since numpy is slow at both in one
        places = (packed + np.uint8(1)).astype(np.intp)
    else:
        places = packed.astype(np.intp) + items
    places[0] -= 1
    np.cumsum(places, out=places)
    if int(places[-1]) >= count:
        raise CheckpointError(
            f"spectral frame: a code at place {int(places[-1]) + 1} of {count}; the data is damaged."
            " Fetch the file again."
        )
    return places if items is None else places[items]
