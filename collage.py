"""Cut nuclei out of an image and lay them against others, so that more of them touch and overlap, with exact labels.

A nucleus is cut out as its signal: by how much it differs from the background around it, fading to nothing where it
ends. Light adds up in fluorescence and absorption in a stained section, so the signal is taken in intensities where
nuclei are bright, in optical densities where they are dark, and is added to the background of the place it comes to.
So there is no seam, and nothing is changed away from what was pasted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from light import density, intensity

Image = NDArray[np.uint8]
Labels = NDArray[np.int32]
Mask = NDArray[np.bool_]
Field = NDArray[np.float32]
Rng = np.random.Generator
Window = tuple[slice, slice]

MIN_AREA = 20  # pixels of a nucleus worth pasting
MAX_HIDDEN = 0.35  # share of a nucleus that what is pasted over it may hide
MAX_CROWDED = 0.1  # share of its rim that a nucleus may share with others and still be cut out
MIN_SOLIDITY = 0.85  # share of its convex hull that a nucleus fills, if it is no shred
FRAME = 2  # pixels: a nucleus that comes so near the border of the image is taken for cut off
MAX_GLOW = 0.3  # how strong what surrounds a nucleus may be, as a share of its own strength
MIN_FREE = 12  # pixels of background from which its colour is known
ROUND = 0.7  # share of its width along which a nucleus meets its mirror image, if the two are to be one
N_TRIES = 4  # places tried a nucleus
MAX_PASTED = 6  # nuclei that `paste_nuclei` adds where it is not told how many: a crop should be ready in milliseconds


@dataclass(frozen=True)
class Cutout:
    """A nucleus with its fading rim.

    Attributes
    ----------
    mask : (h, w) bool
        Its pixels; some free ones lie all around.
    signal : (h, w, 3) float32
        By how much it differs from its background, 0 at the border of the array.
    cover : (h, w) float32
        What share of that which lies under it it replaces: 1 inside, falling as its signal falls. Then the sum of the
        two has no dark or bright line where a nucleus ends on another.
    """

    mask: Mask
    signal: Field
    cover: Field


def paste_some(image: Image, labels: Labels, rng: Rng) -> tuple[Image, Labels]:
    """One time in three: `paste_nuclei`."""
    return paste_nuclei(image, labels, rng) if rng.random() < 1 / 3 else (image, labels)


def paste_nuclei(
    image: Image,
    labels: Labels,
    rng: Rng,
    n: int | None = None,
    source: tuple[Image, Labels] | None = None,
) -> tuple[Image, Labels]:
    """Paste nuclei so that they touch or overlap those that are there.

    Each is turned, mirrored and slightly scaled, and pushed against another nucleus from a random side. It hides what
    is under it, but never more than `MAX_HIDDEN` of a nucleus, and cuts none in two; where no such place is found it
    is left out.

    Parameters
    ----------
    image : (H, W, 3) uint8
    labels : (H, W) int32
        0 is background.
    rng : Generator
        The same state gives the same picture.
    n : int, optional
        How many to paste; up to a quarter of those that are there, at most `MAX_PASTED`, where not given.
    source : (image, labels), optional
        Where nuclei are cut from, their contrast brought to that of `image`; `image` itself where not given. Nothing
        is pasted where nuclei are bright in one and dark in the other.

    Returns
    -------
    image : (H, W, 3) uint8
    labels : (H, W) int32
        Ids of before, and new ones above them. The arguments are returned where nothing could be pasted.
    """
    canvas = Canvas(image, labels)
    if not canvas.boxes:
        return image, labels
    donor = canvas if source is None else Canvas(*source)
    candidates = donor.candidates()
    if not candidates.size or donor.dark != canvas.dark:
        return image, labels
    gain = np.clip(canvas.contrast / donor.contrast, 0.5, 2)
    n = int(rng.integers(1, _default_count(canvas) + 1)) if n is None else n
    n_pasted = 0
    for number in rng.choice(candidates, 2 * n).tolist():
        cutout = donor.cut(number) if n_pasted < n else None
        n_pasted += cutout is not None and canvas.paste(_vary(cutout, gain, rng), rng)
    return canvas.result() if n_pasted else (image, labels)


def mirror_tile(
    image: Image, labels: Labels, shape: tuple[int, int], corner: tuple[int, int] = (0, 0)
) -> tuple[Image, Labels]:
    """A window of the plane that an image tiles together with its mirror images.

    A nucleus that the border cuts is continued by its own mirror image. The two are one nucleus where they meet along
    most of their width, so that the whole is round; two that touch where they meet along less of it.

    Parameters
    ----------
    image : (H, W, 3) uint8
    labels : (H, W) int32
    shape : (int, int)
        Height and width of the window.
    corner : (int, int)
        Where (top, left) its corner lies, in pixels of the image; any integer.

    Returns
    -------
    image : (h, w, 3) uint8
    labels : (h, w) int32
        Numbered 1, 2, ...; every mirror image of a nucleus has its own number.
    """
    (rows, row_tile), (columns, column_tile) = (
        _mirror(size, length, first) for size, length, first in zip(labels.shape, shape, corner, strict=True)
    )
    tiles = row_tile[:, None] * (int(column_tile.max(initial=0)) + 1) + column_tile
    _, compact = _compact(labels)
    tiled = compact[rows][:, columns]
    n = int(compact.max(initial=0)) + 1
    _, keys = _compact(np.where(tiled > 0, tiles * n + tiled, 0).astype(np.int32))
    pairs = _join(keys, tiled, row_tile, _meets_border(compact))
    pairs += _join(keys.T, tiled.T, column_tile, _meets_border(compact.T))
    links = np.concatenate([np.zeros((0, 2), np.int32), *pairs])
    n_keys = int(keys.max(initial=0)) + 1
    graph = sparse.coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(n_keys, n_keys))
    numbers = sparse.csgraph.connected_components(graph, directed=False)[1]
    numbers = np.where(np.arange(n_keys) > 0, numbers + 1, 0).astype(np.int32)
    return np.ascontiguousarray(image[rows][:, columns]), _compact(numbers[keys])[1]


def _mirror(size: int, length: int, first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of `length` places from `first` on: which pixel of `size` is there, in which mirror image (0, 1...)."""
    place = np.arange(first, first + length)
    tile, pixel = np.divmod(place, size)
    return np.where(tile % 2, size - 1 - pixel, pixel), tile - tile.min(initial=0)


