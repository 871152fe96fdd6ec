from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

import metric
from benchmarks import plain
from benchmarks.plain import iou_of, masks_of


def squares(n_nuclei: int, size: int, seed: int, shift: int = 0) -> np.ndarray:
    """Random rectangles, later over earlier ones, with gaps between the ids; `shift` moves the corners."""
    rng, moves = np.random.default_rng(seed), np.random.default_rng(seed + shift)
    labels = np.zeros((size, size + 5), np.int32)
    for number in range(1, n_nuclei + 1):
        y, x, height, width = *rng.integers(0, size, 2), *rng.integers(3, 12, 2)
        if shift:
            y, x = np.maximum(np.array([y, x]) + moves.integers(-2, 3, 2), 0)
        labels[y : y + height, x : x + width] = 3 * number
    return labels


EMPTY = np.zeros((40, 45), np.int32)
PAIRS = {
    "none": (EMPTY, EMPTY),
    "only true": (squares(5, 40, 0), EMPTY),
    "only predicted": (EMPTY, squares(5, 40, 0)),
    "perfect": (squares(20, 40, 1), squares(20, 40, 1)),
    "near": (squares(20, 40, 2), squares(20, 40, 2, shift=1)),
    "crowded": (squares(60, 40, 3), squares(60, 40, 3, shift=2)),
    "unrelated": (squares(12, 40, 4), squares(15, 40, 5)),
}
every_pair = pytest.mark.parametrize(("true", "pred"), PAIRS.values(), ids=PAIRS.keys())


# By hand: in rows of pixels, true nucleus 2 has 10 px and nucleus 5 has 4; prediction 1 covers 6 of the ten,
# prediction 4 the four and two more, prediction 9 nothing true.
TRUE = np.array([[2] * 10 + [0] * 4, [5] * 4 + [0] * 10])
PRED = np.array([[1] * 6 + [0] * 6 + [9, 9], [4] * 6 + [0] * 8])


def test_iou_matrix_by_hand() -> None:
    iou = metric.iou_matrix(TRUE, PRED)
    assert iou.dtype == np.float64
    assert iou.tolist() == [[6 / 10, 0, 0], [0, 4 / 6, 0]]


@every_pair
def test_iou_matrix_equals_plain_loop(true: np.ndarray, pred: np.ndarray) -> None:
    expected = [[iou_of(a, b) for b in masks_of(pred).values()] for a in masks_of(true).values()]
    iou = metric.iou_matrix(true, pred)
    assert iou.shape == (len(masks_of(true)), len(masks_of(pred)))
    assert np.array_equal(iou, np.reshape(expected, iou.shape))


def test_match_by_hand() -> None:
    found = metric.match(TRUE, PRED)
    assert (found.tp, found.fp, found.fn) == (2, 1, 0)
    assert found.pairs.tolist() == [[2, 1], [5, 4]]
    assert found.ious.tolist() == [6 / 10, 4 / 6]
    assert found.mean_iou == pytest.approx((6 / 10 + 4 / 6) / 2)
    assert metric.match(TRUE, PRED, threshold=0.6).pairs.tolist() == [[5, 4]]  # strictly above


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.75, 1.0])
@every_pair
def test_match_is_one_to_one_and_adds_up(true: np.ndarray, pred: np.ndarray, threshold: float) -> None:
    found = metric.match(true, pred, threshold)
    true_masks, pred_masks = masks_of(true), masks_of(pred)
    assert found.pairs.shape == (found.tp, 2)
    assert found.tp + found.fn == len(true_masks)
    assert found.tp + found.fp == len(pred_masks)
    assert all(len(set(column)) == found.tp for column in found.pairs.T.tolist())
    for (a, b), iou in zip(found.pairs.tolist(), found.ious, strict=True):
        assert iou == iou_of(true_masks[a], pred_masks[b]) > threshold
    assert found.mean_iou == (pytest.approx(np.mean(found.ious)) if found.tp else 0.0)


