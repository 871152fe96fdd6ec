"""The record room: layouts on disk, the table that describes them, filters and weights."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from config import Dataset
from listing import ids, options, touch
from record import (
    Record,
    balance_weights,
    book_records,
    count_by,
    derive_record,
    describe_records,
    filter_records,
    find_records,
    read_ids,
    read_table,
    table_path,
    write_table,
)
from synthetic import write_dataset

# Layouts


def test_one_image_file(tmp_path):
    touch(tmp_path, "cell.tif")
    assert find_records(tmp_path / "cell.tif") == [Record("cell", tmp_path / "cell.tif")]


def test_a_folder_of_loose_images(tmp_path):
    touch(tmp_path, "b.PNG", "a.tiff", "c.jpeg", "notes.txt", ".hidden.png", "empty/readme.md")
    records = find_records(str(tmp_path))
    assert ids(records) == ["a", "b", "c"]
    assert all(record.masks is None for record in records)


def test_slides_among_loose_images(tmp_path):
    touch(
        tmp_path, "a.png", "b.svs", "c.NDPI", "d.zarr/zarr.json", "d.zarr/images/x.png", "e/images/e.png", "f/zarr.json"
    )
    records = find_records(tmp_path)
    assert [(r.id, r.image.name, r.problem) for r in records] == [
        ("a", "a.png", ""), ("b", "b.svs", ""), ("c", "c.NDPI", ""), ("d", "d.zarr", ""), ("e", "e.png", ""),
    ]  # fmt: skip


def test_the_kaggle_layout(tmp_path):
    names = write_dataset(tmp_path, 3, shape=(64, 64))
    records = find_records(tmp_path)
    assert ids(records) == sorted(names)
    for record in records:
        assert record.image == tmp_path / record.id / "images" / f"{record.id}.png"
        assert record.masks == tuple(sorted((tmp_path / record.id / "masks").iterdir()))
        assert len(record.masks) > 0
    assert find_records(tmp_path / names[1]) == [r for r in records if r.id == names[1]]


def test_no_ground_truth_is_not_the_same_as_no_nuclei(tmp_path):
    touch(tmp_path, "test/images/test.png", "blank/images/blank.png")
    (tmp_path / "blank" / "masks").mkdir()
    assert [(r.id, r.masks) for r in find_records(tmp_path)] == [("blank", ()), ("test", None)]


def test_loose_images_beside_kaggle_folders(tmp_path):
    touch(tmp_path, "b/images/x.png", "a.png")
    assert ids(find_records(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("folder", ["masks", "labels"])
def test_a_folder_of_label_maps(tmp_path, folder):
    touch(tmp_path, "images/b.jpg", "images/a.png", f"{folder}/a.tif", f"{folder}/b.png", f"{folder}/spare.png")
    records = find_records(tmp_path)
    assert [(r.id, r.masks) for r in records] == [
        ("a", tmp_path / folder / "a.tif"),
        ("b", tmp_path / folder / "b.png"),
    ]
    assert [r.image.name for r in records] == ["a.png", "b.jpg"]


def test_a_folder_images_without_ground_truth(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png")
    assert [(r.id, r.masks) for r in find_records(tmp_path)] == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("files", "facts"),
    [
        (["readme.txt"], ["no image"]),
        (["a.png", "a.tif"], ["2 images", "'a'"]),
        (["a.png", "a/images/x.png"], ["2 images", "'a'"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, files, facts):
    touch(tmp_path, *files)
    with pytest.raises(ValueError) as caught:
        find_records(tmp_path)
    assert [fact for fact in facts if fact not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("files", "bad", "facts"),
    [
        (["a/images/x.png", "a/images/y.png", "b/images/x.png"], "a", ["images", "2 images", "wanted one"]),
        (["a/images/x.txt", "b/images/x.png"], "a", ["images", "0 images", "wanted one"]),
        (["images/a.png", "images/b.png", "masks/a.png"], "b", ["b.png", "no label map", "masks"]),
    ],
)
def test_one_bad_image_leaves_the_others(tmp_path, files, bad, facts):
    touch(tmp_path, *files)
    problems = {record.id: record.problem for record in find_records(tmp_path)}
    assert problems.keys() == {"a", "b"}
    assert [fact for fact in facts if fact not in problems[bad]] == []
    assert not problems[next(iter(problems.keys() - {bad}))]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        find_records(tmp_path / "absent")


# The table


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def plain(*names: str, **fields) -> list[Record]:
    return [Record(name, Path(f"{name}.png"), **fields) for name in names]


def test_the_table_describes(tmp_path):
    table = read_table(
        write_text(
            tmp_path / "t.csv",
            '\ufeffpatient,image_id,source,major_category,sub_category,remark\n7,a,Kaggle,Tissue,"H, E",x\n,b,,,\n',
        )
    )
    a, b, c = describe_records(plain("a", "b") + plain("c", sub_category="kept"), table)
    assert (a.source, a.major_category, a.sub_category, a.patient) == ("Kaggle", "Tissue", "H, E", "7")
    assert (b.source, b.major_category, b.sub_category, b.patient) == ("", "", "", "")
    assert c == plain("c", sub_category="kept")[0]


def test_patient_is_optional(tmp_path):
    table = read_table(write_text(tmp_path / "t.csv", "image_id,source,major_category,sub_category\na,S,M,C\n"))
    assert describe_records(plain("a"), table)[0].patient == ""


@pytest.mark.parametrize(
    ("text", "facts"),
    [("id,source\na,b\n", ["t.csv", "image_id", "id, source"]), ("image_id\na\nb\na\n", ["t.csv", "line 4", "'a'"])],
)
def test_a_bad_table_is_named(tmp_path, text, facts):
    with pytest.raises(ValueError) as caught:
        read_table(write_text(tmp_path / "t.csv", text))
    assert [fact for fact in facts if fact not in str(caught.value)] == []


def test_filters_are_joined_by_and():
    records = [
        Record("a", Path("a"), source="K", major_category="M", sub_category="HE"),
        Record("b", Path("b"), source="K", major_category="M", sub_category="IHC"),
        Record("c", Path("c"), source="T", major_category="M", sub_category="HE"),
        Record("d", Path("d")),
    ]
    assert filter_records(records, Dataset()) == records
    assert ids(filter_records(records, Dataset(source=("K",)))) == ["a", "b"]
    assert ids(filter_records(records, Dataset(source=("K", "T"), sub_category=("HE",)))) == ["a", "c"]
    assert ids(filter_records(records, Dataset(major_category=("M",)))) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no image passes the filter .*sub_category = Z"):
        filter_records(records, Dataset(sub_category=("Z",)))
    assert filter_records([], Dataset(source=("K",))) == []


def test_black_lists_by_id_and_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "noisy.txt", "b  # blurred\n# a remark\n\nghost\n")
    records = plain("a", "b", "c", "d")
    records.append(derive_record("b_0_0", Path("x"), [records[1]]))
    assert ids(filter_records(records, options(blacklist="noisy.txt, d"))) == ["a", "c"]
    assert ids(filter_records(records, options(train_blacklist="a"), "train")) == ["b", "c", "d", "b_0_0"]
    assert filter_records(records, options(train_blacklist="a"), "valid") == records
    assert filter_records(records, options(train_blacklist="a")) == records
    with pytest.raises(FileNotFoundError, match=r"valid_blacklist = absent\.txt"):
        filter_records(records, options(valid_blacklist="absent.txt"), "valid")
    with pytest.raises(ValueError, match="blacklist of 4 ids.*all of them on the black list"):
        filter_records(records, options(blacklist="a, b, c, d"))


def test_a_list_of_ids_may_be_a_table(tmp_path):
    assert read_ids(write_text(tmp_path / "a.csv", "\ufeffimage_id,why\na,empty\nb#1,holes\n")) == {"a", "b#1"}


# What is made of images


def test_a_piece_inherits():
    parent = Record("a", Path("a"), source="K", major_category="M", sub_category="HE", patient="7")
    piece = derive_record("a_0_0", Path("p"), [parent])
    assert (piece.source, piece.major_category, piece.sub_category, piece.patient) == ("K", "M", "HE", "7")
    assert derive_record("a_0_0_8_8", Path("q"), [piece]).origins == ("a_0_0", "a")
    other = Record("b", Path("b"), source="K", major_category="M", sub_category="IHC", patient="8")
    mixture = derive_record("ab", Path("m"), [parent, other])
    assert (mixture.sub_category, mixture.patients, mixture.origins) == ("", ("7", "8"), ("a", "b"))


def test_booking_adds_rows_and_changes_none(tmp_path):
    path = write_text(tmp_path / "t.csv", '\ufeffimage_id,remark,source\na,"one, two",K\n\nb,short\n')
    parent = describe_records(plain("a"), read_table(path))[0]
    piece = derive_record("a_0_0", Path("x"), [parent])
    assert book_records(path, [piece]) == 1
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image_id", "remark", "source", "major_category", "sub_category", "patient", "origin"]
    assert [row[:3] for row in rows] == [["a", "one, two", "K"], ["b", "short", ""], ["a_0_0", "", "K"]]
    before = path.read_bytes()
    assert book_records(path, [piece]) == 0 and path.read_bytes() == before
    assert describe_records([Record("a_0_0", Path("x"))], read_table(path)) == [piece]
    with pytest.raises(ValueError, match="'a' is there with the origin ''"):
        book_records(path, [derive_record("a", Path("x"), plain("z"))])
    assert path.read_bytes() == before
    assert book_records(tmp_path / "new.csv", [piece]) == 1
    assert read_table(tmp_path / "new.csv")["a_0_0"]["origin"] == "a"


# Balance


def test_balance_weights_by_hand():
    records = plain("a", "b", "c", sub_category="F") + plain("d", sub_category="HE")
    # The kinds weigh the same (2 of 4 each), so each F two thirds, the HE two.
    assert np.allclose(balance_weights(records), [2 / 3, 2 / 3, 2 / 3, 2])
    assert count_by(records) == {"F": 3, "HE": 1}
    assert count_by(records, lambda record: record.id[0] < "c") == {False: 2, True: 2}


def test_balance_may_go_half_of_the_way():
    records = [Record(str(i), Path(), sub_category="common" if i < 16 else "rare") for i in range(20)]
    weights = balance_weights(records, 0.5)
    assert np.isclose(weights.mean(), 1)
    assert np.isclose(weights[:16].sum() / weights[16:].sum(), 4 / 2)  # the square roots of 16 and 4
    assert np.allclose(balance_weights(records, 0), 1)


def test_weights_of_categories_come_on_top(caplog):
    records = plain("a", "b", "c", sub_category="F") + plain("d", sub_category="HE")
    assert np.allclose(balance_weights(records, 0, {"HE": 5}), [0.5, 0.5, 0.5, 2.5])
    assert np.allclose(balance_weights(records, 1, {"HE": 3}), [1 / 3, 1 / 3, 1 / 3, 3])
    assert np.allclose(balance_weights(records, 1, {"F": 0, "Moon": 2}), [0, 0, 0, 4])
    assert "no image of Moon" in caplog.text
    with pytest.raises(ValueError, match="all are 0"):
        balance_weights(records, 1, {"F": 0, "HE": 0})


def test_balance_weights_even_out_every_kind():
    records = [
        r for kind, n in (("F", 30), ("HE", 12), ("P", 3)) for r in plain(*map(str, range(n)), sub_category=kind)
    ]
    total = defaultdict(float)
    for record, weight in zip(records, balance_weights(records), strict=True):
        total[record.sub_category] += weight
    assert np.allclose(list(total.values()), 15)


def test_a_row_with_too_many_cells_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 2: more cells than the 2 columns"):
        read_table(write_text(tmp_path / "t.csv", "image_id,source\na,K,\n"))


# Writing the table


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_table_comes_back_as_it_was(tmp_path, ending):
    text = ending.join(
        ["image_id,note,source,major_category,sub_category,patient", 'a,"x, y",Lab,,Dim,7', "b,,,,,", ""]
    )
    (tmp_path / "t.csv").write_text(text, newline="")
    (tmp_path / "link.csv").symlink_to(tmp_path / "t.csv")
    write_table(tmp_path / "link.csv", read_table(tmp_path / "t.csv"))
    assert (tmp_path / "t.csv").read_bytes().decode() == text and (tmp_path / "link.csv").is_symlink()


def test_a_new_table_has_all_columns(tmp_path):
    write_table(tmp_path / "t.csv", {"a": {"image_id": "a", "source": "Lab"}, "b": {"image_id": "b", "note": "n"}})
    rows = read_table(tmp_path / "t.csv")
    assert list(rows["a"]) == ["image_id", "source", "note", "major_category", "sub_category", "patient"]
    assert rows["a"]["note"] == "" and rows["b"]["note"] == "n"
    write_table(tmp_path / "t.csv", {})
    assert read_table(tmp_path / "t.csv") == {}


def test_one_way_to_the_table(tmp_path):
    data, images = tmp_path / "data", tmp_path / "far" / "images"
    assert table_path(data, options()) == data / "dataset.csv"
    assert table_path(data, options(), images) == tmp_path / "far" / "dataset.csv"
    touch(data, "dataset.csv")
    assert table_path(data, options(), images) == data / "dataset.csv"
    touch(tmp_path / "far", "dataset.csv")
    assert table_path(data, options(), images) == tmp_path / "far" / "dataset.csv"
    assert table_path(data, options()) == data / "dataset.csv"
    named = write_text(tmp_path / "mine.csv", "image_id\n")
    assert table_path(data, options(csv_file=named), images) == named
    with pytest.raises(FileNotFoundError, match="csv_file = absent.csv"):
        table_path(data, options(csv_file="absent.csv"))
