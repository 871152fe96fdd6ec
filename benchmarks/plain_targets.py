"""The plain loops over nuclei that training targets and weight maps are held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image, skeletonize

from target import (
    ADJACENT_REACH,
    BALANCE_LIMIT,
    BORDER_SIGMA,
    BORDER_WEIGHT,
    CENTROID_WEIGHT,
    GAP_SIGMA,
    GAP_WEIGHT,
    MARKER_DEPTH,
    SHAPE_SIGMA,
    SHAPE_WEIGHT,
    SOFT_EDGE,
    TOUCHING_REACH,
)

CROSS = ndimage.generate_binary_structure(2, 1)
SQUARE = np.ones((3, 3), bool)


def each(labels):
    """(mask, own edge, depth) of each nucleus."""
    for i in np.unique(labels[labels > 0]):
        mask = labels == i
        edge = mask & ~ndimage.binary_erosion(mask, CROSS, border_value=1)
        yield mask, edge, np.where(mask, depth_of(mask & ~edge), 0)


def depth_of(core):
    """1 on the edge of a nucleus, growing inwards; endless where it has no edge because it fills the image."""
    return np.full(core.shape, np.inf) if core.all() else ndimage.distance_transform_edt(core) + 1


def loop_semantic(labels):
    found = np.zeros(labels.shape)
    for mask, _, _ in each(labels):
        found[mask] = 1
    return found


def loop_soft_semantic(labels):
    found = loop_semantic(labels)
    for _, edge, _ in each(labels):
        found[edge] = SOFT_EDGE
    return found


def loop_contour(labels):
    found = np.zeros(labels.shape, bool)
    for mask, _, _ in each(labels):
        found |= ndimage.binary_dilation(mask, SQUARE) & ~ndimage.binary_erosion(mask, SQUARE, border_value=1)
    return found


def loop_meeting(labels, reach):
    near = np.zeros(labels.shape, int)
    for mask, _, _ in each(labels):
        near += ndimage.binary_dilation(mask, SQUARE, iterations=reach)
    return near >= 2


def loop_marker(labels):
    found = np.zeros(labels.shape, bool)
    for mask, _, depth in each(labels):
        found |= mask & (depth >= MARKER_DEPTH * depth.max())
    return found


def loop_distance(labels):
    found = np.zeros(labels.shape)
    for mask, _, depth in each(labels):
        found[mask] = 1 if np.isinf(depth).any() else depth[mask] / depth.max()
    return found


def loop_labels(labels):
    found = np.zeros(labels.shape)
    for number, (mask, _, _) in enumerate(each(labels), 1):
        found[mask] = number
    return found


def loop_border(labels):
    inside = labels > 0
    if not inside.any():
        return np.ones(labels.shape)
    distance = ndimage.distance_transform_edt(~inside)
    found = np.ones(labels.shape)
    for mask, _, depth in each(labels):
        distance = np.where(mask, depth, distance)
        y, x = np.indices(labels.shape) - np.array(ndimage.center_of_mass(mask))[:, None, None]
        radius = np.sqrt(mask.sum() / np.pi)
        found += np.where(mask, CENTROID_WEIGHT * np.exp(-2 * (y**2 + x**2) / radius**2), 0)
    return found + BORDER_WEIGHT * np.exp(-(distance**2) / (2 * BORDER_SIGMA**2))


def loop_balance(labels):
    found = np.ones(labels.shape)
    classes = [labels == 0, labels > 0]
    if all(mask.any() for mask in classes):
        for mask in classes:
            found[mask] = min(labels.size / 2 / mask.sum(), BALANCE_LIMIT)
    return found


def euclidean(mask):
    return ndimage.distance_transform_edt(~mask)


def chamfer(mask):
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)


def loop_distance_weight(labels, distance_to=euclidean):
    found, distances = loop_balance(labels), [distance_to(mask) for mask, _, _ in each(labels)]
    if len(distances) < 2:
        return found
    nearest, second = np.sort(distances, axis=0)[:2]
    return found + (labels == 0) * GAP_WEIGHT * np.exp(-((nearest + second) ** 2) / (2 * GAP_SIGMA**2))


def loop_shape(labels):
    found, skeleton, contour, hollows = loop_balance(labels), *np.zeros((3, *labels.shape), bool)
    for mask, edge, _ in each(labels):
        skeleton |= skeletonize(mask)
        contour |= edge
        hollow = ndimage.binary_opening(convex_hull_image(mask) & ~mask, SQUARE)
        hollows |= ndimage.binary_dilation(hollow, SQUARE)
    contour |= hollows & ~ndimage.binary_erosion(hollows, CROSS, border_value=1)
    if not contour.any():
        return found
    distance = euclidean(skeleton | skeletonize(hollows))
    worth = contour * (1 - distance / max(distance[contour].max(), 1))
    across = SHAPE_SIGMA * np.sqrt(2 * np.pi)
    return found + SHAPE_WEIGHT * across * ndimage.gaussian_filter(worth, SHAPE_SIGMA, mode="reflect")


LOOPS: dict[str, Callable] = {
    "semantic": loop_semantic,
    "soft_semantic": loop_soft_semantic,
    "contour": loop_contour,
    "adjacent_boundary": partial(loop_meeting, reach=ADJACENT_REACH),
    "touching": partial(loop_meeting, reach=TOUCHING_REACH),
    "marker": loop_marker,
    "distance": loop_distance,
    "labels": loop_labels,
}
WEIGHT_LOOPS = {"border": loop_border, "distance": loop_distance_weight, "shape": loop_shape}
