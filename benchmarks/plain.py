"""The plain ways: what one would write first, an image, a mask or a pair at a time. Slow, and known to be right.

They are the oracles of the tests and the first column of the table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import measure, morphology, segmentation

from postprocess import WALKER_BETA

Labels = NDArray[np.int32]
Probs = Mapping[str, NDArray[np.float32]]


def read_labels(
    paths: Sequence[Path], shape: tuple[int, int], read: Callable[[Path], NDArray[np.uint8]] | None = None
) -> Labels:
    """The nuclei of an image from a mask each, by `read` or Pillow; a pixel goes to the smallest that claims it."""
    masks = [(read or read_gray)(path) > 127 for path in sorted(paths)]
    labels = np.zeros(shape, np.int32)
    for i in sorted(range(len(masks)), key=lambda i: (np.count_nonzero(masks[i]), i), reverse=True):
        labels[masks[i]] = i + 1
    return segmentation.relabel_sequential(labels)[0]


def read_gray(path: Path) -> NDArray[np.uint8]:
    """By Pillow."""
    with Image.open(path) as file:
        return np.asarray(file.convert("L"))


def encode_mask(mask: NDArray[np.bool_]) -> str:
    """Run lengths of one nucleus, pixel by pixel, down the columns."""
    words, previous = [], -2
    for place, value in enumerate(mask.flatten(order="F")):
        if value:
            if place != previous + 1:
                words += [place + 1, 0]
            words[-1] += 1
            previous = place
    return " ".join(str(word) for word in words)


def scan_masks(labels: Labels) -> list[str]:
    """Run lengths of every nucleus, each by a scan of the whole image for where its mask changes."""
    texts = []
    for number in range(1, int(labels.max(initial=0)) + 1):
        flat = np.concatenate([[0], (labels == number).astype(np.int8).ravel(order="F"), [0]])
        changes = np.flatnonzero(np.diff(flat))
        runs = zip(changes[::2] + 1, changes[1::2] - changes[::2], strict=True)
        texts.append(" ".join(f"{start} {length}" for start, length in runs))
    return texts


def masks_of(labels: Labels) -> dict[int, NDArray[np.bool_]]:
    """id -> mask."""
    return {number: labels == number for number in sorted(set(labels.ravel().tolist()) - {0})}


def iou_of(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return np.sum(mask & other) / np.sum(mask | other)


def average_precision(true: Labels, pred: Labels, thresholds: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """The competition's precisions by their definition, a pair of masks at a time."""
    true_masks, pred_masks = list(masks_of(true).values()), list(masks_of(pred).values())
    ious = np.array([[iou_of(a, b) for b in pred_masks] for a in true_masks]).reshape(len(true_masks), len(pred_masks))
    found = []
    for threshold in thresholds:
        hits = ious > threshold
        tp, missed, invented = (int(n) for n in (hits.any(1).sum(), (~hits.any(1)).sum(), (~hits.any(0)).sum()))
        total = tp + missed + invented
        found.append(tp / total if total else 1.0)
    return found


def walk(semantic: NDArray[np.float32], mask: NDArray[np.bool_], markers: Labels, mode: str = "bf") -> Labels:
    """The random walker of scikit-image on the whole image; every blob has a marker.

    A blob of one pixel is kept from it: it leaves such a pixel out of its graph but not out of the answer, all of which
    is then shifted (as of scikit-image 0.26). So is one marker alone, which has all: its direct solver gives such an
    answer the wrong shape.
    """
    blobs = measure.label(mask, connectivity=1)
    alone = mask & (np.bincount(blobs.ravel()) == 1)[blobs]
    seeds = np.where(mask & ~alone, markers, -1)
    numbers = np.append(0, np.unique(seeds[seeds > 0]))  # it numbers its answer without gaps
    if len(numbers) <= 2:
        return np.where(alone, markers, np.where(mask, numbers[-1], 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of iterative modes: that they stop at a tolerance
        found = segmentation.random_walker(semantic.astype(np.float64), seeds, beta=WALKER_BETA, mode=mode)
    return np.where(alone, markers, numbers[np.maximum(found, 0)])


def flood(elevation: NDArray[np.float32], markers: Labels, mask: NDArray[np.bool_]) -> Labels:
    """The watershed of scikit-image on the whole image."""
    return segmentation.watershed(elevation, markers, mask=mask)


def clean(labels: Labels, min_size: int) -> Labels:
    """Without holes inside nuclei and nuclei of fewer than `min_size` pixels, numbered 1..N."""
    filled = labels.copy()
    for region in measure.regionprops(labels):
        box = region.slice
        holes = ndimage.binary_fill_holes(region.image) & (labels[box] == 0)
        filled[box][holes] = region.label
    kept = morphology.remove_small_objects(filled, max_size=min_size - 1) if min_size > 1 else filled
    return segmentation.relabel_sequential(kept)[0].astype(np.int32)


def separate(probs: Probs, thresholds: Mapping[str, float], min_size: int, policy: str) -> Labels:
    """Maps with a marker head -> nuclei, each step by scikit-image on the whole image."""
    mask = probs["semantic"] > thresholds["semantic"]
    markers = measure.label(mask & (probs["marker"] > thresholds["marker"]), connectivity=1)
    blobs = measure.label(mask, connectivity=1)
    lonely = np.setdiff1d(np.unique(blobs), np.append(blobs[markers > 0], 0))
    markers = measure.label(np.where(np.isin(blobs, lonely), -1, markers), background=0, connectivity=1)
    if policy == "rw":
        labels = walk(probs["semantic"], mask, markers) if markers.max(initial=0) else markers
    else:
        labels = flood(probs["contour"] - probs["semantic"], markers, mask)
    return clean(labels, min_size)
