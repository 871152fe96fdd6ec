"""Label map -> the maps a network is trained on, and the weight of each pixel. Vectorised over nuclei."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import skeletonize

from config import Contour, Pre, pick
from labels import boundaries, depth, relabel

#: Share of its greatest depth from which a pixel belongs to the core of its nucleus.
MARKER_DEPTH = 0.4
#: What the outermost ring of a nucleus is worth when labels are soft.
SOFT_EDGE = 0.7
#: Two nuclei are adjacent where both come within this many pixels.
ADJACENT_REACH = 2
#: Two nuclei touch where both come within this many pixels.
TOUCHING_REACH = 1
#: Height and width (px) of the weight along borders, and height of the weight around centroids.
BORDER_WEIGHT, BORDER_SIGMA, CENTROID_WEIGHT = 4.0, 3.0, 1.0
#: Height and width (px) of the weight between two nuclei: w0 and sigma of the U-Net paper.
GAP_WEIGHT, GAP_SIGMA = 10.0, 5.0
#: Height and width (px) of the weight along contours that are hard to follow.
SHAPE_WEIGHT, SHAPE_SIGMA = 4.0, 2.0
#: Most that a pixel weighs for being of the rare class, or an almost empty map would hang on a few pixels.
BALANCE_LIMIT = 10.0
#: Stands for the distance (px) to a border where there is none: its square is still a float32.
FAR = np.float32(1e4)

_RING = np.ones((3, 3), np.uint8)

BoolMap = NDArray[np.bool_]
FloatMap = NDArray[np.float32]


class Geometry:
    """Distances and neighbourhoods of a label map, each computed once and only when a target asks.

    Parameters
    ----------
    labels : (H, W) int32
        0 is background; ids need not be sequential, and stay below 2**24.
    """

    def __init__(self, labels: NDArray[np.int32]) -> None:
        self.labels = labels
        self.inside: BoolMap = labels > 0

    @cached_property
    def as_float(self) -> FloatMap:
        """The labels as OpenCV's morphology wants them; exact below 2**24."""
        return self.labels.astype(np.float32)

    @cached_property
    def numbers(self) -> NDArray[np.int32]:
        """The labels as 1..N without gaps."""
        return relabel(self.labels)

    @cached_property
    def depth(self) -> FloatMap:
        """See `labels.depth`."""
        return depth(self.labels)

    @cached_property
    def greatest_depth(self) -> FloatMap:
        """Of each label, the greatest depth, (largest id + 1,) float32; 1 for the background and ids not in use."""
        greatest = np.ones(int(self.labels.max(initial=0)) + 1, np.float32)
        np.maximum.at(greatest, self.labels.ravel(), self.depth.ravel())
        return greatest

    @cached_property
    def border_distance(self) -> FloatMap:
        """Distance (px) to the nearest border of a nucleus, from inside and outside; large where there is none."""
        return np.where(self.inside, self.depth, _distance_to(self.inside))

    @cached_property
    def relative_radius(self) -> FloatMap:
        """Distance to the own centroid over the radius of a disk of the same area; infinite in the background."""
        away = np.full(self.labels.size, np.inf, np.float32)
        pixels = np.flatnonzero(self.labels)
        ids = self.labels.ravel()[pixels]
        y, x = np.divmod(pixels, self.labels.shape[1])
        area = np.maximum(np.bincount(ids), 1)
        up, left = y - (np.bincount(ids, y) / area)[ids], x - (np.bincount(ids, x) / area)[ids]
        away[pixels] = np.sqrt((up**2 + left**2) * (np.pi / area)[ids])
        return away.reshape(self.labels.shape)

    @cached_property
    def class_balance(self) -> FloatMap:
        """Nuclei and background weigh the same in sum, and a pixel 1 on average, but none more than `BALANCE_LIMIT`.

        A class that takes the share s of the map weighs 1 / (2 s) per pixel, more than 0.5; the limit is met where s is
        below 5 percent. A map of one class is 1 everywhere.
        """
        share = float(self.inside.mean())
        if share in (0, 1):
            return np.ones(self.labels.shape, np.float32)
        of_background, of_nuclei = np.minimum(0.5 / np.array([1 - share, share], np.float32), np.float32(BALANCE_LIMIT))
        return np.where(self.inside, of_nuclei, of_background)


def _distance_to(mask: BoolMap) -> FloatMap:
    """Distance (px) of each pixel to the nearest one of the mask, true to 2 percent; `FAR` where the mask is empty."""
    if not mask.any():
        return np.full(mask.shape, FAR, np.float32)
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)


def _semantic(geometry: Geometry) -> BoolMap:
    return geometry.inside


