"""The audit room: each thing that can be wrong is found by its name, and a clean set is clean."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from annotation import encode_rle
from audit import BANNED, Audit, Finding, audit, extend_blacklist, write_report
from image import read_labels
from record import find_records
from synthetic import write_dataset

SHAPE = (40, 48)


def write_case(folder: Path, *masks: np.ndarray, seed: int = 0) -> None:
    """One image of noise with these masks."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    image = np.random.default_rng(seed).integers(0, 255, (*SHAPE, 3), np.uint8)
    cv2.imwrite(str(folder / "images" / "i.png"), image)
    for i, mask in enumerate(masks):
        cv2.imwrite(str(folder / "masks" / f"{i}.png"), mask.astype(np.uint8) * 255)


def square(top: int, left: int, side: int = 10) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def pierced() -> np.ndarray:
    mask = square(3, 3)
    mask[6:8, 6] = False
    return mask


def look(folder: Path, **options) -> Audit:
    return audit({"train": find_records(folder)}, **options)


def test_a_clean_set_is_clean(tmp_path):
    write_dataset(tmp_path, 4, shape=(64, 64))
    result = look(tmp_path)
    assert result.findings == [] and result.summary() == {}
    assert result.n_images == 4 and result.n_masks == sum(len(r.masks) for r in find_records(tmp_path))


@pytest.mark.parametrize(
    ("masks", "problem", "amount"),
    [
        ([square(3, 3) | square(20, 20, 4)], "fragments", 16),
        ([pierced()], "holes", 2),
        ([np.zeros(SHAPE, bool), square(3, 3)], "empty mask", 0),
        ([np.ones((7, 9), bool)], "wrong size", 63),
        ([square(3, 3), square(3, 12)], "overlap", 10),
        ([square(3, 3), square(3, 4)], "same nucleus twice", 90),
        ([], "no nuclei", 0),
    ],
)
def test_each_problem_is_found_and_alone(tmp_path, masks, problem, amount):
    write_case(tmp_path / "case", *masks)
    (finding,) = look(tmp_path).findings
    assert (finding.image_id, finding.problem, finding.amount) == ("case", problem, amount)


def test_pieces_that_touch_by_a_corner_are_one_and_a_bay_is_no_hole(tmp_path):
    write_case(tmp_path / "case", square(3, 3) | square(13, 13) & ~square(18, 18))
    assert look(tmp_path).findings == []


def test_of_three_masks_each_pair_is_told(tmp_path):
    write_case(tmp_path / "case", square(3, 3), square(8, 8), square(6, 6))
    pairs = {(f.file, f.note.split(",")[0], f.amount) for f in look(tmp_path).findings}
    assert pairs == {("0.png", "1.png", 25), ("0.png", "2.png", 49), ("1.png", "2.png", 64)}


def test_unreadable_files_are_named_and_the_rest_is_looked_at(tmp_path):
    write_case(tmp_path / "a", square(3, 3))
    write_case(tmp_path / "b", square(3, 3), seed=1)
    (tmp_path / "a" / "images" / "i.png").write_bytes(b"no image")
    (tmp_path / "b" / "masks" / "9.png").write_bytes(b"no mask")
    (tmp_path / "c" / "images").mkdir(parents=True)
    found = look(tmp_path).findings
    assert [(f.image_id, f.problem) for f in found] == [(name, "unreadable") for name in "abc"]


def test_label_maps_are_looked_at_too(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    labels = (square(3, 3) | square(20, 20, 4)) * 5 + square(20, 35, 4) * 9
    for i in range(2):
        image = np.random.default_rng(i).integers(0, 255, SHAPE, np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), image)
        cv2.imwrite(str(tmp_path / "labels" / f"{i}.png"), labels[: 40 - i].astype(np.uint8))
    result = look(tmp_path)
    assert [(f.image_id, f.problem) for f in result.findings] == [("0", "fragments"), ("1", "wrong size")]
    assert result.n_masks == 2


def test_masks_and_rows_of_a_table_that_differ(tmp_path):
    write_case(tmp_path / "case", square(3, 3), square(20, 20))
    good, other = encode_rle(square(3, 3))[0], encode_rle(square(20, 21))[0]
    pairs = look(tmp_path, runs={"case": [good, other, "1 x"], "lost": [good]}).findings
    assert [(f.image_id, f.problem, f.file) for f in pairs] == [
        ("case", "only in csv", "row 3 of the image"),
        ("case", "only in masks", "1.png"),
        ("case", "only in csv", "row 2 of the image"),
        ("lost", "only in csv", ""),
    ]
    assert pairs[1].note == f"nearest: IoU {90 / 110:.3f}"
    assert look(tmp_path, runs={"case": [encode_rle(square(20, 20))[0], good]}).findings == []


def test_images_alike_on_both_sides_are_a_leak(tmp_path):
    write_dataset(tmp_path / "train", 3, shape=(64, 64))
    write_dataset(tmp_path / "valid", 1, seed=3, shape=(64, 64))
    first = find_records(tmp_path / "train")[0]
    image = cv2.imread(str(first.image))
    for name, view in (("copy", image), ("small", cv2.resize(image, (48, 48), interpolation=cv2.INTER_AREA))):
        (tmp_path / "valid" / name / "images").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "valid" / name / "images" / f"{name}.png"), view)
    result = audit({side: find_records(tmp_path / side) for side in ("train", "valid")})
    leaks = [f for f in result.findings if f.problem == "leak"]
    assert [(f.image_id, f.note) for f in leaks] == [
        (first.id, "copy (valid), equal pixels"),
        (first.id, "small (valid)"),
    ]
    (pair,) = [f for f in result.findings if f.problem == "near duplicate"]
    assert pair.image_id == "copy"
    assert result.ids(["leak"]) == [first.id]


def test_the_report_holds_every_finding(tmp_path):
    write_report(tmp_path / "r.csv", [Finding("a", "train", "holes", "m.png", 3, "x, y")])
    with open(tmp_path / "r.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"image_id": "a", "side": "train", "problem": "holes", "file": "m.png", "amount": "3", "note": "x, y"}
        ]


def test_a_blacklist_grows_and_keeps_what_a_user_wrote(tmp_path):
    path = tmp_path / "black.txt"
    path.write_text("# mine\nb  # blurred\nc,dim")
    assert extend_blacklist(path, ["a", "b", "c"], dry_run=True) == 1
    assert extend_blacklist(path, ["a", "b", "c"]) == 1
    assert path.read_text() == "# mine\nb  # blurred\nc,dim\na\n"
    assert extend_blacklist(path, ["a", "b"]) == 0
    assert extend_blacklist(tmp_path / "none.txt", []) == 0 and not (tmp_path / "none.txt").exists()
    assert "leak" in BANNED


@pytest.mark.data
def test_the_real_masks_of_some_images_are_sound(nuclei_data, tmp_path):
    import zipfile

    with zipfile.ZipFile(nuclei_data / "stage1_train.zip") as archive:
        ids = sorted({name.split("/")[-3] for name in archive.namelist() if "/images/" in name and name[-1] != "/"})[:5]
        for name in archive.namelist():
            if set(ids) & set(name.split("/")):
                archive.extract(name, tmp_path)
    records = find_records(next(tmp_path.iterdir()))
    result = audit({"train": records})
    assert result.n_images == 5 and result.n_masks == sum(len(r.masks) for r in records)
    assert not result.ids(BANNED)
    assert all(read_labels(r.masks).max() == len(r.masks) for r in records)
