"""Rows: label maps -> scores and run lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from annotation import encode_rle
from benchmarks import agree, plain
from benchmarks.inputs import Inputs, Labels
from benchmarks.row import Floor, Job, Row, optional
from labels import relabel
from metric import THRESHOLDS, average_precision


def precision(inputs: Inputs) -> Row:
    true = inputs.crowded
    pred = _disturb(true)

    def stardist(matching: Any) -> Job:
        # It counts an IoU of just the threshold, the competition does not; it compares in single precision.
        above = tuple(np.nextafter(np.float32(THRESHOLDS), np.float32(1)).tolist())

        def run() -> list[float]:
            found = matching.matching(true, pred, thresh=above)
            return [each.tp / (each.tp + each.fp + each.fn) for each in found]

        return run

    return Row(
        f"mean average precision of an image of {_size(true)} with {true.max()} nuclei, {pred.max()} predicted",
        plain=lambda: plain.average_precision(true, pred, THRESHOLDS),
        ours=lambda: average_precision(true, pred).tolist(),
        agree=lambda a, b: float(np.allclose(a, b, atol=1e-12)),
        wanted=50.0,
        libraries={"stardist": optional("stardist.matching", stardist)},
        floor=Floor(n_bytes=true.nbytes + pred.nbytes),
    )


def runlength(inputs: Inputs) -> Row:
    labels = relabel(inputs.crowded)

    def coco(mask: Any) -> Job:
        masks = np.zeros((*labels.shape, int(labels.max())), np.uint8, order="F")
        for number in range(masks.shape[-1]):
            masks[..., number] = labels == number + 1
        return lambda: mask.encode(masks)

    def same(theirs: Any, ours: list[str]) -> float:
        if theirs and isinstance(theirs[0], dict):  # the library's own form: the masks are compared
            from pycocotools import mask

            theirs = plain.scan_masks(np.asarray(sum(i * mask.decode(r).astype(int) for i, r in enumerate(theirs, 1))))
        return agree.equal(theirs, ours)

    return Row(
        f"run lengths of an image of {_size(labels)} with {labels.max()} nuclei",
        plain=lambda: plain.scan_masks(labels),
        ours=lambda: encode_rle(labels),
        agree=same,
        wanted=20.0,
        libraries={"pycocotools": optional("pycocotools.mask", coco)},
        wanted_library=0.5,
        floor=Floor(n_bytes=labels.nbytes),
        note="pycocotools is given the masks, which it wants one by one; plain is a vectorised scan of each mask",
    )


def _disturb(labels: Labels) -> Labels:
    """What a fair network might say: moved by a pixel, some nuclei lost, some eroded on one side."""
    moved = np.roll(labels, (1, 1), (0, 1))
    kept = np.random.default_rng(0).random(int(labels.max()) + 1) < 0.9
    thinner = np.where(np.roll(moved, 2, 0) == moved, moved, 0)
    return relabel(np.where(kept[moved], np.where(moved % 3 == 0, thinner, moved), 0))


def _size(labels: Labels) -> str:
    return f"{labels.shape[0]} x {labels.shape[1]} px"
