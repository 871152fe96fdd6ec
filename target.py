"""Label map -> the maps a network is trained on, and the weight of each pixel. Vectorised over nuclei."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from config import Contour, Pre, pick
from labels import boundaries, depth

#: Share of its greatest depth from which a pixel belongs to the core of its nucleus.
MARKER_DEPTH = 0.4
#: What the outermost ring of a nucleus is worth when labels are soft.
SOFT_EDGE = 0.7
#: Two nuclei are adjacent where both come within this many pixels.
ADJACENT_REACH = 2
#: Height and width (px) of the weight along borders, and height of the weight around centroids.
BORDER_WEIGHT, BORDER_SIGMA, CENTROID_WEIGHT = 4.0, 3.0, 1.0
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
    def depth(self) -> FloatMap:
        """See `labels.depth`."""
        return depth(self.labels)

    @cached_property
    def greatest_depth(self) -> FloatMap:
        """Of each label, the greatest depth, (largest id + 1,) float32."""
        greatest = np.zeros(int(self.labels.max(initial=0)) + 1, np.float32)
        np.maximum.at(greatest, self.labels.ravel(), self.depth.ravel())
        return greatest

    @cached_property
    def border_distance(self) -> FloatMap:
        """Distance (px) to the nearest border of a nucleus, from inside and outside; large where there is none."""
        if not self.inside.any():
            return np.full(self.labels.shape, FAR, np.float32)
        outside = cv2.distanceTransform((~self.inside).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
        return np.where(self.inside, self.depth, outside)

    @cached_property
    def relative_radius(self) -> FloatMap:
        """Distance to the own centroid over the radius of a disk of the same area; infinite in the background."""
        ids = self.labels.ravel()
        y, x = np.indices(self.labels.shape, np.float32)
        area = np.maximum(np.bincount(ids), 1)
        center_y = np.bincount(ids, y.ravel()) / area
        center_x = np.bincount(ids, x.ravel()) / area
        scale = np.sqrt(np.pi / area)
        away = np.hypot(y - center_y[self.labels], x - center_x[self.labels]) * scale[self.labels]
        return np.where(self.inside, away, np.inf).astype(np.float32)


def _semantic(geometry: Geometry) -> BoolMap:
    return geometry.inside


def _soft_semantic(geometry: Geometry) -> FloatMap:
    """The nuclei, with their outermost ring less than certain."""
    return np.where(boundaries(geometry.labels), np.float32(SOFT_EDGE), geometry.inside.astype(np.float32))


def _contour(geometry: Geometry) -> BoolMap:
    """Pixels whose 3 x 3 neighbourhood holds two labels: one pixel on each side of every border."""
    return cv2.erode(geometry.as_float, _RING) != cv2.dilate(geometry.as_float, _RING)


def _adjacent_boundary(geometry: Geometry) -> BoolMap:
    """Pixels with two different nuclei within `ADJACENT_REACH`: only the borders where nuclei meet."""
    window = np.ones((2 * ADJACENT_REACH + 1,) * 2, np.uint8)
    highest = cv2.dilate(geometry.as_float, window)
    lowest = cv2.erode(np.where(geometry.inside, geometry.as_float, np.float32(2**24)), window)
    return (lowest != highest) & (highest > 0)


def _marker(geometry: Geometry) -> BoolMap:
    """The core of each nucleus: deeper than a share of its greatest depth, so that small ones keep theirs."""
    return geometry.inside & (geometry.depth >= MARKER_DEPTH * geometry.greatest_depth[geometry.labels])


#: What a head can learn; a row a function of the geometry.
TARGETS: dict[str, Callable[[Geometry], NDArray]] = {
    "semantic": _semantic,
    "soft_semantic": _soft_semantic,
    "contour": _contour,
    "adjacent_boundary": _adjacent_boundary,
    "marker": _marker,
}


def _border_weight(geometry: Geometry) -> FloatMap:
    """1, more near borders, and more around centroids, so that a small nucleus counts beside a large one."""
    border = BORDER_WEIGHT * np.exp(-(geometry.border_distance**2) / (2 * BORDER_SIGMA**2))
    return 1 + border + CENTROID_WEIGHT * np.exp(-2 * geometry.relative_radius**2)


#: Weight maps, (H, W) float32, positive.
WEIGHTS: dict[str, Callable[[Geometry], FloatMap]] = {"border": _border_weight}


def plan_targets(heads: tuple[str, ...], pre: Pre, contour: Contour) -> dict[str, str]:
    """Which row of `TARGETS` each head learns."""
    rows = {head: head for head in heads}
    if "semantic" in rows and not pre.label_to_binary:
        rows["semantic"] = "soft_semantic"
    if "contour" in rows and contour.adjacent_boundary_only:
        rows["contour"] = "adjacent_boundary"
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
        head -> (1, H, W) float32 in [0, 1], and "weight" -> (1, H, W) float32 where asked for.
    """
    geometry = Geometry(labels)
    maps = {head: pick(TARGETS, row, "target")(geometry) for head, row in plan.items()}
    if weight is not None:
        maps["weight"] = pick(WEIGHTS, weight, "weight map")(geometry)
    return {name: np.ascontiguousarray(array, dtype=np.float32)[None] for name, array in maps.items()}
