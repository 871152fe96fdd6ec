"""Light through a stained section: how much of it is absorbed, how much comes through; and whether there is colour."""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

#: Optical density (red, green, blue) of hematoxylin and of diaminobenzidine, brown (Ruifrok and Johnston, Anal Quant
#: Cytol Histol 23, 2001).
HEMATOXYLIN = (0.65, 0.70, 0.29)
DAB = (0.27, 0.57, 0.78)
GRAY_RANGE, COLORED_SHARE = 8, 0.01  # a pixel has a colour where its channels differ by more; an image where more do
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)


def density(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density of each 8-bit intensity: minus the natural logarithm of the share of light that comes through.

    The decadic logarithm, which others use, gives 2.303 times less.

    Parameters
    ----------
    image : (H, W, C) uint8

    Returns
    -------
    (H, W, C) float32
        0 where all light comes through (255), 5.5 where none does.
    """
    return cast(NDArray[np.float32], cv2.LUT(image, _DENSITY))


def intensity(density: NDArray[np.floating]) -> NDArray[np.floating]:
    """The intensity, -1..255 and not rounded, that an optical density leaves; undoes `density`."""
    return 256 * np.exp(-density) - 1


def is_gray(image: NDArray[np.uint8]) -> bool:
    """Whether all but a hundredth of the pixels of an (H, W, 3) image are without colour, up to what compression leaves
    behind."""
    red, green, blue = cv2.split(np.asarray(image))
    spread = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))
    return bool(np.count_nonzero(spread > GRAY_RANGE) <= COLORED_SHARE * spread.size)
