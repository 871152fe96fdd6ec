"""The algebra of label maps: pure functions on (H, W) integers, 0 for background and one id per nucleus.

All work is vectorised over nuclei. Functions that return a label map return a new int32 array and, unless
they say otherwise, leave the ids of the nuclei they keep as they were; `relabel` closes the gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from skimage import measure

Labels = NDArray[np.integer[Any]]


def relabel(labels: Labels) -> NDArray[np.int32]:
    """Number the nuclei 1..N without gaps, in order of increasing old id.

    Parameters
    ----------
    labels
        (H, W) integers >= 0, or booleans (one nucleus). Ids may be as large as int64 allows.

    Returns
    -------
    (H, W) int32, always a copy; all 0 where there is no nucleus.

    Raises
    ------
    ValueError
        `labels` is not two-dimensional, not of integers, or holds a negative id. The other functions also
        refuse ids beyond int32.
    """
    labels = _checked(labels, highest=np.iinfo(np.int64).max)
    if labels.max(initial=0) > labels.size:  # a lookup table would be longer than the image
        ids, index = np.unique(labels, return_inverse=True)
        return (index.reshape(labels.shape) + (ids[0] > 0)).astype(np.int32)
    present = np.bincount(labels.ravel(), minlength=1) > 0
    present[0] = False
    return np.take(np.cumsum(present, dtype=np.int32), labels)


def compose(pixels: Sequence[NDArray[np.integer[Any]]], shape: tuple[int, int]) -> NDArray[np.int32]:
    """Draw nuclei that may overlap into one map: a pixel goes to the smallest of those that claim it.

    A nucleus that lies on a larger one survives in this way. Of equally large ones the first wins.

    Parameters
    ----------
    pixels
        For each nucleus the indices of its pixels in the flattened image; none at all is allowed.
    shape
        (height, width) of the image.

    Returns
    -------
    (H, W) int32: the i-th nucleus, counted from 1, holds i, unless others hide all of it.
    """
    labels = np.zeros(shape, np.int32)
    # Painted from the largest to the smallest; a stable sort from the end lets the first of equals be painted last.
    for i in sorted(range(len(pixels)), key=lambda i: (pixels[i].size, i), reverse=True):
        labels.ravel()[pixels[i]] = i + 1
    return labels


def areas(labels: Labels) -> NDArray[np.int64]:
    """Count the pixels of every id.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.

    Returns
    -------
    (N + 1,) int64, N the greatest id: entry i is the area of id i in pixels, entry 0 that of the background,
    and an id that does not occur has area 0.

    Raises
    ------
    ValueError
        As for `relabel`.
    """
    return np.bincount(_checked(labels).ravel(), minlength=1).astype(np.int64)


def typical_area(labels: Labels) -> int:
    """Area (px) of the label that a typical pixel belongs to: half of the foreground is in labels no larger.

    The median over labels would be at the mercy of specks, of which a bad segmentation has many. 0 without labels.
    """
    return typical_size(np.bincount(_checked(labels).ravel())[1:])


def typical_size(sizes: NDArray[np.integer]) -> int:
    """The same of labels whose areas (px), (N,), are known."""
    sizes = np.sort(sizes)
    covered = np.cumsum(sizes)
    return int(sizes[np.searchsorted(covered, covered[-1] / 2)]) if covered.size else 0


def typical_diameter(labels: Labels) -> float:
    """Diameter (px) of a disk of the typical area; 0 without labels."""
    return float(disk_diameter(typical_area(labels)))


def disk_diameter(area: ArrayLike) -> NDArray[np.float64]:
    """Diameter (px) of a disk of each area (px)."""
    return np.sqrt(4 * np.asarray(area) / np.pi)


def pile(maps: Sequence[Labels]) -> NDArray[np.int32]:
    """Lay the label maps of several images one upon the other, so that they count as one.

    Parameters
    ----------
    maps
        (h, w) integers >= 0 each, of any shapes.

    Returns
    -------
    (sum of h, greatest w) int32: the nuclei of all, numbered on; (0, 0) without maps.
    """
    piled = np.zeros(
        (sum(len(labels) for labels in maps), max((labels.shape[1] for labels in maps), default=0)), np.int32
    )
    top = n = 0
    for labels in maps:
        labels = relabel(labels)
        piled[top : top + len(labels), : labels.shape[1]] = np.where(labels > 0, labels + n, 0)
        top, n = top + len(labels), n + int(labels.max(initial=0))
    return piled


def split_fragments(labels: Labels, connectivity: int = 1) -> NDArray[np.int32]:
    """Give every connected piece of every nucleus an id of its own.

    Touching nuclei of different ids stay apart; two pieces of one id come apart.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.
    connectivity
        1: pixels hang together by their sides; 2: by their corners too.

    Returns
    -------
    (H, W) int32, pieces numbered 1..M in the order a row by row scan meets them.

    Raises
    ------
    ValueError
        As for `relabel`, or `connectivity` is neither 1 nor 2.
    """
    pieces: NDArray[np.int_] = measure.label(_checked(labels), background=0, connectivity=connectivity)
    return pieces.astype(np.int32)


def components(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the pieces of a mask whose pixels hang together by their sides.

    Parameters
    ----------
    mask
        (H, W) bool.

    Returns
    -------
    (H, W) int32, pieces numbered 1..M in the order a row by row scan meets them.
    """
    return cv2.connectedComponents(np.ascontiguousarray(mask).view(np.uint8), connectivity=4, ltype=cv2.CV_32S)[1]


