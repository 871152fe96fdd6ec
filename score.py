"""Scores of a set of images: each by itself, by category, and over all."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from files import replacing
from labels import disk_diameter
from metric import THRESHOLDS, VERDICTS, Diagnosis, average_precision, diagnose, pixel_iou
from record import Record

#: Diameters (px, of a disk of a nucleus' area) between which errors are counted.
DIAMETERS = (10, 16, 25, 40, 63, 100)


@dataclass(frozen=True)
class Score:
    """How one image was segmented.

    Attributes
    ----------
    id, category : str
    precision : (10,) float64
        Precision at each IoU threshold of `metric.THRESHOLDS`; the mean is the competition's score.
    iou : float
        Pixel IoU of the foreground, regardless of instances.
    n_true, n_pred : int
        Nuclei there, and nuclei found.
    diagnosis : Diagnosis
        What became of each nucleus.
    """

    id: str
    category: str
    precision: NDArray[np.float64]
    iou: float
    n_true: int
    n_pred: int
    diagnosis: Diagnosis

    @property
    def mean_precision(self) -> float:
        return float(self.precision.mean())


def score_image(record: Record, truth: NDArray[np.int32], labels: NDArray[np.int32]) -> Score:
    """Compare the labels of an image with the truth, both (H, W) int32."""
    return Score(
        record.id,
        record.sub_category,
        average_precision(truth, labels),
        pixel_iou(truth > 0, labels > 0),
        int(truth.max(initial=0)),
        int(labels.max(initial=0)),
        diagnose(truth, labels),
    )


def summarize(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Means over the images of each category, in order of name, and last over all ("all").

    Returns
    -------
    dict
        category -> {"images", "score", "iou", "ap50", "ap75", "true", "found"}.
    """
    return {name: _means(members) for name, members in _by_category(scores).items() if members}


def format_summary(summary: dict[str, dict[str, float]]) -> str:
    """The summary as a table to print."""
    lines = [f"{'category':<20}{'images':>7}{'mAP':>8}{'AP50':>8}{'AP75':>8}{'IoU':>8}{'nuclei':>8}{'found':>8}"]
    for name, row in summary.items():
        values = "".join(f"{row[key]:>8.4f}" for key in ("score", "ap50", "ap75", "iou"))
        lines.append(f"{name:<20}{row['images']:>7.0f}{values}{row['true']:>8.0f}{row['found']:>8.0f}")
    return "\n".join(lines)


def format_errors(scores: Sequence[Score]) -> str:
    """What became of the nuclei, by category and by diameter, as two tables to print: see `metric.diagnose`.

    Invented nuclei count by their own diameter. The last columns tell how large those that were found are drawn, the
    median of predicted over true area, and the recall at an IoU of 0.7.
    """
    by_category = {name: _pool(members) for name, members in _by_category(scores).items()}
    tables = (("category", by_category), ("diameter", _by_diameter(by_category["all"])))
    return "\n\n".join(_format_diagnoses(title, rows) for title, rows in tables)


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """Write ``iou.csv``: a row an image, then a row a category and one for all, whose ids are in brackets."""
    scores = list(scores)
    columns = [f"ap_{threshold:.2f}" for threshold in THRESHOLDS]
    with replacing(path) as stage, open(stage, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "category", "mean_ap", "pixel_iou", "n_true", "n_pred", *columns])
        for s in scores:
            values = [f"{value:.6f}" for value in (s.mean_precision, s.iou)]
            each = [f"{value:.6f}" for value in s.precision]
            writer.writerow([s.id, s.category, *values, s.n_true, s.n_pred, *each])
        for name, row in summarize(scores).items():
            mean = np.mean([s.precision for s in scores if name in (s.category, "all")], axis=0)
            values = [f"{row[key]:.6f}" for key in ("score", "iou")]
            each = [f"{value:.6f}" for value in mean]
            writer.writerow([f"[{name}]", name, *values, f"{row['true']:.0f}", f"{row['found']:.0f}", *each])


