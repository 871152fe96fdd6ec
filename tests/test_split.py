"""The script that divides a folder: links, copies, and patients that stay together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import link
import split
from config import load_config
from division import load_split
from record import find_records

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_split_links_and_never_overwrites(data, tmp_path, capsys):
    source = shutil.copytree(data / "train", tmp_path / "stage1")
    command = [str(source), "--data", str(tmp_path / "data"), "--set", "dataset.cv_ratio=0.4"]
    assert split.main(command) == 0
    sides = [{folder.name for folder in (tmp_path / "data" / side).iterdir()} for side in ("train", "valid")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {folder.name for folder in source.iterdir()}
    image = next((tmp_path / "data" / "train").glob("*/images/*"))
    assert image.samefile(source / image.relative_to(tmp_path / "data" / "train"))
    assert split.main(command) == 2
    assert "not empty" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "data")
    assert len(list(source.glob("*/images/*"))) == 6


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[!.]*")}


def oversampled(tmp_path: Path, data: Path) -> tuple[Path, Path, list[str]]:
    """A source of eight images whose first two are one patient, split, with more images in it since."""
    source = shutil.copytree(data / "train", tmp_path / "data" / "source")
    names = sorted(names_in(source))
    kinds = [name[:2] for name in names]
    rows = [f"{name},{kind},{'p' if i < 2 else i}\n" for i, (name, kind) in enumerate(zip(names, kinds, strict=True))]
    (tmp_path / "data" / "dataset.csv").write_text("image_id,sub_category,patient\n" + "".join(rows))
    assert split.main([str(source), "--data", str(tmp_path / "data"), "--set", "dataset.cv_ratio=0"]) == 0
    return source, tmp_path / "data", names


def test_oversampling_adds_copies_that_stay_with_their_patient(data, tmp_path, capsys):
    source, folder, names = oversampled(tmp_path, data)
    shutil.move(folder / "train" / names[2], folder / "valid" / names[2])
    command = [str(source), "--data", str(folder), "--oversample", "--set", "dataset.cv_ratio=0"]
    assert split.main([*command, "--dry-run"]) == 0 and names_in(folder / "train") == {*names} - {names[2]}
    one = ["--set", f"dataset.sub_category={names[0][:2]}"]
    assert split.main([*command, *one]) == 0 and split.main([*command, *one]) == 0
    assert split.main(command) == 0
    printed = capsys.readouterr().out
    first = [name for name in names if name[:2] == names[0][:2] and name != names[2]]
    copies = {f"{name}_copy{n}" for name in first for n in (1, 2, 3)} | {f"{name}_copy1" for name in names}
    copies -= {f"{names[2]}_copy{n}" for n in (1, 2, 3)}
    assert names_in(folder / "train") == ({*names} | copies) - {names[2]}
    assert names_in(folder / "valid") == {names[2]}
    assert "0 new images; 1 left alone" in printed
    image = next((folder / "train" / f"{names[0]}_copy1" / "images").iterdir())
    assert image.samefile(source / names[0] / "images" / image.name)
    config = load_config(overrides=["dataset.cv_ratio=0.5"])
    train, valid = load_split(folder, config.dataset.model_copy(update={"cv_folds": 2}))
    sides = [{record.id.split("_copy")[0] for record in side} for side in (train, valid)]
    assert not sides[0] & sides[1] and sum(names[0] in side or names[1] in side for side in sides) == 1


def test_new_images_join_the_side_of_their_patient(data, tmp_path):
    source, folder, names = oversampled(tmp_path, data)
    shutil.rmtree(folder / "train" / names[1])
    (folder / "valid").mkdir(exist_ok=True)
    shutil.move(folder / "train" / names[0], folder / "valid" / names[0])
    assert split.main([str(source), "--data", str(folder), "--oversample"]) == 0
    assert names_in(folder / "valid") == {names[0], names[1]}


def test_an_interrupted_oversampling_is_finished_first(data, tmp_path, monkeypatch, capsys):
    source, folder, names = oversampled(tmp_path, data)
    command = [str(source), "--data", str(folder), "--oversample"]
    monkeypatch.setattr(link, "finish_links", lambda folder: 0)  # killed right before the links are moved into place
    assert split.main(command) == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert names_in(folder / "train") == {*names}
    assert split.main(command) == 0
    assert f"{len(names)} copies of an interrupted run" in capsys.readouterr().out
    wanted = {*names} | {f"{name}_copy1" for name in names}
    assert names_in(folder / "train") == wanted and not (folder / "train" / link.STAGE).exists()


def test_copies_of_label_maps_are_renamed(data, tmp_path):
    source = tmp_path / "data" / "source"
    for kind in ("images", "masks"):
        (source / kind).mkdir(parents=True)
        for name in "abc":
            Image.fromarray(np.ones((20, 20), np.uint8)).save(source / kind / f"{name}.png")
    command = [str(source), "--data", str(tmp_path / "data"), "--set", "dataset.cv_ratio=0"]
    assert split.main(command) == 0 and split.main([*command, "--oversample"]) == 0
    records = find_records(tmp_path / "data" / "train")
    assert [record.id for record in records] == ["a", "a_copy1", "b", "b_copy1", "c", "c_copy1"]
    assert not any(record.problem for record in records)


def test_links_keep_an_image_without_nuclei(tmp_path):
    (tmp_path / "source" / "a" / "images").mkdir(parents=True)
    (tmp_path / "source" / "a" / "masks").mkdir()
    Image.new("L", (20, 20)).save(tmp_path / "source" / "a" / "images" / "a.png")
    command = [str(tmp_path / "source"), "--data", str(tmp_path), "--set", "dataset.cv_ratio=0"]
    assert split.main([*command, "--dry-run"]) == 0 and not (tmp_path / "train").exists()
    assert split.main(command) == 0
    assert find_records(tmp_path / "train")[0].masks == ()


def test_both_sides_appear_or_none(data, tmp_path, monkeypatch):
    command = [str(data / "train"), "--data", str(tmp_path / "data"), "--set", "dataset.cv_ratio=0.4"]
    link_record = link.link_record

    def fail(record, source, target, *name):
        if "valid" in target.name:
            raise OSError("no space left")
        return link_record(record, source, target, *name)

    monkeypatch.setattr(split, "link_record", fail)
    assert split.main(command) == 2
    assert names_in(tmp_path / "data") == set() and not list((tmp_path / "data").glob(".*"))


@pytest.mark.parametrize("oversample", [[], ["--oversample"]])
def test_a_bad_image_is_named_and_the_rest_divided(data, tmp_path, oversample, capsys):
    source = shutil.copytree(data / "train", tmp_path / "source")
    first, *others = sorted(names_in(source))
    shutil.rmtree(source / first / "images")
    (source / first / "images").mkdir()
    command = [str(source), "--data", str(tmp_path / "data"), "--set", "dataset.cv_ratio=0", *oversample]
    assert split.main(command) == 3
    assert f"refused: {source / first}" in capsys.readouterr().err
    assert names_in(tmp_path / "data" / "train") == {*others}


def test_without_a_good_image_nothing_is_divided(tmp_path, capsys):
    (tmp_path / "source" / "a" / "images").mkdir(parents=True)
    assert split.main([str(tmp_path / "source"), "--data", str(tmp_path / "data")]) == 2
    assert "0 images, wanted one" in capsys.readouterr().err and not (tmp_path / "data").exists()


@pytest.mark.parametrize("how", ["valid_ids", "cv_folds", "leave_out"])
def test_new_images_are_divided_with_the_others(data, tmp_path, how):
    source = shutil.copytree(data / "train", tmp_path / "source")
    names = sorted(names_in(source))
    (tmp_path / "ids.txt").write_text(f"{names[0]}\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.csv").write_text(f"image_id,sub_category\n{names[0]},HE\n{names[1]},HE\n")
    value = {"valid_ids": tmp_path / "ids.txt", "cv_folds": 2, "leave_out": "HE"}[how]
    command = [str(source), "--data", str(tmp_path / "data"), "--set", f"dataset.{how}={value}"]
    assert split.main(command) == 0
    before = names_in(tmp_path / "data" / "valid")
    shutil.copytree(data / "test" / sorted(names_in(data / "test"))[0], source / "new")
    assert split.main([*command, "--oversample"]) == 0
    sides = [names_in(tmp_path / "data" / side) for side in ("train", "valid")]
    assert ("new" in sides[0]) != ("new" in sides[1]) and sides[1] - {"new"} == before