def overlap_table(true: Labels, pred: Labels) -> NDArray[np.int64]:
    """Count the pixels shared by every id of one map and every id of another.

    Row 0 and column 0 are the backgrounds; row sums are ``areas(true)``, column sums ``areas(pred)``. The
    table is dense and sized by the greatest ids, so pass maps that went through `relabel`.

    Parameters
    ----------
    true, pred
        (H, W) integers >= 0, of one shape.

    Returns
    -------
    (n_true + 1, n_pred + 1) int64, n the greatest id of each map.

    Raises
    ------
    ValueError
        The shapes differ, or as for `relabel`.
    """
    true, pred = _checked(true), _checked(pred)
    if true.shape != pred.shape:
        raise ValueError(f"true labels: shape {true.shape}, predicted: {pred.shape}; are they of one image?")
    n_rows, n_columns = int(true.max(initial=0)) + 1, int(pred.max(initial=0)) + 1
    pairs = true.ravel().astype(np.int64) * n_columns + pred.ravel()
    return np.bincount(pairs, minlength=n_rows * n_columns).reshape(n_rows, n_columns).astype(np.int64)


def same_instances(first: Labels, second: Labels) -> bool:
    """Whether two maps of one image hold the same nuclei, however they are numbered.

    Raises
    ------
    ValueError
        As for `overlap_table`.
    """
    table = overlap_table(relabel(first), relabel(second)) > 0
    alone = (table.sum(axis=0) <= 1).all() and (table.sum(axis=1) <= 1).all()
    return bool(alone and np.array_equal(first > 0, second > 0))


def boundaries(labels: Labels) -> NDArray[np.bool_]:
    """Mark the outermost pixels of every nucleus.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.

    Returns
    -------
    (H, W) bool: nucleus pixels one of whose four side neighbours has another id, background or nucleus. The
    border of the image is no edge, so a nucleus that fills the image has no boundary.

    Raises
    ------
    ValueError
        As for `relabel`.
    """
    labels = _checked(labels)
    edge = np.zeros(labels.shape, bool)
    vertical, horizontal = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    return edge & (labels > 0)


def depth(labels: Labels) -> NDArray[np.float32]:
    """Measure how deep every pixel lies in its own nucleus, even where that touches another.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.

    Returns
    -------
    (H, W) float32: 0 in the background, 1 on the `boundaries`, and inside 1 plus the distance (px) to them, to within a
    few percent. Where a nucleus fills the image and has no boundary, H + W.
    """
    labels = _checked(labels)
    core = ((labels > 0) & ~boundaries(labels)).astype(np.uint8)
    inside = cv2.distanceTransform(core, cv2.DIST_L2, cv2.DIST_MASK_5) + 1
    return np.where(labels > 0, np.minimum(inside, sum(labels.shape)), 0).astype(np.float32)


