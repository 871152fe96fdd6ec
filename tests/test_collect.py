"""The collect room: images come in checked, once, under their own name; and go out without a loss."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

import collect
from collect import Outcome, add_images, find_sources, remove_images
from image import read_image, read_labels
from record import find_records, read_table
from synthetic import write_dataset

ROWS = {"source": "Lab", "sub_category": "Dim"}


def add(source: Path, data: Path, **options) -> Outcome:
    sources = find_sources(source)
    rows = {record.id: ROWS for record, _ in sources}
    return add_images(sources, data, data / "dataset.csv", rows, **options)


@pytest.fixture
def new(tmp_path) -> Path:
    write_dataset(tmp_path / "new", 3, seed=5, shape=(48, 56))
    return tmp_path / "new"


@pytest.fixture
def data(tmp_path) -> Path:
    write_dataset(tmp_path / "data" / "train", 2, shape=(48, 56))
    for folder in list((tmp_path / "data" / "train").iterdir()):
        folder.rename(folder.with_name(f"old_{folder.name}"))
        (next((folder.with_name(f"old_{folder.name}") / "images").iterdir())).rename(
            folder.with_name(f"old_{folder.name}") / "images" / f"old_{folder.name}.png"
        )
    (tmp_path / "data" / "dataset.csv").write_text("image_id,source,note\nold_fluorescence_0000,Kaggle,mine\n")
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_come_in_with_their_masks_and_rows(new, data):
    outcome = add(new, data)
    assert outcome.done == [record.id for record in find_records(new)] and not outcome.refused
    for record in find_records(new):
        (found,) = [r for r in find_records(data / "train") if r.id == record.id]
        assert np.array_equal(read_image(found.image), read_image(record.image))
        assert np.array_equal(read_labels(found.masks), read_labels(record.masks))
        assert outcome.n_nuclei >= read_labels(record.masks).max()
    table = read_table(data / "dataset.csv")
    assert outcome.n_rows == 3 and len(table) == 4
    assert table[outcome.done[0]]["source"] == "Lab" and table[outcome.done[0]]["sub_category"] == "Dim"
    assert table["old_fluorescence_0000"]["note"] == "mine"


def test_what_is_there_by_content_is_skipped_whatever_it_is_called(new, data):
    add(new, data)
    before = contents(data)
    again = add(new, data)
    assert not again.done and len(again.present) == 3 and again.n_rows == 0
    renamed = new.with_name("renamed")
    for record in find_records(new):
        (renamed / f"x{record.id}" / "images").mkdir(parents=True)
        pixels = np.asarray(Image.open(record.image).convert("RGBA"))
        tifffile.imwrite(renamed / f"x{record.id}" / "images" / "i.tif", pixels, photometric="rgb", extrasamples=[2])
        shutil.copytree(record.image.parent.parent / "masks", renamed / f"x{record.id}" / "masks")
    assert len(add(renamed, data).present) == 3
    assert contents(data) == before


def test_the_same_image_twice_in_one_go_comes_in_once(new, data):
    first = find_records(new)[0]
    shutil.copytree(new / first.id, new / "zz_copy")
    outcome = add(new, data)
    assert len(outcome.done) == 3 and outcome.present == [f"zz_copy (as {first.id})"]


def test_another_image_of_a_taken_name_is_refused_or_renamed(new, data):
    add(new, data)
    before = contents(data)
    other = new.with_name("other")
    write_dataset(other, 3, seed=9, shape=(48, 56))
    outcome = add(other, data)
    assert not outcome.done and len(outcome.refused) == 3 and "--prefix" in outcome.refused[0]
    assert contents(data) == before
    assert len(add(other, data, prefix="b_").done) == 3


def test_a_dry_run_tells_the_same_and_writes_nothing(new, data):
    before = contents(data)
    dry = add(new, data, dry_run=True)
    assert contents(data) == before
    assert dry == add(new, data)


def test_into_an_empty_data_folder(new, tmp_path):
    assert len(add(new, tmp_path / "fresh").done) == 3
    assert len(find_records(tmp_path / "fresh" / "train")) == 3


def test_a_call_that_was_cut_off_is_finished_by_the_next(new, data, monkeypatch):
    place, calls = collect._place, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return place(*arguments)

    monkeypatch.setattr(collect, "_place", stop)
    with pytest.raises(KeyboardInterrupt):
        add(new, data)
    monkeypatch.undo()
    outcome = add(new, data)
    assert len(outcome.done) == 1 and len(outcome.present) == 2 and outcome.n_rows == 3
    assert not list(data.rglob("*.part"))


def test_bad_images_are_named_and_the_rest_comes_in(new, data):
    ids = [record.id for record in find_records(new)]
    mask = next((new / ids[0] / "masks").iterdir())
    cv2.imwrite(str(mask), np.full((5, 5), 255, np.uint8))
    shutil.rmtree(new / ids[1] / "masks")
    outcome = add(new, data)
    assert outcome.done == ids[2:]
    assert "from another image" in outcome.refused[0] and ids[0] in outcome.refused[0]
    assert "no masks" in outcome.refused[1] and ids[1] in outcome.refused[1]


def test_a_mask_without_a_nucleus_is_left_out_and_named(new, data):
    first = find_records(new)[0]
    cv2.imwrite(str(new / first.id / "masks" / "zzz.png"), np.zeros((48, 56), np.uint8))
    outcome = add(new, data)
    assert len(outcome.done) == 3 and len(outcome.refused) == 1 and "zzz.png" in outcome.refused[0]
    assert not (data / "train" / first.id / "masks" / "zzz.png").exists()


def test_label_maps_and_outlines(tmp_path, data):
    labels = np.zeros((30, 40), np.uint16)
    labels[2:9, 3:12], labels[10:20, 20:30] = 300, 7
    rng = np.random.default_rng(0)
    for name in ("images", "labels", "tiles"):
        (tmp_path / name).mkdir()
    for i in range(2):
        (tmp_path / "maps" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "maps" / "labels").mkdir(exist_ok=True)
        pixels = rng.integers(0, 60000, labels.shape, np.uint16)
        tifffile.imwrite(tmp_path / "maps" / "images" / f"m{i}.tif", pixels)
        tifffile.imwrite(tmp_path / "maps" / "labels" / f"m{i}.tif", labels)
    cv2.imwrite(str(tmp_path / "tiles" / "t.png"), rng.integers(0, 255, (30, 40, 3), np.uint8))
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in [(3, 2), (12, 2), (12, 9), (3, 9)])
    (tmp_path / "tiles" / "t.xml").write_text(
        f'<Annotations><Annotation><Region Id="1"><Vertices>{vertices}</Vertices></Region>'
        '<Region Id="2"><Vertices/></Region></Annotation></Annotations>'
    )
    assert add(tmp_path / "maps", data).n_nuclei == 4
    outcome = add(tmp_path / "tiles", data)
    assert outcome.n_nuclei == 1 and len(outcome.refused) == 1 and "region 2" in outcome.refused[0]
    found = {record.id: record for record in find_records(data / "train")}
    assert tifffile.imread(found["m0"].image).dtype == np.uint16
    assert np.array_equal(read_labels(found["m0"].masks) > 0, labels > 0)
    assert np.array_equal(read_labels(found["t"].masks) > 0, labels == 300)


def test_remove_undoes_add_and_loses_nothing(new, data):
    before = read_table(data / "dataset.csv")
    masks = contents(data / "train")
    add(new, data)
    dry = remove_images(data, data / "dataset.csv", sources=["Lab"], dry_run=True)
    outcome = remove_images(data, data / "dataset.csv", sources=["Lab"])
    assert dry == outcome and len(outcome.done) == 3 and outcome.n_rows == 3
    assert contents(data / "train") == masks
    assert [row["image_id"] for row in read_table(data / "dataset.csv").values()] == list(before)
    back = find_sources(data / "removed" / "train")
    rows = read_table(data / "removed" / "train" / "dataset.csv")
    assert len(add_images(back, data, data / "dataset.csv", rows).done) == 3
    assert read_table(data / "dataset.csv")[outcome.done[0]]["source"] == "Lab"
    assert remove_images(data, data / "dataset.csv", outcome.done[:1]).folder == data / "removed-2"


def test_a_removal_that_was_cut_off_is_finished_by_the_next(new, data, monkeypatch):
    add(new, data)
    rename, calls = Path.rename, []

    def stop(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        remove_images(data, data / "dataset.csv", sources=["Lab"])
    monkeypatch.undo()
    outcome = remove_images(data, data / "dataset.csv", sources=["Lab"])
    assert len(outcome.done) == 2 and outcome.n_rows == 3
    assert len(list(data.glob("removed*/train/*/images/*.png"))) == 3
    assert list(read_table(data / "dataset.csv")) == ["old_fluorescence_0000"]


def test_remove_names_what_is_not_there(new, data):
    add(new, data)
    first = find_records(new)[0].id
    outcome = remove_images(data, data / "dataset.csv", [first, "nobody"])
    assert outcome.done == [first] and outcome.refused == ["nobody: no image of that id"]
    with pytest.raises(ValueError, match="nothing to remove of source Nobody"):
        remove_images(data, data / "dataset.csv", sources=["Nobody"])


def test_a_data_set_of_label_maps_is_refused(tmp_path, new):
    for name in ("images", "masks"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(tmp_path / "data" / "train" / name / f"{i}.png"), np.eye(9, dtype=np.uint8))
    with pytest.raises(ValueError, match="Kaggle layout"):
        add(new, tmp_path / "data")