def _meets_border(labels: Labels) -> tuple[Mask, Mask]:
    """Which numbers meet the first row, and which the last, along most of their width."""
    n = int(labels.max(initial=0)) + 1
    widths = np.array([0] + [box[1].stop - box[1].start for box in ndimage.find_objects(labels)])
    first, last = (np.bincount(labels[row], minlength=n) > ROUND * widths for row in (0, -1))
    return first, last


def _join(keys: Labels, tiled: Labels, tile: NDArray[np.int64], meets: tuple[Mask, Mask]) -> list[NDArray[np.int32]]:
    """Pairs of keys that are one nucleus across the rows where one mirror image ends and the next begins."""
    pairs = []
    for row in np.flatnonzero(np.diff(tile)) + 1:
        touching = (tiled[row] > 0) & (meets[0][tiled[row]] | meets[1][tiled[row]])
        pairs.append(np.stack([keys[row - 1][touching], keys[row][touching]], axis=1))
    return pairs


class Canvas:
    """An image whose nuclei are known by number, and what is pasted onto it.

    Attributes
    ----------
    field : (H, W, 3) float32
        Intensities, or optical densities where nuclei are dark.
    labels : (H, W) int32
        Numbers 1, 2, ... without gaps.
    boxes : list of (slice, slice)
        Where each nucleus lies, in order of number.
    dark : bool
        Whether nuclei are darker than the background.
    contrast : (3,) float64
        By how much nuclei differ from the background in each channel.
    """

    def __init__(self, image: Image, labels: Labels) -> None:
        self._image, self._changed = image, np.zeros(labels.shape, bool)
        self._ids, self.labels = _compact(labels)
        self.boxes: list[Window] = list(ndimage.find_objects(self.labels))
        self._areas = np.bincount(self.labels.ravel(), minlength=1).tolist()
        inside = (self.labels > 0).astype(np.uint8)
        mean, around = (np.array(cv2.mean(image, part)[:3]) for part in (inside, 1 - inside))
        self.dark = bool(mean.sum() < around.sum())
        self.field = density(image) if self.dark else image.astype(np.float32)
        if self.dark:
            mean, around = (np.array(cv2.mean(self.field, part)[:3]) for part in (inside, 1 - inside))
        self._background = around.astype(np.float32)
        self.contrast = np.maximum(np.abs(mean - around), 1e-3 * (1 if self.dark else 256))

    def candidates(self) -> NDArray[np.intp]:
        """Numbers of the nuclei that are whole, and neither specks nor clumps."""
        height, width = self.labels.shape
        low, bottom, right = FRAME, height - FRAME, width - FRAME
        whole = [r.start > low and c.start > low and r.stop < bottom and c.stop < right for r, c in self.boxes]
        areas = np.array(self._areas[1:])
        middle = np.median(areas) if areas.size else 0
        usual = (areas >= max(MIN_AREA, 0.3 * middle)) & (areas <= 4 * middle)
        return np.flatnonzero(usual & np.array(whole, bool)) + 1

    def cut(self, number: int) -> Cutout | None:
        """Cut out a nucleus; None where it is in pieces or shreds, or too crowded to tell what belongs to it."""
        window, margin = self._around(number)
        labels = self.labels[window]
        own = labels == number
        if _n_pieces(own) != 1 or _solidity(own) < MIN_SOLIDITY:
            return None
        beyond = cv2.distanceTransform((~own).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)
        rim, others = (beyond > 0) & (beyond < 2), (labels > 0) & ~own
        far = beyond > margin / 2
        around = self._color_of(window, far)
        if around is None or np.count_nonzero(rim & others) > MAX_CROWDED * np.count_nonzero(rim):
            return None
        signal = self.field[window] - around
        strength = signal.mean(axis=-1)
        typical = np.median(strength[own])
        glow = strength[far & ~others]
        if typical < 0.2 * self.contrast.mean() or (glow.size and glow.mean() > MAX_GLOW * typical):
            return None
        fade = np.clip(1 - (beyond - 1) / (margin - 1), 0, 1).astype(np.float32) * ~others
        fade = np.where(own, np.float32(1), cv2.GaussianBlur(fade, (0, 0), 0.7))
        fade[[0, -1]] = fade[:, [0, -1]] = 0
        signal = np.where(own[..., None], signal, np.maximum(signal, 0)) * fade[..., None]
        core = cv2.erode(own.astype(np.float32), np.ones((5, 5)), borderValue=0)
        cover = cv2.GaussianBlur(np.maximum(np.clip(strength / typical, 0, 1) * fade, core), (0, 0), 0.7)
        return Cutout(own, cast(Field, signal), cast(Field, cover * (fade > 0)))

    def paste(self, cutout: Cutout, rng: Rng) -> bool:
        """Lay a nucleus against another; whether a place was found."""
        for _ in range(N_TRIES):
            anchor = int(rng.integers(1, len(self.boxes) + 1))
            place = self._approach(cutout.mask, anchor, rng)
            if place is not None and self._lay(cutout, place, rng.uniform(0, 0.35)):
                return True
        return False

    def result(self) -> tuple[Image, Labels]:
        """The image, changed only where something was pasted, and the labels with their own ids."""
        image, changed = self._image.copy(), self._changed
        values = self.field[changed]
        values = intensity(values) if self.dark else values
        image[changed] = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
        n_new = len(self.boxes) + 1 - self._ids.size
        ids = np.concatenate([self._ids, self._ids[-1] + 1 + np.arange(n_new)]).astype(np.int32)
        return image, ids[self.labels]

    def _around(self, number: int) -> tuple[Window, int]:
        """The box of a nucleus with a margin (px) about it, as far as the image goes."""
        box = self.boxes[number - 1]
        margin = max(4, round(0.2 * self._areas[number] ** 0.5))
        rows, columns = (slice(max(side.start - margin, 0), side.stop + margin) for side in box)
        return (rows, columns), margin

    def _color_of(self, window: Window, where: Mask) -> NDArray[np.float32] | None:
        """What the background in a window looks like, where it is wanted if it can be; None where all is nuclei."""
        free = self.labels[window] == 0
        for part in (free & where, free):
            if np.count_nonzero(part) >= MIN_FREE:
                values = self.field[window][part]
                rank = len(values) * 2 // 5  # below the median: what is no background, unmarked, lies above it
                return cast(Field, np.partition(values, rank, axis=0)[rank])
        return None

    def _approach(self, mask: Mask, anchor: int, rng: Rng) -> tuple[int, int] | None:
        """Where (top, left) a mask comes to lie when it is pushed against a nucleus from a random side.

        It stops where it would cover more than a random share of the smaller of the two.
        """
        rows, columns = self.boxes[anchor - 1]
        smaller = min(np.count_nonzero(mask), self._areas[anchor])
        allowed = max(0.3 * rng.random() ** 2 * smaller, 2)
        angle = rng.uniform(0, 2 * np.pi)
        step = np.array([np.sin(angle), np.cos(angle)])
        start = np.array([rows.start + rows.stop - mask.shape[0], columns.start + columns.stop - mask.shape[1]]) / 2
        reach = np.hypot(*mask.shape) + np.hypot(rows.stop - rows.start, columns.stop - columns.start)
        near, far, covered = 0, int(reach / 2), 0
        while far - near > 1:
            middle = (near + far) // 2
            top, left = np.rint(start + middle * step).astype(int).tolist()
            window, part = _clip_window(top, left, mask.shape, self.labels.shape)
            hits = int(np.count_nonzero((self.labels[window] == anchor) & mask[part]))
            if hits > allowed:
                near = middle
            else:
                far, covered = middle, hits
        top, left = np.rint(start + far * step).astype(int).tolist()
        return (top, left) if covered else None

    def _lay(self, cutout: Cutout, place: tuple[int, int], shine: float) -> bool:
        """Paste at a place, unless it hides too much or falls too far out of the image.

        `shine` is the share of what is under it that is seen through it.
        """
        window, part = _clip_window(*place, cutout.mask.shape, self.labels.shape)
        mask = cutout.mask[part]
        if 2 * np.count_nonzero(mask) < np.count_nonzero(cutout.mask) or _n_pieces(mask) != 1:
            return False
        around = self._color_of(window, ~mask)
        around = self._background if around is None else around
        if not self._hide(window, mask):
            return False
        cover, signal = (1 - shine) * cutout.cover[part][..., None], cutout.signal[part]
        self.field[window] += signal - cover * (self.field[window] - around)
        self._changed[window] |= (cover[..., 0] > 0) | signal.any(axis=-1)
        return True

    def _hide(self, window: Window, mask: Mask) -> bool:
        """Number the pixels of a new nucleus, unless others would lose too much by it or come apart."""
        labels, number = self.labels[window], len(self._areas)
        before = labels.copy()
        hidden = np.bincount(before[mask])
        labels[mask] = number
        for other in np.flatnonzero(hidden[1:]) + 1:
            left = self.labels[self.boxes[other - 1]] == other
            if np.count_nonzero(left) < (1 - MAX_HIDDEN) * self._areas[other] or _n_pieces(left) != 1:
                labels[:] = before
                return False
        self.boxes.append(_box_of(mask, window[0].start, window[1].start))
        self._areas.append(np.count_nonzero(mask))
        return True


