"""When two pictures are the same, or nearly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 32  # pixels of the thumbnail that the perceptual hash is made of
BLOCK = 8  # lowest frequencies a side that are kept


def pixel_hash(array: NDArray, alpha: bool = False) -> str:
    """Name an image by its pixels, whatever file format holds them.

    Opacity is left out, and equal channels are one: the same gray picture as gray, RGB or RGBA has one name.

    Parameters
    ----------
    array
        (H, W) or (H, W, C), of any type, as `image.read_pixels` gives it.
    alpha
        Whether the last channel is opacity.

    Returns
    -------
    40 hexadecimal digits.
    """
    array = array[..., :-1] if alpha else array
    if array.ndim == 3 and (array == array[..., :1]).all():
        array = array[..., 0]
    digest = hashlib.sha1(f"{array.shape} {array.dtype.newbyteorder('=')}".encode())
    digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).tobytes())
    return digest.hexdigest()


def perceptual_hash(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Describe how a picture looks from afar: signs of its lowest frequencies against their median.

    Parameters
    ----------
    image
        (H, W, 3) uint8.

    Returns
    -------
    (64,) bool. Pictures that were scaled, compressed or changed in brightness differ in few places, others in about
    half.
    """
    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    waves = cv2.dct(small.astype(np.float32))[:BLOCK, :BLOCK].ravel()
    return waves > np.median(waves[1:])  # the first is the mean brightness


def thumbnail(image: NDArray[np.uint8], side: int = 2 * SIDE) -> NDArray[np.float32]:
    """A small gray picture of mean 0 and norm 1, (side * side,) float32; all 0 where the image is flat."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    norm = float(np.linalg.norm(small))
    return small / norm if norm > 1e-3 else np.zeros_like(small)


def near_pairs(
    hashes: Sequence[NDArray[np.bool_]],
    thumbnails: Sequence[NDArray[np.float32]],
    max_bits: int = 10,
    min_correlation: float = 0.9,
) -> list[tuple[int, int, float]]:
    """Pairs of pictures that look alike.

    The hash alone takes all dark fields with a few bright dots for one another, so a pair counts only if small pictures
    of the two agree as well.

    Parameters
    ----------
    hashes
        Of each picture, (64,) bool.
    thumbnails
        Of each picture, (N,) float32 of mean 0 and length 1.
    max_bits
        In how many of the 64 places two hashes may differ.
    min_correlation
        Least correlation of the two thumbnails.

    Returns
    -------
    list of (int, int, float)
        Positions i < j and the correlation of the pair.
    """
    if len(hashes) < 2:
        return []
    bits = np.stack(hashes).astype(np.int32)
    differing = bits @ (1 - bits).T
    differing = differing + differing.T
    pairs = np.argwhere(np.triu(differing <= max_bits, 1)).tolist()
    scored = ((i, j, float(thumbnails[i] @ thumbnails[j])) for i, j in pairs)
    return [(i, j, value) for i, j, value in scored if value >= min_correlation]
