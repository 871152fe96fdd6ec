"""The stitching room and its script: what is made from what, whole files, and no patient parted."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

import stitch
from config import Dataset, Policy
from division import load_split
from image import read_image, read_labels
from labels import split_fragments
from record import Record, describe_records, find_records, read_table
from stitching import MARK, make_stitch, pick_worst, plan_stitches
from synthetic import KINDS, write_dataset

POLICY = Policy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of five kinds; those of a kind are of one patient, except the last, which is of none."""
    ids = write_dataset(tmp_path / "data" / "train", len(KINDS) + 5, shape=(96, 96))
    for name in ids[5:-5]:
        shutil.rmtree(tmp_path / "data" / "train" / name)
    ids = ids[:5] + ids[-5:]
    with open(tmp_path / "data" / "dataset.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "source", "major_category", "sub_category", "patient", "note"])
        for name in ids[:-1]:
            kind = name.split("_")[0]
            writer.writerow([name, "drawn", "any", kind, f"p-{kind}", "mine"])
        writer.writerow([ids[-1], "drawn", "any", "brightfield", "", "mine"])
    return tmp_path / "data"


def records(data: Path, name: str = "train") -> list[Record]:
    return describe_records(find_records(data / name), read_table(data / "dataset.csv"))


def run(data: Path, *options: str) -> int:
    return stitch.main([str(data / "train"), "--data", str(data), "--images", "10", "--width", "128", *options])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_made_is_whole_and_agrees_with_its_masks(folder):
    for plan in plan_stitches(records(folder), 6, 128, 0):
        made = make_stitch(plan, POLICY)
        assert made.image.shape == (128, 128, 3) and made.labels.shape == (128, 128)
        n, pieces = made.labels.max(), split_fragments(made.labels).max()
        assert n == pieces == made.summary.n_nuclei
        assert made.summary.n_after >= made.summary.n_before


def test_plans_take_kinds_in_turn_and_stay_within_a_patient(folder):
    found = records(folder)
    plans = plan_stitches(found, 60, 128, 0)
    assert [plan.base.sub_category for plan in plans[:5]] == sorted({r.sub_category for r in found})
    assert any(plan.mates for plan in plans)
    for plan in plans:
        assert {mate.patient for mate in plan.mates} <= {plan.base.patient} - {""}
        assert plan.record.patient == plan.base.patient and plan.record.sub_category == plan.base.sub_category
        assert plan.base.id in plan.id and plan.record.origins == (plan.base.id, *(m.id for m in plan.mates))
    assert plan_stitches(found, 20, 128, 0) == plans[:20] and plan_stitches(found, 20, 128, 1) != plans[:20]


def test_mixing_crosses_patients_and_books_them_all(folder):
    plans = plan_stitches(records(folder), 200, 128, 0, mix=True)
    crossed = [plan for plan in plans if any(mate.patient != plan.base.patient for mate in plan.mates)]
    assert crossed
    for plan in crossed:
        assert {mate.sub_category for mate in plan.mates} == {plan.base.sub_category}
        assert set(plan.record.patients) == {r.patient for r in (plan.base, *plan.mates)} - {""}


def test_the_script_writes_the_kaggle_layout_books_it_and_may_run_again(folder, capsys):
    before = content(folder / "train")
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "10 images to make" in out and "10 new rows" in out
    made = records(folder, "train_stitch")
    assert len(made) == 10 and all(r.patient == f"p-{r.sub_category}" or r.sub_category == "brightfield" for r in made)
    for record in made:
        image = read_image(record.image)
        assert record.masks is not None and read_labels(record.masks, image.shape[:2]).max() > 0
    first, rows = content(folder / "train_stitch"), (folder / "dataset.csv").read_text()
    assert all(row["note"] == "mine" for name, row in read_table(folder / "dataset.csv").items() if MARK not in name)
    assert run(folder) == 0
    assert "0 images to make, 10 there already" in capsys.readouterr().out
    assert content(folder / "train_stitch") == first and (folder / "dataset.csv").read_text() == rows
    assert content(folder / "train") == before


def test_another_width_makes_other_images(folder, capsys):
    assert run(folder) == 0
    first = content(folder / "train_stitch")
    assert run(folder, "--width", "160", "--images", "3") == 0
    assert "3 images to make" in capsys.readouterr().out
    sizes = [read_image(record.image).shape[0] for record in records(folder, "train_stitch")]
    assert (sizes.count(128), sizes.count(160)) == (10, 3)
    assert first.items() <= content(folder / "train_stitch").items()


def test_an_interrupted_run_is_taken_up_and_ends_the_same(folder, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    write = stitch.write_stitch
    calls = iter([write, write, cut_off])
    monkeypatch.setattr(stitch, "write_stitch", lambda *args: next(calls)(*args))
    assert run(folder) == 130
    assert len(list((folder / "train_stitch").iterdir())) == 2
    monkeypatch.setattr(stitch, "write_stitch", write)
    assert run(folder) == 0 and run(folder, "--output", str(folder / "whole")) == 0
    assert content(folder / "train_stitch") == content(folder / "whole")


def test_among_the_training_images_it_takes_no_material_from_its_own(folder):
    assert run(folder, "--output", str(folder / "train")) == 0
    assert run(folder, "--output", str(folder / "train"), "--seed", "1") == 0
    assert all(record.id.count(MARK) <= 1 for record in records(folder))


def test_dry_run_writes_nothing(folder, capsys):
    before = content(folder)
    assert run(folder, "--dry-run") == 0
    assert "10 images to make" in capsys.readouterr().out
    assert content(folder) == before


def test_validation_images_are_no_material(folder):
    listed = [record.id for record in records(folder)][::2]
    (folder / "ids.txt").write_text("\n".join(listed))
    assert run(folder, "--set", f"dataset.valid_ids={folder / 'ids.txt'}") == 0
    assert not {name for r in records(folder, "train_stitch") for name in r.origins} & set(listed)


def test_what_training_would_validate_on_is_no_material(folder, capsys):
    options = ["--set", "dataset.cv_ratio=0.4", "--set", "dataset.cv_group=image"]
    _, valid = load_split(folder, Dataset(cv_ratio=0.4, cv_group="image"))
    assert valid and run(folder, *options) == 0
    assert f"{len(valid)} images that validate" in capsys.readouterr().out
    assert not {name for r in records(folder, "train_stitch") for name in r.origins} & {r.id for r in valid}


def test_kin_of_the_validation_folder_is_no_material(folder):
    first, second = [record for record in records(folder) if record.patient == "p-tissue"]
    (folder / "valid").mkdir()
    first.image.parent.parent.rename(folder / "valid" / first.id)
    assert run(folder) == 0
    assert not {name for r in records(folder, "train_stitch") for name in r.origins} & {first.id, second.id}


def test_a_folder_that_validates_gives_no_material(folder, capsys):
    (folder / "train").rename(folder / "valid")
    assert stitch.main([str(folder / "valid"), "--data", str(folder)]) == 2
    assert "all 10 images validate" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_what_is_no_material_is_named(folder, dry_run, capsys):
    first, second, *_ = records(folder)
    first.image.unlink()
    shutil.rmtree(second.image.parent.parent / "masks")
    assert run(folder, "--set", "dataset.cv_ratio=0", *dry_run) == 3
    error = capsys.readouterr().err
    assert f"refused: {first.image.parent}" in error and f"refused: {second.image}: has no masks" in error


def write_scores(path: Path, scores: dict[str, object]) -> Path:
    path.write_text("image_id,category,mean_ap\n" + "".join(f"{name},x,{score}\n" for name, score in scores.items()))
    return path


def test_the_worst_give_the_material(folder, tmp_path):
    scores = {r.id: i / 10 for i, r in enumerate(records(folder))} | {"[all]": 0.0, "elsewhere": 0.0}
    path = write_scores(tmp_path / "iou.csv", scores)
    worst = pick_worst(path, records(folder), 3)
    assert [r.id for r in worst] == sorted(set(scores) - {"[all]", "elsewhere"}, key=scores.__getitem__)[:3]
    assert run(folder, "--worst", str(path), "--keep", "3") == 0
    used = {name for r in records(folder, "train_stitch") for name in r.origins}
    assert used <= {r.id for r in worst}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,score\na,1\n", "wanted image_id and mean_ap"),
        ("image_id,mean_ap\na,high\n", "mean_ap is no number"),
        ("image_id,mean_ap\na,0.5\n", "none of its 1 images"),
    ],
)
def test_a_table_that_is_no_iou_csv(folder, tmp_path, text, message):
    (tmp_path / "iou.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        pick_worst(tmp_path / "iou.csv", records(folder), 3)
    with pytest.raises(FileNotFoundError, match="valid.py --iou"):
        pick_worst(tmp_path / "absent.csv", records(folder), 3)


def test_an_image_that_cannot_be_read_is_named_and_the_rest_made(folder, capsys):
    broken = records(folder)[0]
    broken.image.write_bytes(b"no image")
    assert run(folder, "--images", "40") == 3
    assert broken.id in capsys.readouterr().err
    assert len(list((folder / "train_stitch").iterdir())) > 5


@pytest.mark.parametrize("option", [("--images", "0"), ("--width", "8"), ("--worst", "absent.csv")])
def test_what_a_user_gets_wrong_writes_nothing(folder, option, capsys):
    before = content(folder)
    assert run(folder, *option) == 2
    assert option[1] in capsys.readouterr().err
    assert content(folder) == before


def test_images_without_masks_are_refused():
    with pytest.raises(ValueError, match="masks"):
        plan_stitches([Record("a", Path("a.png"))], 3, 128, 0)


@pytest.mark.data
def test_no_patient_is_parted_on_the_real_table(nuclei_data):
    table = read_table(nuclei_data / "dataset.csv")
    found = describe_records([Record(name, Path(name), (Path(name),)) for name in table], table)
    plans = plan_stitches(found, 600, 256, 0)
    assert any(plan.mates for plan in plans)
    assert all(mate.patient == plan.base.patient for plan in plans for mate in plan.mates)
    assert np.unique([plan.base.sub_category for plan in plans], return_counts=True)[1].tolist() == [100] * 6
