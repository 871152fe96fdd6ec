"""The png room: what it decodes is what a library decodes, and what is not for it is left alone."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from png import decode_gray


def write(array: np.ndarray, filters, level: int = 6, n_chunks: int = 1) -> bytes:
    """A gray PNG whose rows are filtered as `filters` says, by the definition."""
    padded = np.pad(array.astype(int), ((1, 0), (1, 0)))
    left, up, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    guess = left + up - corner
    away = np.stack([np.abs(guess - left), np.abs(guess - up), np.abs(guess - corner)])
    paeth = np.choose(away.argmin(axis=0), [left, up, corner])
    guesses = [0 * left, left, up, (left + up) // 2, paeth]
    rows = [bytes([f]) + ((array[y].astype(int) - guesses[f][y]) % 256).astype(np.uint8).tobytes() for y, f in filters]
    packed = zlib.compress(b"".join(rows), level)
    size = -(-len(packed) // n_chunks)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 8, 0, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        (b"tEXt", b"a\0b"),
        *((b"IDAT", packed[i : i + size]) for i in range(0, len(packed), size)),
    ]
    chunks = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*parts, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def blob(shape: tuple[int, int] = (40, 57)) -> np.ndarray:
    y, x = np.indices(shape)
    return np.where((y - 18) ** 2 + (x - 30) ** 2 < 150, 255, 0).astype(np.uint8)


NOISE = np.random.default_rng(0).integers(0, 256, (10, 33), dtype=np.uint8)


@pytest.mark.parametrize("kind", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "array", [blob((10, 57)), NOISE, NOISE[:1], NOISE[:, :1]], ids=["blob", "noise", "row", "column"]
)
@pytest.mark.parametrize("n_chunks", [1, 3])
def test_every_filter_is_undone(kind, array, n_chunks):
    data = write(array, [(y, kind) for y in range(len(array))], n_chunks=n_chunks)
    assert np.array_equal(imagecodecs.png_decode(data), array)  # the writer is right
    found = decode_gray(data)
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    assert np.array_equal(found, array)


@pytest.mark.parametrize("seed", range(4))
def test_filters_may_be_mixed(seed):
    kinds = np.random.default_rng(seed).choice([0, 1, 2, 4], len(NOISE))
    data = write(NOISE, list(enumerate(kinds.tolist())))
    assert np.array_equal(decode_gray(data), NOISE)


@pytest.mark.parametrize("options", [{}, {"level": 1}, {"level": 9}, {"filter": 0x10}, {"filter": 0xF8}])
def test_as_the_library_wrote_it(options):
    data = imagecodecs.png_encode(blob(), **options)
    found = decode_gray(data)
    assert found is None or np.array_equal(found, blob())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I;16"])
def test_other_kinds_are_left_alone(mode):
    image = Image.fromarray(blob().astype(np.uint16)) if mode == "I;16" else Image.fromarray(blob()).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert decode_gray(file.getvalue()) is None


def test_many_rows_of_a_slow_filter_are_left_alone():
    assert decode_gray(write(blob(), [(y, 4) for y in range(40)])) is None
    assert decode_gray(write(blob(), [(y, 3) for y in range(40)])) is None


@pytest.mark.parametrize("n", [0, 20, 33, 40, 60, -30, -13])
def test_a_file_that_is_cut_off_is_left_alone(n):
    data = write(NOISE, [(y, 0) for y in range(10)])
    found = decode_gray(data[:n])
    assert found is None or (n == -13 and np.array_equal(found, NOISE))  # all that is missing there is the end mark


def test_a_file_with_a_wrong_byte_is_left_alone():
    data = bytearray(write(NOISE, [(y, 0) for y in range(10)], level=0))
    data[120] ^= 1
    assert decode_gray(bytes(data)) is None


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (11, 33), (9, 33), (0, 33)])
def test_a_header_that_lies_is_left_alone(size):
    data = bytearray(write(NOISE, [(y, 0) for y in range(10)]))
    data[16:24] = struct.pack(">II", size[1], size[0])
    assert decode_gray(bytes(data)) is None