def test_match_below_half_takes_most_pairs_then_greatest_iou() -> None:
    # prediction 1 is the better partner of both; giving it to nucleus 2 leaves prediction 2 to nucleus 1
    true = np.array([[1] * 9 + [2] * 5])
    pred = np.array([[2] * 4 + [1] * 10])
    assert metric.match(true, pred, threshold=0.3).pairs.tolist() == [[1, 2], [2, 1]]
    assert metric.match(true, pred, threshold=0.45).tp == 1


@pytest.mark.parametrize("seed", range(8))
def test_match_below_half_equals_trying_every_assignment(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, pred = rng.integers(0, 5, (6, 6)), rng.integers(0, 7, (6, 6))
    iou, threshold = metric.iou_matrix(true, pred), 0.1
    best = (0, 0.0)
    for columns in permutations(range(iou.shape[1]), iou.shape[0]):
        kept = [iou[row, column] for row, column in enumerate(columns) if iou[row, column] > threshold]
        best = max(best, (len(kept), sum(kept)))
    found = metric.match(true, pred, threshold)
    assert (found.tp, found.ious.sum()) == (best[0], pytest.approx(best[1]))


def test_thresholds_have_no_float_drift() -> None:
    assert metric.THRESHOLDS.tolist() == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    with pytest.raises(ValueError, match="read-only"):
        metric.THRESHOLDS[0] = 0


def test_average_precision_by_hand() -> None:
    # IoU 0.6 and 0.667, three predictions, two true nuclei: TP / (5 - TP), strictly above each threshold
    assert metric.average_precision(TRUE, PRED).tolist() == [2 / 3, 2 / 3, 1 / 4, 1 / 4, 0, 0, 0, 0, 0, 0]


@every_pair
def test_average_precision_equals_plain_loop(true: np.ndarray, pred: np.ndarray) -> None:
    scores = metric.average_precision(true, pred)
    assert scores.dtype == np.float64
    assert scores.tolist() == plain.average_precision(true, pred, metric.THRESHOLDS)


def test_average_precision_takes_other_thresholds() -> None:
    assert metric.average_precision(TRUE, PRED, [0.0, 0.7]).tolist() == [2 / 3, 0.0]
    assert metric.average_precision(TRUE, PRED, []).shape == (0,)


def test_panoptic_quality_by_hand() -> None:
    assert metric.panoptic_quality(TRUE, PRED) == pytest.approx((6 / 10 + 4 / 6) / 2.5)


@every_pair
def test_panoptic_quality_is_segmentation_times_recognition(true: np.ndarray, pred: np.ndarray) -> None:
    ious = [iou_of(a, b) for a in masks_of(true).values() for b in masks_of(pred).values()]
    ious = [iou for iou in ious if iou > 0.5]
    n_all = len(masks_of(true)) + len(masks_of(pred))
    f1 = 2 * len(ious) / n_all if n_all else 1.0
    expected = (np.mean(ious) if ious else float(n_all == 0)) * f1
    assert metric.panoptic_quality(true, pred) == pytest.approx(expected)


def test_aggregated_jaccard_by_hand() -> None:
    assert metric.aggregated_jaccard(TRUE, PRED) == pytest.approx((6 + 4) / (10 + 6 + 2))
    # one prediction over two nuclei counts for both: (4 + 4) / (8 + 8)
    assert metric.aggregated_jaccard(np.array([[1] * 4 + [2] * 4]), np.ones((1, 8), int)) == 0.5


@every_pair
def test_aggregated_jaccard_equals_plain_loop(true: np.ndarray, pred: np.ndarray) -> None:
    inter, union, used = 0, 0, set()
    pred_masks = masks_of(pred)
    for mask in masks_of(true).values():
        best, best_iou = None, 0.0
        for number, other in pred_masks.items():
            if iou_of(mask, other) > best_iou:
                best, best_iou = number, iou_of(mask, other)
        if best is None:
            union += mask.sum()
        else:
            inter += np.sum(mask & pred_masks[best])
            union += np.sum(mask | pred_masks[best])
            used.add(best)
    union += sum(mask.sum() for number, mask in pred_masks.items() if number not in used)
    assert metric.aggregated_jaccard(true, pred) == pytest.approx(inter / union if union else 1.0)


def test_pixel_iou_takes_masks_and_labels() -> None:
    assert metric.pixel_iou(TRUE, PRED) == 10 / 18
    assert metric.pixel_iou(TRUE > 0, PRED > 0) == 10 / 18
    assert metric.pixel_iou(EMPTY, EMPTY) == 1.0
    assert metric.pixel_iou(EMPTY, EMPTY + 1) == 0.0


SCORES = {
    "average_precision": lambda true, pred: metric.average_precision(true, pred).mean(),
    "panoptic_quality": metric.panoptic_quality,
    "aggregated_jaccard": metric.aggregated_jaccard,
    "pixel_iou": metric.pixel_iou,
}
every_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())