def adjacency(labels: Labels, radius: int = 1) -> NDArray[np.int32]:
    """List the pairs of nuclei that come near each other.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.
    radius
        Greatest Chebyshev distance in pixels, >= 1, at which two nuclei are neighbours. 1: they touch by a
        side or a corner; 2: one background pixel may lie between.

    Returns
    -------
    (K, 2) int32, rows (a, b) with a < b, unique, in lexicographic order; (0, 2) where no two nuclei are near.

    Raises
    ------
    ValueError
        As for `relabel`, or `radius` is below 1.

    Notes
    -----
    Only boundary pixels are compared: from an inner pixel one step towards the other nucleus is never further
    away, so some closest pair of pixels lies on the two boundaries.
    """
    if radius < 1:
        raise ValueError(f"radius: {radius}, wanted at least 1 pixel")
    padded = np.pad(_checked(labels).astype(np.int64), radius)
    here = np.flatnonzero(boundaries(padded))
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    steps = (dy * padded.shape[1] + dx).ravel()
    steps = steps[steps > 0]  # half of the window, so that each pair of pixels is seen once
    own, other = np.broadcast_arrays(padded.ravel()[here, None], padded.ravel()[here[:, None] + steps])
    near = (other > 0) & (other != own)
    own, other = own[near], other[near]
    n_ids = int(padded.max()) + 1
    pairs = np.unique(np.minimum(own, other) * n_ids + np.maximum(own, other))
    return np.stack(np.divmod(pairs, n_ids), axis=1).astype(np.int32)


def color(labels: Labels, n_colors: int = 4) -> NDArray[np.int32]:
    """Give touching nuclei different colours.

    Greedy, by saturation: the nucleus whose neighbours show most colours comes first (ties: more neighbours,
    then the lower id) and takes, of the colours still free, the one used least so far, which also spreads
    lone nuclei over the palette. The same map gets the same colours every time.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.
    n_colors
        Size of the palette, >= 1. Four do where nuclei touch in small groups; tissue packed without gaps
        often takes five or six in this greedy order. A nucleus with no colour left takes one above
        `n_colors`.

    Returns
    -------
    (N + 1,) int32, N the greatest id: colours 1..k of the ids, 0 for the background and for ids that do not
    occur. ``color(labels)[labels]`` is the coloured map.

    Raises
    ------
    ValueError
        As for `relabel`, or `n_colors` is below 1.

    References
    ----------
    D. Brelaz, New methods to color the vertices of a graph, 1979, doi:10.1145/359094.359101
    """
    if n_colors < 1:
        raise ValueError(f"n_colors: {n_colors}, wanted at least 1")
    sizes, pairs = areas(labels), adjacency(labels)
    edges = np.concatenate([pairs, pairs[:, ::-1]])
    edges = edges[np.argsort(edges[:, 0], kind="stable")]
    degrees = np.bincount(edges[:, 0], minlength=len(sizes))
    neighbours = np.split(edges[:, 1], np.cumsum(degrees)[:-1])
    width = max(n_colors, int(degrees.max()) + 1)  # one more than neighbours: some colour is always free
    taken, used = np.zeros((len(sizes), width), bool), np.zeros(width, np.int64)
    colors, rank = np.zeros(len(sizes), np.int32), degrees.astype(np.int64)
    done = np.iinfo(np.int64).min // 2
    rank[0] = done
    rank[sizes == 0] = done
    for _ in range(np.count_nonzero(sizes[1:])):
        nucleus = rank.argmax()
        free = np.flatnonzero(~taken[nucleus])
        choice = free[used[free[free < n_colors]].argmin()] if free[0] < n_colors else free[0]
        colors[nucleus], rank[nucleus], near = choice + 1, done, neighbours[nucleus]
        rank[near] += len(sizes) * ~taken[near, choice]  # one more colour seen outweighs any degree
        taken[near, choice] = True
        used[choice] += 1
    return colors


