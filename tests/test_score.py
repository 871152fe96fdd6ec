"""The score room: means by category by hand, and a CSV that reads back as what was written."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metric import THRESHOLDS, diagnose
from record import Record
from score import (
    Score,
    format_errors,
    format_summary,
    paired_difference,
    read_scores,
    score_image,
    summarize,
    write_scores,
)

NOTHING = diagnose(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32))


def score(name: str, category: str, precision: list[float], iou: float = 0.5, n: tuple[int, int] = (4, 3)) -> Score:
    return Score(name, category, np.array(precision), iou, *n, NOTHING)


SCORES = [
    score("a", "tissue", [1.0] * 10, 0.9, (4, 4)),
    score("b", "dense", [1.0] * 5 + [0.0] * 5, 0.6, (10, 8)),
    score("c", "tissue", [0.5] * 6 + [0.0] * 4, 0.3, (2, 0)),
    score("d", "", [0.0] * 10, 0.0, (1, 5)),
]
# images, score, ap50, ap75, iou, true, found; the thresholds are 0.5, 0.55, ...: 0.75 is the sixth
EXPECTED = {
    "dense": (1, 0.5, 1.0, 0.0, 0.6, 10, 8),
    "tissue": (2, 0.65, 0.75, 0.75, 0.6, 6, 4),
    "all": (4, 0.45, 0.625, 0.375, 0.45, 17, 17),
}
KEYS = ("images", "score", "ap50", "ap75", "iou", "true", "found")


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_image_is_scored_as_by_hand():
    """Two true nuclei of 12 pixels: one found but for its last third (IoU 8 / 12), one missed; one of 4 invented."""
    truth, labels = np.zeros((12, 12), np.int32), np.zeros((12, 12), np.int32)
    truth[0:3, 0:4], truth[8:11, 0:4] = 1, 2
    labels[0:2, 0:4], labels[5:7, 8:10] = 1, 2
    found = score_image(Record("x", Path("x.png"), sub_category="tissue"), truth, labels)
    assert (found.id, found.category, found.n_true, found.n_pred) == ("x", "tissue", 2, 2)
    assert found.precision.tolist() == [1 / 3] * 4 + [0.0] * 6  # 0.5 to 0.65 lie below 2/3: one hit of three objects
    assert found.mean_precision == pytest.approx(4 / 30)
    assert found.iou == pytest.approx(8 / 28)


def test_an_empty_image_that_is_found_empty_is_perfect():
    empty = np.zeros((5, 5), np.int32)
    found = score_image(Record("x", Path("x.png")), empty, empty)
    assert (found.mean_precision, found.iou, found.n_true, found.n_pred) == (1.0, 1.0, 0, 0)


def test_summary_by_category():
    found = summarize(SCORES)
    assert list(found) == ["dense", "tissue", "all"]  # an image without category counts among all alone
    for name, row in found.items():
        assert tuple(row) == KEYS
        assert tuple(row.values()) == pytest.approx(EXPECTED[name]), name


def test_summary_without_categories_and_of_nothing():
    assert list(summarize([score("a", "", [1.0] * 10)])) == ["all"]
    assert summarize([]) == {}


def test_summary_as_a_table():
    header, *rows = format_summary(summarize(SCORES)).splitlines()
    assert header.split() == ["category", "images", "mAP", "AP50", "AP75", "IoU", "nuclei", "found"]
    assert rows[1].split() == ["tissue", "2", "0.6500", "0.7500", "0.7500", "0.6000", "6", "4"]
    assert len({len(line) for line in [header, *rows]}) == 1


def test_csv_reads_back(tmp_path):
    path = tmp_path / "new" / "iou.csv"
    write_scores(path, iter(SCORES))
    rows = read(path)
    assert [row["image_id"] for row in rows] == ["a", "b", "c", "d", "[dense]", "[tissue]", "[all]"]
    columns = [f"ap_{threshold:.2f}" for threshold in THRESHOLDS]
    assert columns[0] == "ap_0.50"
    assert columns[-1] == "ap_0.95"
    for row, s in zip(rows[:4], SCORES, strict=True):
        assert row["category"] == s.category
        assert float(row["mean_ap"]) == pytest.approx(s.precision.mean(), abs=1e-6)
        assert float(row["pixel_iou"]) == pytest.approx(s.iou, abs=1e-6)
        assert (int(row["n_true"]), int(row["n_pred"])) == (s.n_true, s.n_pred)
        assert [float(row[column]) for column in columns] == pytest.approx(s.precision.tolist(), abs=1e-6)
    for row in rows[4:]:
        images, mean, ap50, ap75, iou, true, found = EXPECTED[row["category"]]
        assert float(row["mean_ap"]) == pytest.approx(mean, abs=1e-6)
        assert (float(row["ap_0.50"]), float(row["ap_0.75"])) == pytest.approx((ap50, ap75), abs=1e-6)
        assert np.mean([float(row[column]) for column in columns]) == pytest.approx(mean, abs=1e-6)
        assert float(row["pixel_iou"]) == pytest.approx(iou, abs=1e-6)
        assert (int(row["n_true"]), int(row["n_pred"])) == (true, found)


def test_csv_of_nothing_is_its_header(tmp_path):
    write_scores(tmp_path / "iou.csv", [])
    assert read(tmp_path / "iou.csv") == []
    assert (tmp_path / "iou.csv").read_text().startswith("image_id,category,mean_ap,pixel_iou,n_true,n_pred,ap_0.50")


def test_csv_keeps_odd_names(tmp_path):
    write_scores(tmp_path / "iou.csv", [score('a,"b"', "kern, groß", [0.5] * 10)])
    rows = read(tmp_path / "iou.csv")
    assert [(row["image_id"], row["category"]) for row in rows] == [
        ('a,"b"', "kern, groß"), ("[kern, groß]", "kern, groß"), ("[all]", "all")
    ]  # fmt: skip


def test_errors_are_counted_by_category_and_diameter():
    truth, labels = np.zeros((99, 99), np.int32), np.zeros((99, 99), np.int32)
    truth[0:3, 0:4], truth[8:11, 0:4], truth[30:90, 0:60] = 1, 2, 3  # 3.9, 3.9 and 67.7 px across
    labels[0:2, 0:4], labels[5:17, 8:20], labels[30:90, 0:80] = 1, 2, 3  # IoU 2/3; invented; IoU 3/4
    one = score_image(Record("x", Path("x.png"), sub_category="tissue"), truth, labels)
    names = ["nuclei", "merged", "split", "tight", "wide", "missed", "invented", "area", "recall70"]
    both = ["6", "0", "0", "0", "0", "2", "2", "1.00", "0.33"]  # the median of 2/3 and 4/3
    by_category, by_diameter = format_errors([one, one]).split("\n\n")
    header, *rows = (line.split() for line in by_category.splitlines())
    assert header == ["category", *names] and rows == [["tissue", *both], ["all", *both]]
    assert [line.split() for line in by_diameter.splitlines()] == [
        ["diameter", *names],
        ["below", "10", "px", "4", "0", "0", "0", "0", "2", "0", "0.67", "0.00"],
        ["10", "to", "16", "px", "0", "0", "0", "0", "0", "0", "2", "-", "-"],
        ["63", "to", "100", "px", "2", "0", "0", "0", "0", "0", "0", "1.33", "1.00"],
    ]


def test_no_image_has_no_errors():
    assert [line.split()[1:] for line in format_errors([]).splitlines()[1:2]] == [["0"] * 7 + ["-"] * 2]


def test_scores_read_back_without_the_categories(tmp_path):
    write_scores(tmp_path / "iou.csv", [*SCORES, replace(SCORES[0], id="[01]")])
    found = read_scores(tmp_path / "iou.csv")
    assert found.keys() == {"a", "b", "c", "d", "[01]"}
    assert found["b"] == pytest.approx(0.5)


def test_a_paired_difference_does_not_mind_hard_and_easy_images():
    rng = np.random.default_rng(0)
    hard = {f"{i}": float(x) for i, x in enumerate(rng.random(80))}
    better = {name: x + 0.02 + 0.01 * float(rng.standard_normal()) for name, x in hard.items()} | {"other": 1.0}
    mean, low, high = paired_difference(hard, better)
    assert low < 0.02 < high and 0.01 < low < mean < high < 0.03
    assert paired_difference(hard, hard) == (0, 0, 0)
    with pytest.raises(ValueError, match="no image has a score"):
        paired_difference(hard, {})


def test_the_interval_is_that_of_a_normal_mean():
    gain = np.random.default_rng(1).normal(0.1, 1, 400)
    mean, low, high = paired_difference(
        {str(i): 0.0 for i in range(400)}, {str(i): float(g) for i, g in enumerate(gain)}
    )
    assert (low, high) == pytest.approx((mean - 1.96 * gain.std() / 20, mean + 1.96 * gain.std() / 20), abs=0.01)