@every_score
def test_scores_at_their_ends(score) -> None:
    one_pixel = EMPTY.copy()
    one_pixel[3, 4] = 77
    many = np.arange(EMPTY.size, dtype=np.int32).reshape(EMPTY.shape)  # 1,799 nuclei of one pixel
    for labels in (EMPTY, one_pixel, many, squares(20, 40, 1)):
        assert score(labels, labels) == 1.0
    assert score(EMPTY, one_pixel) == score(one_pixel, EMPTY) == 0.0


@every_score
def test_scores_do_not_depend_on_the_ids(score) -> None:
    true, pred = PAIRS["crowded"]
    renumber = np.random.default_rng(0).permutation(np.arange(1, 1000))
    mixed = np.where(pred > 0, renumber[pred], 0)
    assert score(true, pred) == pytest.approx(score(true, mixed))
    assert isinstance(float(score(true, pred)), float)


@pytest.mark.parametrize("function", [metric.match, metric.iou_matrix, *SCORES.values()])
def test_shapes_that_differ_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"\(40, 45\).*\(45, 40\)"):
        function(EMPTY, EMPTY.T)


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_threshold_is_an_iou(threshold: float) -> None:
    with pytest.raises(ValueError, match=str(threshold)):
        metric.match(TRUE, PRED, threshold)


def test_every_error_has_a_name():
    true, pred = np.zeros((60, 80), np.int32), np.zeros((60, 80), np.int32)
    true[2:12, 2:12], pred[2:12, 3:13] = 3, 1  # found
    true[2:12, 20:30], true[2:12, 30:40], pred[2:12, 20:40] = 5, 6, 2  # merged
    true[20:40, 2:22], pred[20:29, 2:22], pred[31:40, 2:22] = 8, 3, 4  # split
    true[20:30, 30:40], pred[20:24, 30:40] = 9, 5  # tight
    true[20:26, 50:56], pred[18:30, 48:60] = 11, 6  # wide
    true[45:55, 30:40], pred[45:47, 30:40] = 12, 7  # missed: a fifth is covered
    pred[45:55, 60:70] = 8  # invented
    found = metric.diagnose(true, pred)
    assert found.verdicts.tolist() == ["found", "merged", "merged", "split", "tight", "wide", "missed"]
    assert found.areas.tolist() == [100, 100, 100, 400, 100, 36, 100]
    assert found.invented.tolist() == [100]
    assert found.ratios[0] == 1 and np.isnan(found.ratios[1:]).all()
    assert found.ious == pytest.approx([90 / 110, 0.5, 0.5, 180 / 400, 0.4, 0.25, 0.2])


@pytest.mark.parametrize("swap", [False, True])
def test_nothing_to_diagnose(swap):
    one, none = np.ones((4, 4), np.int32), np.zeros((4, 4), np.int32)
    found = metric.diagnose(none, one) if swap else metric.diagnose(one, none)
    assert found.verdicts.tolist() == ([] if swap else ["missed"])
    assert found.invented.tolist() == ([16] if swap else [])
    assert not any(map(len, metric.diagnose(none, none)))