def _default_count(canvas: Canvas) -> int:
    return min(1 + len(canvas.boxes) // 4, MAX_PASTED)


def _vary(cutout: Cutout, gain: NDArray[np.float64], rng: Rng) -> Cutout:
    """Turn, mirror, slightly scale, and make it slightly fainter or stronger."""
    angle, flip = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
    zoom = np.exp(rng.uniform(-0.15, 0.15))
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([flip, 1.0])
    size = np.array(cutout.mask.shape[::-1])
    bounds = np.ceil(np.abs(linear) @ size).astype(int) + 2
    matrix = np.column_stack([linear, (bounds - 1) / 2 - linear @ ((size - 1) / 2)])
    soft = cv2.warpAffine(cutout.mask.astype(np.float32), matrix, bounds.tolist(), flags=cv2.INTER_LINEAR)
    cover = cv2.warpAffine(cutout.cover, matrix, bounds.tolist(), flags=cv2.INTER_LINEAR)
    signal = cv2.warpAffine(cutout.signal, matrix, bounds.tolist(), flags=cv2.INTER_CUBIC)
    strength = (gain * np.exp(rng.uniform(-0.12, 0.12))).astype(np.float32)
    window = _box_of(signal.any(axis=-1) | (soft > 0))
    return Cutout(soft[window] > 0.5, cast(Field, signal[window] * strength), cast(Field, cover[window]))


def _box_of(mask: Mask, top: int = 0, left: int = 0) -> Window:
    """The least box around the pixels of a mask whose corner lies at (top, left)."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return slice(top + y, top + y + height), slice(left + x, left + x + width)


def _n_pieces(mask: Mask) -> int:
    """How many pieces hang together by their sides."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1


def _solidity(mask: Mask) -> float:
    """Share of its convex hull that a mask fills, by the polygon of its outermost pixels."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    largest = max(contours, key=cv2.contourArea)
    return cv2.contourArea(largest) / max(cv2.contourArea(cv2.convexHull(largest)), 1)


def _clip_window(top: int, left: int, shape: tuple[int, int], bounds: tuple[int, int]) -> tuple[Window, Window]:
    """The part of an image that a smaller array covers, and the part of the array that covers it."""
    window, part = [], []
    for low, size, end in zip((top, left), shape, bounds, strict=True):
        first, last = min(max(low, 0), end), min(max(low + size, 0), end)
        window.append(slice(first, last))
        part.append(slice(first - low, last - low))
    return (window[0], window[1]), (part[0], part[1])


def _compact(labels: Labels) -> tuple[Labels, Labels]:
    """Ids in rising order with 0 before them, and the map numbered by their places."""
    if labels.max(initial=0) <= labels.size:
        present = np.bincount(labels.ravel(), minlength=1) > 0
        present[0] = True
        return np.flatnonzero(present).astype(np.int32), (np.cumsum(present, dtype=np.int32) - 1)[labels]
    ids = np.unique(labels)
    ids = ids if ids[0] == 0 else np.concatenate([[0], ids])
    return ids.astype(np.int32), np.searchsorted(ids, labels).astype(np.int32)