def read_scores(path: Path) -> dict[str, float]:
    """Image id -> mean average precision, from an ``iou.csv``; its rows of categories are left out.

    Raises
    ------
    FileNotFoundError
        There is no such CSV.
    ValueError
        It has no columns image_id and mean_ap, or a score is no number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; valid.py --iou writes it")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if not {"image_id", "mean_ap"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: columns {rows.fieldnames}, wanted image_id and mean_ap, as of valid.py --iou")
        try:
            images = (row for row in rows if row["image_id"] != f"[{row.get('category')}]")
            return {row["image_id"]: float(row["mean_ap"]) for row in images}
        except (TypeError, ValueError):
            raise ValueError(f"{path}: line {rows.line_num}: mean_ap is no number") from None


def paired_difference(
    before: Mapping[str, float], after: Mapping[str, float], n_draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """How much better the images in both score after a change: mean, and its 95 percent bootstrap interval.

    Images are drawn with replacement, each with both of its scores, so that what makes an image easy or hard cancels
    out (Efron and Tibshirani 1993, An introduction to the bootstrap, chapter 13). The interval knows nothing of the
    chance in a training: another seed may give another difference.

    Raises
    ------
    ValueError
        No image is in both.
    """
    both = sorted(before.keys() & after.keys())
    if not both:
        raise ValueError("no image has a score before and after")
    gain = np.array([after[name] - before[name] for name in both])
    draws = np.random.default_rng(seed).integers(len(gain), size=(n_draws, len(gain)))
    low, high = np.percentile(gain[draws].mean(axis=1), [2.5, 97.5])
    return float(gain.mean()), float(low), float(high)


def _means(scores: Sequence[Score]) -> dict[str, float]:
    precision = np.mean([s.precision for s in scores], axis=0)
    return {
        "images": len(scores),
        "score": float(precision.mean()),
        "ap50": float(precision[0]),
        "ap75": float(precision[5]),
        "iou": float(np.mean([s.iou for s in scores])),
        "true": sum(s.n_true for s in scores),
        "found": sum(s.n_pred for s in scores),
    }


def _by_category(scores: Sequence[Score]) -> dict[str, list[Score]]:
    categories = sorted({score.category for score in scores} - {""})
    return {name: [s for s in scores if s.category == name] for name in categories} | {"all": list(scores)}


def _pool(scores: Sequence[Score]) -> Diagnosis:
    """The nuclei of all images as of one."""
    nothing = Diagnosis(np.empty(0, str), np.empty(0, int), np.empty(0), np.empty(0), np.empty(0, int))
    return Diagnosis(*map(np.concatenate, zip(nothing, *(s.diagnosis for s in scores), strict=True)))


def _by_diameter(found: Diagnosis) -> dict[str, Diagnosis]:
    """The nuclei between each two of `DIAMETERS`, where there are any."""
    names = [f"{low} to {high} px" for low, high in pairwise(DIAMETERS)]
    names = [f"below {DIAMETERS[0]} px", *names, f"above {DIAMETERS[-1]} px"]
    true, invented = (np.digitize(disk_diameter(areas), DIAMETERS) for areas in (found.areas, found.invented))
    return {
        name: Diagnosis(
            found.verdicts[true == i],
            found.areas[true == i],
            found.ratios[true == i],
            found.ious[true == i],
            found.invented[invented == i],
        )
        for i, name in enumerate(names)
        if i in true or i in invented
    }


def _format_diagnoses(title: str, rows: Mapping[str, Diagnosis]) -> str:
    names = VERDICTS[1:]
    lines = [f"{title:<20}{'nuclei':>8}" + "".join(f"{name:>10}" for name in (*names, "invented", "area", "recall70"))]
    for name, found in rows.items():
        counts = [int((found.verdicts == verdict).sum()) for verdict in names]
        ratios = found.ratios[~np.isnan(found.ratios)]
        area = f"{np.median(ratios):.2f}" if len(ratios) else "-"
        recall = f"{np.mean(found.ious > 0.7):.2f}" if len(found.ious) else "-"
        cells = "".join(f"{cell:>10}" for cell in (*counts, len(found.invented), area, recall))
        lines.append(f"{name:<20}{len(found.verdicts):>8}{cells}")
    return "\n".join(lines)