def _soft_semantic(geometry: Geometry) -> FloatMap:
    """The nuclei, with their outermost ring less than certain."""
    return np.where(boundaries(geometry.labels), np.float32(SOFT_EDGE), geometry.inside.astype(np.float32))


def _contour(geometry: Geometry) -> BoolMap:
    """Pixels whose 3 x 3 neighbourhood holds two labels: one pixel on each side of every border."""
    return cv2.erode(geometry.as_float, _RING) != cv2.dilate(geometry.as_float, _RING)


def _meeting(geometry: Geometry, reach: int) -> BoolMap:
    """Pixels with two different nuclei within `reach` (px): only the borders where nuclei meet."""
    window = np.ones((2 * reach + 1,) * 2, np.uint8)
    highest = cv2.dilate(geometry.as_float, window)
    lowest = cv2.erode(np.where(geometry.inside, geometry.as_float, np.float32(2**24)), window)
    return (lowest != highest) & (highest > 0)


def _marker(geometry: Geometry) -> BoolMap:
    """The core of each nucleus: deeper than a share of its greatest depth, so that small ones keep theirs."""
    return geometry.inside & (geometry.depth >= MARKER_DEPTH * geometry.greatest_depth[geometry.labels])


def _distance(geometry: Geometry) -> FloatMap:
    """Depth over the greatest depth of the own nucleus: 1 in its middle, more than 0 on its edge, 0 outside."""
    return geometry.depth / geometry.greatest_depth[geometry.labels]


def _labels(geometry: Geometry) -> FloatMap:
    """The nuclei by number, 1..N, for losses that look at each on its own; exact, as N stays below 2**24."""
    return geometry.numbers.astype(np.float32)


#: What a head can learn; a row a function of the geometry.
TARGETS: dict[str, Callable[[Geometry], NDArray]] = {
    "semantic": _semantic,
    "soft_semantic": _soft_semantic,
    "contour": _contour,
    "adjacent_boundary": partial(_meeting, reach=ADJACENT_REACH),
    "touching": partial(_meeting, reach=TOUCHING_REACH),
    "marker": _marker,
    "distance": _distance,
    "labels": _labels,
}

#: Heads that learn the row of another name: their losses look at each nucleus on its own.
LEARNED_FROM = {"instance": "labels", "color": "labels"}


def _border_weight(geometry: Geometry) -> FloatMap:
    """1, more near borders, and more around centroids, so that a small nucleus counts beside a large one."""
    border = BORDER_WEIGHT * np.exp(-(geometry.border_distance**2) / (2 * BORDER_SIGMA**2))
    return 1 + border + CENTROID_WEIGHT * np.exp(-2 * geometry.relative_radius**2)


def _two_nearest(numbers: NDArray[np.int32]) -> tuple[FloatMap, FloatMap]:
    """Distances (px) to the nearest and to the second nearest nucleus; `FAR` where there is none.

    Notes
    -----
    One binary digit of their numbers splits the nuclei in two camps. The nearest nucleus is in the nearer camp, so the
    other camp is never nearer than the second nearest nucleus, and just as near where that digit tells the two apart.
    Any two numbers differ in some digit: the least distance, over digits, to the farther camp is that to the second
    nearest. This takes 2 log2(N) distance transforms in place of N, and nothing is approximated.
    """
    nearest = _distance_to(numbers > 0)
    second = np.full(numbers.shape, FAR, np.float32)
    last = max(int(numbers.max(initial=0)) - 1, 0)  # counted from 0, so that no camp is empty
    for digit in range(last.bit_length()):
        ones = ((numbers - 1) >> digit & 1).astype(bool)
        farther = np.maximum(_distance_to(ones & (numbers > 0)), _distance_to(~ones & (numbers > 0)))
        second = np.minimum(second, farther)
    return nearest, second


def _distance_weight(geometry: Geometry) -> FloatMap:
    """The weight of the U-Net: classes in balance, and more in the narrow background between two nuclei.

    ``w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))`` with w_c `Geometry.class_balance`, w0 `GAP_WEIGHT`, sigma `GAP_SIGMA`,
    d1 and d2 the distances to the nearest and the second nearest nucleus. The second term counts in the background
    alone, as in published code, so where two nuclei touch it weighs only the notch beside the shared border. It
    vanishes with fewer than two nuclei.

    References
    ----------
    Ronneberger et al. 2015, equation 2, doi:10.1007/978-3-319-24574-4_28
    """
    nearest, second = _two_nearest(geometry.numbers)
    gap = np.float32(GAP_WEIGHT) * np.exp(-((nearest + second) ** 2) / (2 * GAP_SIGMA**2))
    return geometry.class_balance + np.where(geometry.inside, 0, gap)


