"""PNGs of flat gray, such as the mask of one nucleus, decoded faster than by a library made for all of them.

libdeflate unpacks in half the time of the zlib behind libpng, and almost every row of a mask is stored as it is, or as
its difference to the one above.
"""

from __future__ import annotations

from collections.abc import Iterator

import imagecodecs
import numpy as np
from numpy.typing import NDArray

#: Bytes 24 to 28: 8 bits, gray, the only compression, the only set of filters, not interlaced.
_GRAY = b"\x08\x00\x00\x00\x00"
_SUB, _UP, _PAETH = 1, 2, 4
#: Rows of the filter that goes pixel by pixel, from which on a library is faster.
_MOST_PAETH = 12


def decode_gray(data: bytes) -> NDArray[np.uint8] | None:
    """Decode an 8-bit gray PNG.

    Parameters
    ----------
    data : bytes
        A whole file that begins as a PNG does.

    Returns
    -------
    (H, W) uint8; None where the file is broken, or of a kind that is better left to a library.
    """
    if data[24:29] != _GRAY:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    packed = b"".join(_chunks(data))
    if not 0 < width * height < 2000 * len(packed):  # more than deflate can unpack to
        return None
    rows = np.empty((height, width + 1), np.uint8)
    try:
        unpacked = imagecodecs.deflate_decode(packed, out=rows.data.cast("B"))
    except imagecodecs.DeflateError:
        return None
    if len(unpacked) != rows.size or not _unfilter(rows):
        return None
    return np.ascontiguousarray(rows[:, 1:])


def _chunks(data: bytes) -> Iterator[memoryview]:
    """What the chunks of the image hold; as far as they go in a file that is cut off."""
    view, place = memoryview(data), 33
    while place + 12 <= len(data):
        length, kind = int.from_bytes(view[place : place + 4], "big"), view[place + 4 : place + 8]
        if kind == b"IDAT":
            yield view[place + 8 : place + 8 + length]
        place += 12 + length


def _unfilter(rows: NDArray[np.uint8]) -> bool:
    """Undo the filter that the first byte of each row names, in place; False where that is not for us."""
    filters = rows[:, 0].copy()
    if filters.max() > _PAETH or (filters == 3).any() or np.count_nonzero(filters == _PAETH) > _MOST_PAETH:
        return False
    rows[:, 0] = 0  # what lies left of a row counts as 0
    for y in np.flatnonzero(filters):
        above = rows[y - 1] if y else np.zeros_like(rows[0])
        if filters[y] == _SUB:
            np.add.accumulate(rows[y], dtype=np.uint8, out=rows[y])
        elif filters[y] == _UP:
            rows[y] += above
        else:
            _add_paeth(rows[y], above)
    return True


def _add_paeth(row: NDArray[np.uint8], above: NDArray[np.uint8]) -> None:
    """Add to each byte the neighbour (left, above, left above) nearest to left + above - left above, section 9.4."""
    some = np.flatnonzero(row | above)
    if not some.size:
        return
    # Before the first byte that is not 0 all stays 0; behind the last, the neighbour is the one on the left.
    first, last = max(int(some[0]), 1), min(int(some[-1]) + 2, row.size)
    values, ups = row[first - 1 : last].tolist(), above[first - 1 : last].tolist()
    for x in range(1, len(values)):
        left, up, corner = values[x - 1], ups[x], ups[x - 1]
        by_left, by_up, by_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
        nearest = left if by_left <= min(by_up, by_corner) else up if by_up <= by_corner else corner
        values[x] = (values[x] + nearest) & 255
    row[first - 1 : last] = values
    row[last:] = values[-1]
