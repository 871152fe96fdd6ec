"""Light through a stained section: how much of it is absorbed, and how much comes through."""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)


def density(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density, minus the logarithm of the share of light that comes through, of each 8-bit intensity.

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
