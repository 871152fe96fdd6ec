"""An image of any size, shown to networks tile by tile: its maps are blended so that no seam shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from tile import Span, Strip, Window, plan_strips, whole
from view import unzoom_maps, zoom_image

Image = NDArray[np.uint8]
#: Of one network: head -> (H, W) float32, or (C, H, W).
Maps = dict[str, NDArray[np.float32]]
#: A window that lies within the image -> its pixels, (h, w, 3) uint8.
Read = Callable[[Window], Image]

#: What continues an image beyond its border: of OpenCV, and the value where it is constant.
PADDING = {
    "reflect": (cv2.BORDER_REFLECT_101, 0),
    "replicate": (cv2.BORDER_REPLICATE, 0),
    "black": (cv2.BORDER_CONSTANT, 0),
    "white": (cv2.BORDER_CONSTANT, 255),
}
#: Of a first look: side of the places compared; how many of them along a side of the image, as far as there is room;
#: and the farthest that they lie apart, however many that takes: a needle biopsy is some thousand pixels wide.
PROBE, N_PROBES, PROBE_STEP = 256, 8, 2048


@dataclass(frozen=True)
class Mosaic:
    """The tiles of one image.

    Attributes
    ----------
    read : callable
        See `Read`.
    shape : (int, int)
        Of the image.
    predict : callable
        (h, w, 3) uint8 -> the maps of each network, of the same size, without a border of its own.
    side, overlap, border : int
        Greatest view, least overlap of two, and border of the image, in pixels of the enlargement.
    stride : int
        Of the networks.
    zoom : Fraction
        How many times the image is enlarged before networks see it.
    padding : str
        Row of `PADDING`.

    Raises
    ------
    ValueError
        As `tile.plan_strips`, when tiles are asked for.
    """

    read: Read
    shape: tuple[int, int]
    predict: Callable[[Image], list[Maps]]
    side: int
    overlap: int
    border: int
    stride: int
    zoom: Fraction = Fraction(1)
    padding: str = "reflect"

    @cached_property
    def strips(self) -> tuple[list[Strip], list[Strip]]:
        """The tiles along the rows and the columns."""
        rows, columns = (
            plan_strips(length, self.side, self.overlap, self.stride, self.border, self.zoom) for length in self.shape
        )
        return rows, columns

    def touching(self, window: Window) -> list[tuple[int, int]]:
        """The tiles, (row, column), that have something to say of a window."""
        rows, columns = (
            [i for i, strip in enumerate(strips) if max(strip.target.start, start) < min(strip.target.stop, stop)]
            for strips, (start, stop) in zip(self.strips, window, strict=True)
        )
        return [(i, j) for i in rows for j in columns]

    def tile(self, index: tuple[int, int]) -> list[Maps]:
        """The maps of one tile by each network, of the size of its targets."""
        y, x = (strips[i] for strips, i in zip(self.strips, index, strict=True))
        image = zoom_image(
            read_beyond(self.read, Window(y.source, x.source), self.shape, self.padding), float(self.zoom)
        )
        members = self.predict(np.ascontiguousarray(image[y.view.slice, x.view.slice]))
        height, width = y.target.length, x.target.length
        return [
            {
                head: unzoom_maps(maps[..., y.crop.slice, x.crop.slice], (y.grown, x.grown))[..., :height, :width]
                for head, maps in member.items()
            }
            for member in members
        ]

    def blend(self, window: Window, get: Callable[[tuple[int, int]], list[Maps]] | None = None) -> list[Maps]:
        """The maps of a window by each network.

        Parameters
        ----------
        window : Window
            Within the image.
        get : callable, optional
            As `tile`, which it may remember.
        """
        blended: list[Maps] = []
        for index in self.touching(window):
            members = (get or self.tile)(index)
            blended = blended or [self._blank(member, window.shape) for member in members]
            y, x = (strips[i] for strips, i in zip(self.strips, index, strict=True))
            target = Window(y.target, x.target)
            shared = target.meet(window)
            assert shared is not None  # it touches
            (rows, columns), there = shared.within(target), shared.within(window)
            weight = y.weight[rows, None] * x.weight[columns]
            for into, member in zip(blended, members, strict=True):
                for head, maps in member.items():
                    into[head][..., there[0], there[1]] += weight * maps[..., rows, columns]
        return blended

    def _blank(self, member: Maps, shape: tuple[int, int]) -> Maps:
        return {head: np.zeros((*maps.shape[:-2], *shape), np.float32) for head, maps in member.items()}

    def all(self) -> list[Maps]:
        """The maps of the whole image."""
        return self.blend(whole(self.shape))


def needs_tiles(shape: tuple[int, int], zoom: float, border: int, side: int) -> bool:
    """Whether an image, enlarged and with its border, exceeds a tile of `side` pixels; never where that is 0."""
    return bool(side) and max(shape) * zoom + 2 * border > side


def read_beyond(read: Read, window: Window, shape: tuple[int, int], padding: str) -> Image:
    """The pixels of a window that may reach beyond the image, (h, w, 3) uint8."""
    inside = Window(*(Span(max(s.start, 0), min(s.stop, n)) for s, n in zip(window, shape, strict=True)))
    image = read(inside)
    top, left = (i.start - s.start for i, s in zip(inside, window, strict=True))
    bottom, right = (s.stop - i.stop for i, s in zip(inside, window, strict=True))
    return surround(image, (top, bottom, left, right), padding)


def surround(image: Image, margins: tuple[int, int, int, int], padding: str) -> Image:
    """An (H, W, 3) uint8 image with a border of so many pixels at its top, bottom, left and right; a row of `PADDING`
    says what it holds."""
    mode, value = PADDING[padding]
    bordered = cv2.copyMakeBorder(np.ascontiguousarray(image), *margins, mode, value=(value,) * 3)
    return np.asarray(bordered, np.uint8)


def probe(shape: tuple[int, int]) -> list[Window]:
    """Small windows spread evenly over an image, `N_PROBES` along a side or one every `PROBE_STEP`; all of a small
    image."""
    counts = [max(min(N_PROBES, n // PROBE), -(-n // PROBE_STEP)) for n in shape]
    spans = [
        [Span(begin, begin + min(PROBE, n)) for begin in _begins(n, PROBE, count)]
        for n, count in zip(shape, counts, strict=True)
    ]
    return [Window(row, column) for row in spans[0] for column in spans[1]]


def busiest(read: Read, shape: tuple[int, int], side: int, n: int) -> Iterator[Image]:
    """Samples of a large image where its intensities differ most: there are nuclei, if there are any.

    Parameters
    ----------
    read : callable
        See `Read`.
    shape : (int, int)
        Of the image.
    side, n : int
        Of each sample, and how many at most.

    Yields
    ------
    (h, w, 3) uint8
    """
    places = sorted(probe(shape), key=lambda window: -float(read(window).std()))
    taken: list[Window] = []
    for place in places:
        sample = Window(*(_around(span, min(side, length), length) for span, length in zip(place, shape, strict=True)))
        if len(taken) < n and all(sample.meet(other) is None for other in taken):
            taken.append(sample)
            yield read(sample)


def _begins(length: int, side: int, n: int) -> Sequence[int]:
    free = max(length - side, 0)
    return [round(free * (i + 0.5) / n) for i in range(n)] if n > 1 else [free // 2]


def _around(span: Span, side: int, length: int) -> Span:
    """A span of `side` pixels around the middle of another, within the axis."""
    start = min(max((span.start + span.stop - side) // 2, 0), length - side)
    return Span(start, start + side)