def remove_small(labels: Labels, min_size: int) -> NDArray[np.int32]:
    """Erase the nuclei of fewer than `min_size` pixels.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.
    min_size
        Smallest area in pixels that stays; 0 and 1 keep every nucleus.

    Returns
    -------
    (H, W) int32; what stays keeps its id.

    Raises
    ------
    ValueError
        As for `relabel`.
    """
    labels = _checked(labels)
    return np.where((areas(labels) >= min_size)[labels], labels, 0).astype(np.int32)


def fill_holes(labels: Labels) -> NDArray[np.int32]:
    """Give the holes of a nucleus to that nucleus.

    A hole is a piece of background, joined by the sides of its pixels, that does not reach the border of the
    image and whose side neighbours all belong to one nucleus. A hole between several touching nuclei is left
    alone, and so is the ring between a nucleus and another one that lies inside it.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.

    Returns
    -------
    (H, W) int32; every nucleus keeps its pixels and its id.

    Raises
    ------
    ValueError
        As for `relabel`.
    """
    framed = np.pad(_checked(labels), 1)  # the frame joins all background that reaches the border
    pieces = components(framed == 0).ravel()
    inner = np.flatnonzero(pieces > 1)  # the frame is scanned first
    if inner.size:
        width, flat = framed.shape[1], framed.ravel()
        met = flat[inner[:, None] + np.array([-width, -1, 1, width])]
        owner, _ = only_neighbours(met, pieces[inner], int(pieces.max()) + 1)
        flat[inner] = owner[pieces[inner]]
    return framed[1:-1, 1:-1].astype(np.int32)


def only_neighbours(
    met: Labels, piece: NDArray[np.integer[Any]], n_pieces: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Say of each piece of an image which nucleus it meets, where that is one alone.

    Parameters
    ----------
    met
        (n, k): the ids beside each pixel of the pieces, 0 for none.
    piece
        (n,): the piece of each pixel, below `n_pieces`.

    Returns
    -------
    (n_pieces,) int64: the only id, 0 where there is none or several; and (n_pieces,) bool, whether there are several.
    """
    none = np.iinfo(np.int64).max
    lowest, highest = np.full(n_pieces, none), np.zeros(n_pieces, np.int64)
    some, beside = np.nonzero(met)
    np.minimum.at(lowest, piece[some], met[some, beside].astype(np.int64))
    np.maximum.at(highest, piece[some], met[some, beside].astype(np.int64))
    return np.where(lowest == highest, highest, 0), lowest < highest


def remove_fiber(labels: Labels, *, ratio: float = 5.0, eccentricity: float = 0.95) -> NDArray[np.int32]:
    """Erase the largest object where it looks like a fiber: far larger than any nucleus, and long.

    Parameters
    ----------
    labels
        (H, W) integers >= 0.
    ratio
        How many times the area of the second largest the largest has to exceed.
    eccentricity
        What the eccentricity of the ellipse with its second moments has to exceed; 0 is a circle, 1 a line.

    Returns
    -------
    (H, W) int32; what stays keeps its id. With fewer than two objects nothing is erased.

    Raises
    ------
    ValueError
        As for `relabel`.
    """
    labels = _checked(labels)
    sizes = areas(labels)
    sizes[0] = 0
    second, largest = np.sort(np.append(sizes, 0))[-2:]
    if second == 0 or largest <= ratio * second:
        return labels.astype(np.int32)
    suspect = labels == sizes.argmax()
    (region,) = measure.regionprops(suspect.astype(np.uint8))
    return np.where(suspect & (region.eccentricity > eccentricity), 0, labels).astype(np.int32)


def _checked(labels: Labels, highest: int = np.iinfo(np.int32).max) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return `labels` as int32 where they are, else as int64, or say why they are no label map up to `highest`."""
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise ValueError(f"labels: {labels.dtype} of shape {labels.shape}, wanted integers (height, width)")
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if low < 0 or high > highest:
        raise ValueError(f"labels: ids from {low} to {high}, wanted 0 (background) to {highest}")
    return labels.astype(np.int32, copy=False) if labels.dtype == np.int32 else labels.astype(np.int64)
