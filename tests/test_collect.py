"""The collect room: images come in checked, once, under their own name; and go out without a loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

import collect
from collect import Outcome, add_images, describe_sources, find_sources, remove_images
from image import read_image, read_labels
from record import find_records, read_table
from synthetic import write_dataset

ROWS = {"source": "Lab", "sub_category": "Dim"}


def add(source: Path, data: Path, outlines: Path | None = None, **options) -> Outcome:
    sources, _ = find_sources(source, outlines)
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
    back, _ = find_sources(data / "removed" / "train")
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


def geojson(path: Path, x: int, y: int) -> None:
    """An outline of 8 x 8 pixels."""
    ring = [[x, y], [x + 8, y], [x + 8, y + 8], [x, y + 8], [x, y]]
    features = [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def test_corrected_masks_of_an_image_that_is_there_are_refused(new, data):
    add(new, data)
    first = find_records(new)[0]
    before = contents(data)
    assert isinstance(first.masks, tuple)
    last = cv2.imread(str(first.masks[-1]), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(first.masks[-1]), np.where(np.arange(48)[:, None] > np.flatnonzero(last.any(1))[0], last, 0))
    for dry_run in (True, False):
        outcome = add(new, data, dry_run=dry_run)
        assert len(outcome.present) == 2 and not outcome.done
        assert "is there with other masks" in outcome.refused[0]
        assert f"prepare.py remove {first.id} first" in outcome.refused[0]
    assert contents(data) == before
    remove_images(data, data / "dataset.csv", [first.id])
    assert add(new, data).done == [first.id]


def test_the_same_nuclei_in_other_files_are_the_same(new, data):
    add(new, data)
    first = find_records(new)[0]
    assert isinstance(first.masks, tuple)
    for number, path in enumerate(reversed(first.masks)):
        path.rename(path.with_name(f"z{number:04d}.png"))
    assert len(add(new, data).present) == 3


def test_outlines_that_are_named_win_over_masks(new, data):
    first, second, third = find_records(new)
    (new.parent / "corrected").mkdir()
    geojson(new.parent / "corrected" / f"{first.id}.geojson", 4, 6)
    outcome = add(new, data, new.parent / "corrected")
    assert len(outcome.done) == 3
    found = {record.id: record for record in find_records(data / "train")}
    labels = read_labels(found[first.id].masks)
    assert labels.max() == 1 and labels[6:14, 4:12].all() and labels.sum() == 64
    assert np.array_equal(read_labels(found[second.id].masks), read_labels(second.masks))


def test_outlines_of_no_image_are_named(new, data):
    first, second, _ = find_records(new)
    geojson(new / f"{first.id}.geojson", 4, 6)
    assert [first.id in line and "--outlines" in line for line in find_sources(new)[1]] == [True]
    shutil.rmtree(new / second.id / "masks")
    geojson(new / f"{second.id}.geojson", 4, 6)
    geojson(new / "stranger.geojson", 4, 6)
    sources, lines = find_sources(new)
    assert [source.annotation is not None for source in sources] == [False, True, False]
    assert len(lines) == 2 and "has masks" in lines[0] and "stranger" in lines[1]


def test_a_prefix_renames_what_an_image_was_made_from(new, data):
    ids = [record.id for record in find_records(new)]
    rows = {
        name: {"source": "Lab", "origin": origin}
        for name, origin in zip(ids, ("", ids[0], f"{ids[0]};far"), strict=True)
    }
    sources, _ = find_sources(new)
    add_images(sources, data, data / "dataset.csv", rows, prefix="b_")
    table = read_table(data / "dataset.csv")
    assert [table[f"b_{name}"]["origin"] for name in ids] == ["", f"b_{ids[0]}", f"b_{ids[0]};far"]


def test_a_row_of_another_image_is_no_row_of_this_one(new, data):
    ids = [record.id for record in find_records(new)]
    with (data / "dataset.csv").open("a") as table:
        table.write(f"{ids[0]},Kaggle,\n")
    sources, _ = find_sources(new)
    rows = {name: {"source": "Lab", "origin": "whole"} for name in ids}
    outcome = add_images(sources, data, data / "dataset.csv", rows)
    assert outcome.done == ids[1:] and len(outcome.refused) == 1
    assert "origin" in outcome.refused[0] and ids[0] in outcome.refused[0]
    assert not (data / "train" / ids[0]).exists()


@pytest.mark.parametrize("layout", ["folder of pieces", "label maps"])
def test_what_is_not_removed_keeps_its_row(new, data, layout):
    add(new, data)
    ids = [record.id for record in find_records(new)]
    if layout == "label maps":
        (data / "other" / "images").mkdir(parents=True)
        cv2.imwrite(str(data / "other" / "images" / "piece.png"), np.eye(9, dtype=np.uint8))
    else:
        (data / "new_crop" / "piece" / "images").mkdir(parents=True)
    with (data / "dataset.csv").open("a") as table:
        table.write("piece,Lab,,,,p1,\nlost,Lab,,,,p2,\n")
    outcome = remove_images(data, data / "dataset.csv", sources=["Lab"])
    assert sorted(outcome.done) == ids and outcome.n_rows == 4
    assert list(read_table(data / "dataset.csv")) == ["old_fluorescence_0000", "piece"]
    assert set(read_table(outcome.folder / "train" / "dataset.csv")) == {*ids, "lost"}


def test_the_row_of_an_image_stays_while_another_folder_holds_it(new, data):
    add(new, data)
    first = find_records(new)[0].id
    shutil.copytree(data / "train" / first, data / "source" / first)
    outcome = remove_images(data, data / "dataset.csv", [first])
    assert outcome.done == [first] and outcome.n_rows == 0
    assert read_table(data / "dataset.csv")[first] == read_table(outcome.folder / "train" / "dataset.csv")[first]


def test_kin_of_the_validation_folder_are_not_added_to_training(new, data):
    write_dataset(data / "valid", 1, seed=7, shape=(48, 56), prefix="v_")
    held = find_records(data / "valid")[0].id
    with (data / "dataset.csv").open("w") as table:
        table.write(f"image_id,patient,origin\n{held},P7,\n")
    sources, _ = find_sources(new)
    first, second, third = (record.id for record, _ in sources)
    rows = {first: {"patient": "P7"}, second: {"patient": "P8"}, third: {"origin": held}}
    before = contents(data)

    def bring(**options) -> Outcome:
        return add_images(sources, data, data / "dataset.csv", rows, **options)

    dry = bring(dry_run=True)
    assert contents(data) == before
    outcome = bring()
    assert outcome == dry and outcome.done == [second] and len(outcome.refused) == 2
    for line in outcome.refused:
        assert f"{data / 'valid'}: {held}" in line and "--to valid" in line
    assert bring(side="valid").done == [first, third]
    remove_images(data, data / "dataset.csv", [first])
    assert bring(by="").done == [first]  # where other rules say which images validate


def test_kin_of_training_images_are_not_added_to_validation(new, data):
    write_dataset(data / "valid", 1, seed=7, shape=(48, 56), prefix="v_")
    (data / "dataset.csv").write_text("image_id,patient\nold_fluorescence_0000,P7\n")
    sources, _ = find_sources(new)
    rows = {record.id: {"patient": "P7"} for record, _ in sources}
    outcome = add_images(sources, data, data / "dataset.csv", rows, side="valid")
    assert not outcome.done and "old_fluorescence_0000; --to train" in outcome.refused[0]
    assert len(add_images(sources, data, data / "dataset.csv", rows, side="elsewhere").done) == 3


def test_an_image_without_its_row_is_refused_unless_a_source_is_named(new):
    sources, _ = find_sources(new)
    first, second, third = (record.id for record, _ in sources)
    (new / "dataset.csv").write_text(f"image_id,source,patient\n{first},Lab,P7\n{third},Lab,P8\n")
    described, rows, lines = describe_sources(sources, new / "dataset.csv", {"patient": "P9"})
    assert [source.record.id for source in described] == list(rows) == [first, third]
    assert rows[first]["source"] == "Lab" and rows[first]["patient"] == "P9"
    assert len(lines) == 1 and f"no row '{second}'" in lines[0] and "--source" in lines[0]
    described, rows, lines = describe_sources(sources, new / "dataset.csv", {"source": "Here"})
    assert len(described) == 3 and not lines and rows[second] == {"source": "Here"}
    assert rows[first]["patient"] == "P7"


def derive(data: Path, image_id: str, *names: str) -> None:
    """Images in training that are booked as made from one."""
    write_dataset(data / "made", len(names), seed=11, shape=(48, 56))
    for name, folder in zip(names, sorted((data / "made").iterdir()), strict=True):
        folder.rename(data / "train" / name)
    (data / "made").rmdir()
    with (data / "dataset.csv").open("a") as table:
        table.writelines(f"{name},,,,,P7,other;{image_id}\n" for name in names)


def test_what_was_made_from_a_removed_image_is_named_or_goes_along(new, data):
    add(new, data)
    first = find_records(new)[0].id
    derive(data, first, f"{first}_copy1", "piece", "stitched")
    dry = remove_images(data, data / "dataset.csv", [first], dry_run=True)
    assert dry.done == [first] and dry.derived == sorted([f"{first}_copy1", "piece", "stitched"])
    outcome = remove_images(data, data / "dataset.csv", [first])
    assert outcome == dry and (data / "train" / "piece").is_dir()
    with pytest.raises(ValueError, match="--derived takes what was made from it: .*piece"):
        remove_images(data, data / "dataset.csv", [first])
    outcome = remove_images(data, data / "dataset.csv", [first], derived=True)
    assert sorted(outcome.done) == dry.derived and not outcome.derived and not outcome.refused and outcome.n_rows == 3
    assert read_table(outcome.tables["train"])["piece"]["patient"] == "P7"


def test_an_image_of_both_sides_goes_from_both(new, data):
    add(new, data)
    first, second, _ = (record.id for record in find_records(new))
    (data / "valid").mkdir()
    shutil.copytree(data / "train" / first, data / "valid" / first)
    (data / "train" / second).rename(data / "valid" / second)
    outcome = remove_images(data, data / "dataset.csv", [first])
    assert outcome.done == [first, first] and not list(data.glob(f"*/{first}"))
    assert outcome.tables == {side: data / "removed" / side / "dataset.csv" for side in ("train", "valid")}
    for path in outcome.tables.values():
        assert list(read_table(path)) == [first] and (path.parent / first / "images").is_dir()
    assert list(remove_images(data, data / "dataset.csv", [second]).tables) == ["valid"]


def test_what_prediction_wrote_holds_no_row(new, data):
    add(new, data)
    first, second, third = (record.id for record in find_records(new))
    (data / "predict" / second / "masks").mkdir(parents=True)
    for name in (f"{first}.png", f"{first}.tif"):
        (data / "predict" / name).touch()
    outcome = remove_images(data, data / "dataset.csv", [first, second])
    assert outcome.n_rows == 2 and list(read_table(data / "dataset.csv")) == ["old_fluorescence_0000", third]


def test_remove_names_what_is_not_there(new, data):
    add(new, data)
    first = find_records(new)[0].id
    outcome = remove_images(data, data / "dataset.csv", [first, "nobody"])
    assert outcome.done == [first] and outcome.refused == ["nobody: no image of that id in train"]
    with pytest.raises(ValueError, match="nothing to remove of source Nobody"):
        remove_images(data, data / "dataset.csv", sources=["Nobody"])


def test_a_data_set_of_label_maps_is_refused(tmp_path, new):
    for name in ("images", "masks"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(tmp_path / "data" / "train" / name / f"{i}.png"), np.eye(9, dtype=np.uint8))
    with pytest.raises(ValueError, match="Kaggle layout"):
        add(new, tmp_path / "data")