def _hollow(mask: BoolMap) -> NDArray[np.uint8]:
    """1 where the convex hull goes beyond the mask, less the slivers under 3 pixels wide that every drawn disk has."""
    hull = np.zeros(mask.shape, np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(np.argwhere(mask)[:, ::-1].astype(np.int32)), 1)
    # OpenCV by default takes what lies beyond the array for hull, and slivers along its edge would stay
    return cv2.morphologyEx(hull * ~mask, cv2.MORPH_OPEN, _RING, borderType=cv2.BORDER_CONSTANT, borderValue=0)


def _skeleton_and_hollows(numbers: NDArray[np.int32]) -> tuple[BoolMap, NDArray[np.uint8]]:
    """Skeletons of all nuclei and hollows; hollows as 0 and 1, grown by one pixel so that each meets its nucleus."""
    skeleton, hollows = np.zeros(numbers.shape, bool), np.zeros(numbers.shape, np.uint8)
    for number, box in enumerate(ndimage.find_objects(numbers), 1):
        mask = numbers[box] == number
        skeleton[box] |= skeletonize(mask)
        hollows[box] |= _hollow(mask)
    hollows = cv2.dilate(hollows, _RING)
    return skeleton | skeletonize(hollows > 0), hollows


def _shape_weight(geometry: Geometry) -> FloatMap:
    """The shape aware weight: classes in balance, and more along contours where a nucleus is narrow or hollow.

    A hollow is what the convex hull of a nucleus adds to it. Contour pixels are the outermost ones of nuclei and
    hollows. Each is worth ``1 - d / tau``: d its distance to the nearest skeleton of a nucleus or a hollow, tau the
    greatest d of the map. A Gaussian of `SHAPE_SIGMA` spreads this, scaled so that a long straight contour worth 1 adds
    `SHAPE_WEIGHT`; it comes on top of `Geometry.class_balance`. As tau is of the map, a lone disk adds next to nothing.

    References
    ----------
    Guerrero-Pena et al. 2018, Multiclass Weighted Loss for Instance Segmentation of Cluttered Cells,
    doi:10.1109/ICIP.2018.8451187

    Notes
    -----
    Written after the code of the authors, not the text of the paper, and departs from it: nuclei are known one by one,
    so touching ones are not one shape; the edge of the image is no contour; contours of nuclei see the skeletons of
    hollows too, and the other way round; two classes are balanced, with no third where cells touch; and one Gaussian,
    inwards and outwards, stands for their peeling of the nucleus in layers, each smoothed in turn.
    """
    skeleton, hollows = _skeleton_and_hollows(geometry.numbers)
    contour = boundaries(geometry.labels) | boundaries(hollows)
    distance = _distance_to(skeleton)
    tau = max(float(distance[contour].max(initial=0)), 1)  # 0 where all contour is skeleton, or there is none
    worth = np.where(contour, 1 - distance / np.float32(tau), np.float32(0))
    spread = cv2.GaussianBlur(worth, (0, 0), SHAPE_SIGMA, borderType=cv2.BORDER_REFLECT)
    return geometry.class_balance + np.float32(SHAPE_WEIGHT * SHAPE_SIGMA * np.sqrt(2 * np.pi)) * spread


#: Weight maps, (H, W) float32, positive.
WEIGHTS: dict[str, Callable[[Geometry], FloatMap]] = {
    "border": _border_weight,
    "distance": _distance_weight,
    "shape": _shape_weight,
}


def plan_targets(heads: tuple[str, ...], pre: Pre, contour: Contour) -> dict[str, str]:
    """Which row of `TARGETS` each head learns."""
    rows = {head: LEARNED_FROM.get(head, head) for head in heads}
    if "semantic" in rows and not pre.label_to_binary:
        rows["semantic"] = "soft_semantic"
    if "contour" in rows and (contour.touching_only or contour.adjacent_boundary_only):
        rows["contour"] = "touching" if contour.touching_only else "adjacent_boundary"
    return rows


def make_targets(
    labels: NDArray[np.int32], plan: Mapping[str, str], weight: str | None = None
) -> dict[str, NDArray[np.float32]]:
    """The training maps of a label map.

    Parameters
    ----------
    labels : (H, W) int32
        0 is background; ids need not be sequential.
    plan : mapping
        head -> row of `TARGETS`.
    weight : str, optional
        Row of `WEIGHTS`.

    Returns
    -------
    dict
        head -> (1, H, W) float32, in [0, 1] but for the row `labels`, whole numbers 0..N; and "weight" -> (1, H, W)
        float32, positive and finite, where asked for.
    """
    geometry = Geometry(labels)
    maps = {head: pick(TARGETS, row, "target")(geometry) for head, row in plan.items()}
    if weight is not None:
        maps["weight"] = pick(WEIGHTS, weight, "weight map")(geometry)
    return {name: np.ascontiguousarray(array, dtype=np.float32)[None] for name, array in maps.items()}
