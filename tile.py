"""Geometry of tiles: where they lie on an image and its enlargement, how their maps are blended, who owns a nucleus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from labels import Labels, disk_diameter

#: Zooms of tiled images are whole sixteenths: then a tile can begin where a pixel of the image and of its enlargement
#: begin together, and be resampled by itself to the pixels that the whole image would give: the very same where the
#: enlarged side is a whole number, and a fraction of a pixel off at the far end where it has to be rounded.
ZOOM_STEP = 16
#: Of how many diameters of the lesser of two parts the border between them is, at least, where both are one nucleus: a
#: disk cut in its middle has 1.4, disks whose middles are one and a half radii apart have 0.7.
NECK = 0.75
#: Pixels around a tile that an interpolation may look at.
_REACH = 4


class Span(NamedTuple):
    """From the first pixel to one behind the last, along one axis."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


class Window(NamedTuple):
    """Rows and columns of an image."""

    rows: Span
    columns: Span

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.length, self.columns.length

    @property
    def slices(self) -> tuple[slice, slice]:
        return self.rows.slice, self.columns.slice

    def within(self, other: Window) -> tuple[slice, slice]:
        """Where it lies in an array that holds `other`."""
        return tuple(
            slice(mine.start - theirs.start, mine.stop - theirs.start) for mine, theirs in zip(self, other, strict=True)
        )  # type: ignore[return-value]

    def widen(self, margin: int, shape: tuple[int, int]) -> Window:
        """With a margin on all sides, as far as the image reaches."""
        return Window(
            *(Span(max(s.start - margin, 0), min(s.stop + margin, n)) for s, n in zip(self, shape, strict=True))
        )

    def meet(self, other: Window) -> Window | None:
        """What both cover, or nothing."""
        spans = [Span(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(self, other, strict=True)]
        return Window(*spans) if all(span.length > 0 for span in spans) else None


def whole(shape: tuple[int, int]) -> Window:
    """All of an image of (height, width)."""
    return Window(Span(0, shape[0]), Span(0, shape[1]))


@dataclass(frozen=True)
class Strip:
    """A tile along one axis.

    Attributes
    ----------
    source : Span
        Pixels of the image to enlarge; may reach beyond the image, whose border is then to be continued.
    view : Span
        What a network is shown of that enlargement.
    crop : Span
        Of the view, what is kept of its maps and brought back to the size of the image ...
    target : Span
        ... to become these pixels; those beyond the end of the image are cut off.
    grown : int
        Length of the target before that.
    weight : (target,) float32
        How much it counts; over all tiles 1 in every pixel.
    """

    source: Span
    view: Span
    crop: Span
    target: Span
    grown: int
    weight: NDArray[np.float32]


def spread(length: int, side: int, overlap: int, step: int = 1) -> list[Span]:
    """Cover an axis with as few spans as are needed, all of one length.

    Parameters
    ----------
    length, step : int
        Of the axis, in pixels: a multiple of `step`, and so are all spans and where they begin.
    side, overlap : int
        The longest that a span may be, and the least that neighbours share.

    Raises
    ------
    ValueError
        The overlap leaves no room in a tile.
    """
    overlap = -(-overlap // step) * step
    if length <= side:
        return [Span(0, length)]
    free = side // step * step - overlap
    if free < step:
        raise ValueError(
            f"tiles of {side} pixels that share {overlap}: wanted at least {step} more than they share; raise [valid] "
            "tile, set a smaller tile_overlap, or leave double and scales out of test_time_augment"
        )
    n = -(-(length - overlap) // free)
    side = -(-(length + overlap * (n - 1)) // (n * step)) * step
    starts = dict.fromkeys(min(i * (side - overlap), length - side) for i in range(n))
    return [Span(start, start + side) for start in starts]


def blend(spans: Sequence[Span]) -> list[NDArray[np.float32]]:
    """Weights of spans that overlap: smooth, least where a span ends, together 1 in every pixel.

    Returns
    -------
    list of (length,) float32
    """
    begin, end = spans[0].start, max(span.stop for span in spans)
    weights = []
    for i, span in enumerate(spans):
        weight = np.ones(span.length)
        if i and (shared := spans[i - 1].stop - span.start) > 0:
            weight[:shared] *= _rise(shared)[: span.length]
        if i + 1 < len(spans) and (shared := span.stop - spans[i + 1].start) > 0:
            weight[span.length - shared :] *= _rise(shared)[::-1][-span.length :]
        weights.append(weight)
    total = np.zeros(end - begin)
    for span, weight in zip(spans, weights, strict=True):
        total[span.start - begin : span.stop - begin] += weight
    return [
        (weight / total[span.start - begin : span.stop - begin]).astype(np.float32)
        for span, weight in zip(spans, weights, strict=True)
    ]


def _rise(n: int) -> NDArray[np.float64]:
    """From near 0 to near 1 in `n` steps; mirrored it is what is missing to 1."""
    return np.sin(np.pi / 2 * (np.arange(n) + 0.5) / n) ** 2


def plan_strips(
    length: int, side: int, overlap: int, stride: int, border: int = 0, zoom: Fraction = Fraction(1)
) -> list[Strip]:
    """Tiles along one axis of an image that is enlarged and gets a border.

    Parameters
    ----------
    length : int
        Of the image, in pixels.
    side, overlap, border : int
        Greatest view, least overlap, and border, in pixels of the enlargement.
    stride : int
        Of the network: views are multiples of it, and begin at multiples of it, so that the network lays its grid as
        it would on the whole.
    zoom : Fraction

    Raises
    ------
    ValueError
        The overlap leaves no room in a tile.
    """
    p, q = zoom.numerator, zoom.denominator
    border = -(-border // stride) * stride
    enlarged = -(-length // q) * p
    covered = -(-(enlarged + 2 * border) // stride) * stride
    found = []
    for start, stop in spread(covered, side, max(overlap, 2 * p if p > 1 else 1), stride):
        view = Span(start - border, stop - border)
        crop = Span(-(-max(view.start, 0) // p) * p, min(view.stop, enlarged) // p * p)
        if crop.length <= 0:  # a tile of nothing but border
            continue
        grown = Span(crop.start // p * q, crop.stop // p * q)
        source = Span((view.start * q // p - _REACH) // q * q, -(-(-(-view.stop * q // p) + _REACH) // q) * q)
        if zoom == 1:
            source = view
        found.append((source, view, crop, grown))
    targets = [Span(grown.start, min(grown.stop, length)) for *_, grown in found]
    return [
        Strip(
            source,
            Span(view.start - source.start // q * p, view.stop - source.start // q * p),
            Span(crop.start - view.start, crop.stop - view.start),
            target,
            grown.length,
            weight,
        )
        for (source, view, crop, grown), target, weight in zip(found, targets, blend(targets), strict=True)
    ]


def round_zoom(zoom: float) -> Fraction:
    """The nearest zoom that tiles can have."""
    return Fraction(max(round(zoom * ZOOM_STEP), 1), ZOOM_STEP)


def cut_blocks(shape: tuple[int, int], side: int) -> list[Window]:
    """Windows that cover an image once, row by row, each of `side` pixels or what is left."""
    rows, columns = ([Span(i, min(i + side, n)) for i in range(0, n, side)] for n in shape)
    return [Window(row, column) for row in rows for column in columns]


def claim(
    labels: Labels, window: Window, core: Window, shape: tuple[int, int], written: Labels
) -> tuple[NDArray[np.int32], bool]:
    """Which nuclei of a block are its own, and not yet written.

    A nucleus belongs to the block in whose core the middle of its bounding box lies. Should two blocks see it a little
    differently, each might leave it to the other: so a block also takes what lies just above or left of its core,
    unless it is written already: most of it, or so much that the rest is no nucleus of its own.

    Parameters
    ----------
    labels : (h, w) int32
        What the block sees in its `window`, 1..N.
    window, core : Window
        The core with a halo around it, and the core.
    shape : (int, int)
        Of the image.
    written : (h, w) integers
        What earlier blocks wrote there.

    Returns
    -------
    own : (h, w) int32
        Its nuclei, 1..M, without the pixels that are taken already.
    cut : bool
        The window ends within one of them: a wider one would show more.
    """
    n = int(labels.max(initial=0))
    size = np.bincount(labels.ravel(), minlength=n + 1)
    taken = np.bincount(labels[written > 0], minlength=n + 1)
    own, cut = np.zeros(n + 1, np.int32), False
    slack = tuple((c.start - w.start) // 2 for c, w in zip(core, window, strict=True))
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or 2 * taken[label] >= size[label]:
            continue
        if 3 * taken[label] >= size[label] and _covers_one(labels[box] == label, written[box], written):
            continue
        ends = [Span(s.start + w.start, s.stop + w.start) for s, w in zip(box, window, strict=True)]
        middle = [(end.start + end.stop) // 2 for end in ends]
        if not all(c.start - s <= m < c.stop for m, c, s in zip(middle, core, slack, strict=True)):
            continue
        own[label] = own.max() + 1
        cut |= any(
            (end.start == w.start > 0) or (end.stop == w.stop < n)
            for end, w, n in zip(ends, window, shape, strict=True)
        )
    return np.where(written > 0, 0, own[labels]), cut


def _covers_one(seen: NDArray[np.bool_], there: Labels, written: Labels) -> bool:
    """Whether a nucleus is one that is written, of which an earlier block saw a part alone.

    It is where a written nucleus lies mostly inside, and what is left joins it by more than a neck: two nuclei that
    touch do so along less than `NECK` diameters of the lesser.

    Parameters
    ----------
    seen : (h, w) bool
        The nucleus in its box.
    there, written : integers
        What is written in that box, and in all of the window.
    """
    held = np.bincount(there[seen & (there > 0)])
    other = int(held.argmax())
    if 2 * held[other] < np.count_nonzero(written == other):
        return False
    rest = seen & (there == 0)
    neck = np.count_nonzero(rest & ndimage.binary_dilation(there == other))
    lesser = min(np.count_nonzero(rest), held[other])
    return bool(neck >= NECK * disk_diameter(lesser))


def join(canvas: NDArray[np.int32], labels: Labels, window: Window, core: Window, n_known: int) -> int:
    """Draw the nuclei of a tile into a map of the whole image; a nucleus that is there grows, others are added.

    Parameters
    ----------
    canvas : (H, W) int32
        Changed in place.
    labels : (h, w) int32
        Of the tile's `window`.
    window, core : Window
        As in `claim`.
    n_known : int
        Greatest label of the canvas.

    Returns
    -------
    int
        The same afterwards.
    """
    there = canvas[window.slices]
    known = _most_shared(labels, there)
    new, _ = claim(np.where(known[labels] > 0, 0, labels), window, core, canvas.shape, there)
    # What two tiles see of one long nucleus becomes one: where it is known, only its missing pixels are added.
    missing = np.where(there == 0, known[labels], 0)
    there[new > 0] = new[new > 0] + n_known
    there[missing > 0] = missing[missing > 0]
    return n_known + int(new.max(initial=0))


def _most_shared(labels: Labels, there: Labels) -> NDArray[np.int32]:
    """Of each label the one of `there` that holds most of it, if that is half of either; else 0."""
    known = np.zeros(int(labels.max(initial=0)) + 1, np.int32)
    both = (labels > 0) & (there > 0)
    pairs, count = np.unique(np.stack([labels[both], there[both]]), axis=1, return_counts=True)
    mine, theirs = np.bincount(labels.ravel()), np.bincount(there.ravel())
    for (label, other), n in sorted(zip(pairs.T.tolist(), count.tolist(), strict=True), key=lambda item: item[1]):
        if 2 * n >= min(mine[label], theirs[other]):
            known[label] = other
    return known
