"""Views of an image: what test-time augmentation shows a network beside the image as it is, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from color import equalize
from config import pick

Image = NDArray[np.uint8]
Maps = NDArray[np.float32]

#: name -> (H, W, 3) uint8 RGB to the same
COLORS: dict[str, Callable[[Image], Image]] = {
    "gray": lambda image: cast(Image, cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)),
    "invert": lambda image: ~image,
    "equalize": equalize,
}


@dataclass(frozen=True)
class View:
    """One way to look at an image: enlarged `zoom` times, recoloured, mirrored left-right, then turned.

    Attributes
    ----------
    turns : int
        Quarter turns, counter-clockwise.
    mirrored : bool
    zoom : float
    color : str
        Row of `COLORS`, or nothing.
    """

    turns: int = 0
    mirrored: bool = False
    zoom: float = 1.0
    color: str = ""

    def then(self, other: View) -> View:
        """Both, one after the other; of two colours the later one."""
        turns = other.turns + (-self.turns if other.mirrored else self.turns)
        return View(turns % 4, self.mirrored != other.mirrored, self.zoom * other.zoom, other.color or self.color)


def _zooms(*zooms: float) -> tuple[View, ...]:
    return (View(), *(View(zoom=zoom) for zoom in zooms))


#: name -> views; the image as it is comes first in each
VIEWS: dict[str, tuple[View, ...]] = {
    "flips": (View(), View(0, True), View(2), View(2, True)),
    "rotations": (View(), View(1), View(2), View(3)),
    "dihedral": tuple(View(turns, mirrored) for turns in range(4) for mirrored in (False, True)),
    "scales": _zooms(0.75, 1.5),
    "double": _zooms(2.0),
    **{color: (View(), View(color=color)) for color in COLORS},
}


def combine(names: Sequence[str]) -> list[View]:
    """The views of all names, each once, the image as it is first.

    Parameters
    ----------
    names : sequence of str
        Rows of `VIEWS`; ``flips*scales`` is each of the one combined with each of the other.

    Raises
    ------
    ValueError
        No such row.
    """
    found = {View(): None}
    for name in names:
        factors = [pick(VIEWS, part.strip(), "view") for part in name.split("*")]
        for views in product(*factors):
            found[_chain(views)] = None
    return list(found)


def _chain(views: Iterable[View]) -> View:
    whole = View()
    for view in views:
        whole = whole.then(view)
    return whole


def zoom_image(image: Image, zoom: float) -> Image:
    """Enlarge an (H, W, 3) uint8 image, to at least one pixel."""
    if zoom == 1:
        return image
    size = [max(round(side * zoom), 1) for side in image.shape[1::-1]]
    return cast(Image, cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if zoom > 1 else cv2.INTER_AREA))


def unzoom_maps(maps: Maps, shape: tuple[int, int]) -> Maps:
    """Bring (h, w) or (C, h, w) float32 maps back to the (height, width) of the image."""
    if maps.shape[-2:] == shape:
        return maps
    if maps.ndim == 2:
        return unzoom_maps(maps[None], shape)[0]
    how = cv2.INTER_AREA if maps.shape[1] > shape[0] else cv2.INTER_LINEAR
    return np.stack([cast(Maps, cv2.resize(m, shape[::-1], interpolation=how)) for m in maps])


def show(image: Image, view: View) -> Image:
    """What a network sees of an (H, W, 3) uint8 image that is enlarged already."""
    image = COLORS[view.color](np.ascontiguousarray(image)) if view.color else image
    image = image[:, ::-1] if view.mirrored else image
    return np.ascontiguousarray(np.rot90(image, view.turns))


def undo(maps: Maps, view: View) -> Maps:
    """Turn and mirror the (C, h, w) float32 maps of a view back."""
    maps = np.rot90(maps, -view.turns, (-2, -1))
    return maps[..., ::-1] if view.mirrored else maps
