"""Label maps -> scores: how well predicted nuclei agree with true ones.

Every function takes the true map first. Maps are (H, W) integers of one shape, 0 for background; ids need not
be sequential. Every score lies in [0, 1]; two maps without a nucleus agree (1), a map with and one without do
not (0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from labels import Labels, overlap_table, relabel

THRESHOLDS: NDArray[np.float64] = np.arange(50, 100, 5) / 100
"""0.50, 0.55 ... 0.95, each the float nearest to its decimal, so that an IoU of 3/5 is not above 0.6."""
THRESHOLDS.setflags(write=False)


class Match(NamedTuple):
    """Which predicted nucleus is which true one, and what is left over."""

    tp: int
    """Pairs."""
    fp: int
    """Predicted nuclei without a true one."""
    fn: int
    """True nuclei without a predicted one."""
    mean_iou: float
    """Mean IoU of the pairs; 0 where there is none."""
    pairs: NDArray[np.int64]
    """(tp, 2): true id and predicted id, as in the maps given, in order of the true id."""
    ious: NDArray[np.float64]
    """(tp,): IoU of each pair."""


def match(true: Labels, pred: Labels, threshold: float = 0.5) -> Match:
    """Pair each true nucleus with at most one predicted nucleus, and the other way round.

    Parameters
    ----------
    true, pred
        (H, W) integers >= 0, of one shape.
    threshold
        In [0, 1]: IoU a pair has to exceed, strictly. From 0.5 on at most one partner can; below, the pairing
        with most pairs is taken, and among those the one of greatest total IoU.

    Returns
    -------
    Match

    Raises
    ------
    ValueError
        The shapes differ, a map is no label map, or `threshold` is outside [0, 1].
    """
    iou = iou_matrix(true, pred)
    rows, columns = _pair(iou, threshold)
    ious, tp = iou[rows, columns], len(rows)
    pairs = np.stack([_ids(true)[rows], _ids(pred)[columns]], axis=1)
    return Match(tp, iou.shape[1] - tp, iou.shape[0] - tp, float(ious.sum() / max(tp, 1)), pairs, ious)


def iou_matrix(true: Labels, pred: Labels) -> NDArray[np.float64]:
    """Intersection over union of every true with every predicted nucleus.

    Parameters
    ----------
    true, pred
        (H, W) integers >= 0, of one shape.

    Returns
    -------
    (n_true, n_pred) float64 in [0, 1], in order of increasing ids; a side without nuclei has length 0.

    Raises
    ------
    ValueError
        The shapes differ, or a map is no label map.
    """
    inter, union = _inter_union(overlap_table(relabel(true), relabel(pred)))
    return inter / union


def average_precision(
    true: Labels, pred: Labels, thresholds: Sequence[float] | NDArray[np.float64] = THRESHOLDS
) -> NDArray[np.float64]:
    """Precision TP / (TP + FP + FN) at each IoU threshold, as the 2018 Data Science Bowl scored an image.

    The mean over `THRESHOLDS` is the competition's score of the image, the mean of that over images its final
    score.

    Parameters
    ----------
    true, pred
        (H, W) integers >= 0, of one shape.
    thresholds
        IoU values in [0, 1] that a hit has to exceed, strictly; nuclei are paired one to one as in `match`.

    Returns
    -------
    (len(thresholds),) float64 in [0, 1]. All 1 where neither map has a nucleus, all 0 where only one has.

    Raises
    ------
    ValueError
        The shapes differ, a map is no label map, or a threshold is outside [0, 1].

    References
    ----------
    J. C. Caicedo et al., Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl, 2019,
    doi:10.1038/s41592-019-0612-7
    """
    iou = iou_matrix(true, pred)
    hits = np.array([len(_pair(iou, threshold)[0]) for threshold in thresholds], np.float64)
    if not any(iou.shape):
        return np.ones_like(hits)
    return hits / (sum(iou.shape) - hits)


#: What can become of a true nucleus; the first is good.
VERDICTS = ("found", "merged", "split", "tight", "wide", "missed")


class Diagnosis(NamedTuple):
    """What became of the nuclei of an image."""

    verdicts: NDArray[np.str_]
    """(n_true,): one of `VERDICTS` of each true nucleus, by increasing id."""
    areas: NDArray[np.int64]
    """(n_true,): its area, in pixels."""
    ratios: NDArray[np.float64]
    """(n_true,): predicted over true area of a found nucleus, NaN of others."""
    ious: NDArray[np.float64]
    """(n_true,): its greatest IoU with a predicted one."""
    invented: NDArray[np.int64]
    """(n_invented,): areas of the predicted nuclei that lie for less than a quarter on any true one."""


def diagnose(true: Labels, pred: Labels) -> Diagnosis:
    """Say of each true nucleus whether it was found (IoU above 0.5), and if not, what went wrong.

    ``merged``: more than half of it lies in one prediction together with more than half of another. ``split``: at least
    two predictions lie mainly in it. ``missed``: predictions cover less than a quarter. Else what overlaps it most is
    too small (``tight``) or too large (``wide``).

    Parameters
    ----------
    true, pred
        (H, W) integers >= 0, of one shape.

    Raises
    ------
    ValueError
        As `iou_matrix`.
    """
    table = overlap_table(relabel(true), relabel(pred))
    inter, union = _inter_union(table)
    areas, sizes = table[1:].sum(axis=1), table[:, 1:].sum(axis=0)
    inside = inter > 0.5 * areas[:, None]  # (true, pred): the true one lies mainly in the predicted one
    pieces = inter > 0.5 * sizes
    ious = (inter / union).max(axis=1, initial=0)
    found = ious > 0.5
    best = inter.argmax(axis=1) if inter.shape[1] else np.zeros(len(areas), int)
    size = sizes[best] if len(sizes) else np.zeros(len(areas), int)
    verdicts = np.select(
        [
            found,
            (inside & (inside.sum(axis=0) > 1)).any(axis=1),
            pieces.sum(axis=1) > 1,
            inter.sum(axis=1) < 0.25 * areas,
            size < areas,
        ],
        ["found", "merged", "split", "missed", "tight"],
        "wide",
    )
    ratios = np.where(found, size / np.maximum(areas, 1), np.nan)
    invented = sizes[inter.max(axis=0, initial=0) < 0.25 * sizes]
    return Diagnosis(verdicts, areas, ratios, ious, invented)


def panoptic_quality(true: Labels, pred: Labels, threshold: float = 0.5) -> float:
    """Sum of the pairs' IoU over TP + FP / 2 + FN / 2: how well nuclei are drawn times how well they are
    found.

    Parameters
    ----------
    true, pred
        (H, W) integers >= 0, of one shape.
    threshold
        IoU a pair has to exceed, strictly; the paper's is 0.5.

    Returns
    -------
    In [0, 1]; 1 where neither map has a nucleus, 0 where only one has. The two factors are
    ``match(...).mean_iou`` (segmentation quality) and the F1 score (recognition quality).

    Raises
    ------
    ValueError
        As for `match`.

    References
    ----------
    A. Kirillov et al., Panoptic segmentation, 2019, doi:10.1109/CVPR.2019.00963
    """
    found = match(true, pred, threshold)
    weight = found.tp + (found.fp + found.fn) / 2
    return float(found.ious.sum() / weight) if weight else 1.0


def aggregated_jaccard(true: Labels, pred: Labels) -> float:
    """Pixels that each true nucleus shares with its best prediction, over their unions and all left over.

    Parameters
    ----------
    true, pred
        (H, W) integers >= 0, of one shape.

    Returns
    -------
    In [0, 1]; 1 where neither map has a nucleus, 0 where only one has.

    Raises
    ------
    ValueError
        The shapes differ, or a map is no label map.

    Notes
    -----
    As in the paper, one prediction may be the best of several true nuclei and then counts for each of them.
    Of predictions of equal IoU the lower id is taken. A true nucleus that meets no prediction adds its area
    to the denominator, and so does a prediction that is the best of none.

    References
    ----------
    N. Kumar et al., A dataset and a technique for generalized nuclear segmentation for computational
    pathology, 2017, doi:10.1109/TMI.2017.2677499
    """
    table = overlap_table(relabel(true), relabel(pred))
    inter, union = _inter_union(table)
    if 0 in inter.shape:
        return float(inter.shape == (0, 0))
    best = (inter / union).argmax(axis=1)
    hit = np.flatnonzero(inter.any(axis=1))
    best = best[hit]
    missed, unused = np.delete(table.sum(axis=1)[1:], hit), np.delete(table.sum(axis=0)[1:], best)
    return float(inter[hit, best].sum() / (union[hit, best].sum() + missed.sum() + unused.sum()))


def pixel_iou(true_mask: NDArray[Any], pred_mask: NDArray[Any]) -> float:
    """Intersection over union of two masks, regardless of instances.

    Parameters
    ----------
    true_mask, pred_mask
        Arrays of one shape, boolean or label maps: whatever is not 0 is foreground.

    Returns
    -------
    In [0, 1]; 1 where both are empty, 0 where only one is.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    true_mask, pred_mask = np.asarray(true_mask) != 0, np.asarray(pred_mask) != 0
    if true_mask.shape != pred_mask.shape:
        shapes = f"true mask: shape {true_mask.shape}, predicted: {pred_mask.shape}"
        raise ValueError(f"{shapes}; are they of one image?")
    union = np.count_nonzero(true_mask | pred_mask)
    return np.count_nonzero(true_mask & pred_mask) / union if union else 1.0


def _ids(labels: Labels) -> NDArray[np.int64]:
    """Return the ids of the nuclei, increasing."""
    ids = np.unique(labels).astype(np.int64)
    return ids[ids > 0]


def _inter_union(table: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return intersections and unions, each (n_true, n_pred), from an overlap table with its backgrounds."""
    union = table.sum(axis=1, keepdims=True) + table.sum(axis=0, keepdims=True) - table
    return table[1:, 1:], union[1:, 1:]


def _pair(iou: NDArray[np.float64], threshold: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of one-to-one pairs of IoU above `threshold`, by increasing row."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: {threshold}, wanted an IoU in [0, 1]")
    above = iou > threshold
    if threshold < 0.5:  # several partners may pass: as many pairs as can be, then the greatest total IoU
        gain = above * (1 + iou / (min(iou.shape) + 1))
        rows, columns = linear_sum_assignment(gain, maximize=True)
        kept = above[rows, columns]
        return rows[kept], columns[kept]
    rows, columns = np.nonzero(above)
    return rows, columns
