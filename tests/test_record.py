"""The record room: layouts on disk, the table that describes them, filters and splits."""

from __future__ import annotations

import csv
import logging
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from config import Dataset
from record import (
    Record,
    balance_weights,
    book_records,
    count_by,
    derive_record,
    describe_records,
    divide_records,
    filter_records,
    find_records,
    fold_records,
    format_epoch,
    group_records,
    leave_out_records,
    load_split,
    read_ids,
    read_table,
    split_by_ids,
    split_records,
    write_table,
)
from synthetic import write_dataset


def touch(folder: Path, *names: str) -> Path:
    """Make empty files: this room never looks at pixels."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def ids(records):
    return [record.id for record in records]


def options(**values) -> Dataset:
    return Dataset.model_validate(values)


# Layouts


def test_one_image_file(tmp_path):
    touch(tmp_path, "cell.tif")
    assert find_records(tmp_path / "cell.tif") == [Record("cell", tmp_path / "cell.tif")]


def test_a_folder_of_loose_images(tmp_path):
    touch(tmp_path, "b.PNG", "a.tiff", "c.jpeg", "notes.txt", ".hidden.png", "empty/readme.md")
    records = find_records(str(tmp_path))
    assert ids(records) == ["a", "b", "c"]
    assert all(record.masks is None for record in records)


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


def test_the_sides_have_lists_of_their_own():
    records = plain(*map(str, range(20)), sub_category="F") + plain(*map(str, range(20, 40)), sub_category="HE")
    everything = divide_records(records, options(cv_ratio=0.5))
    train, valid = divide_records(records, options(cv_ratio=0.5, train_sub_category="F", valid_sub_category="HE"))
    assert ids(train) == [r.id for r in everything[0] if r.sub_category == "F"]
    assert ids(valid) == [r.id for r in everything[1] if r.sub_category == "HE"]
    with pytest.raises(ValueError, match="valid_sub_category = Z.*There are sub_category: F, HE"):
        divide_records(records, options(cv_ratio=0.5, valid_sub_category="Z"))


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


def test_kin_are_found_over_patients_and_mixtures():
    a, b = plain("a", patient="b"), plain("b")
    c, d, e = plain("c", patient="7"), plain("d", patient="7"), plain("e")
    mixture = [derive_record("x", Path("x"), [*c, *e])]
    groups = [ids(group) for group in group_records([*mixture, *e, *d, *c, *b, *a])]
    assert groups == [["a"], ["b"], ["c", "d", "e", "x"]]
    by_image = [ids(group) for group in group_records([*c, *d, derive_record("c_1", Path("x"), c)], by="image")]
    assert by_image == [["c", "c_1"], ["d"]]


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


# Splits


def cohort(seed: int, n_patients: int = 60) -> list[Record]:
    """Patients of 1 to 4 images each, of three kinds, and some images of no known patient."""
    rng = np.random.default_rng(seed)
    records = []
    for patient in range(n_patients):
        kind = str(rng.choice(["F", "HE", "P"], p=[0.6, 0.3, 0.1]))
        for _ in range(rng.integers(1, 5)):
            records.append(Record(f"{len(records):03d}", Path("x"), patient=str(patient), sub_category=kind))
    return records + [Record(f"lone{i}", Path("x"), sub_category="F") for i in range(20)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_split_parts_no_patient_and_keeps_the_ratio_of_each_kind(seed, ratio):
    records = cohort(seed)
    train, valid = split_records(records, ratio, seed)
    assert sorted(ids(train) + ids(valid)) == sorted(ids(records))
    assert not {r.patient for r in train if r.patient} & {r.patient for r in valid if r.patient}
    assert abs(len(valid) / len(records) - ratio) < 0.04
    wanted, found = count_by(records), count_by(valid)
    for kind, n in wanted.items():  # a group is taken or left whole, so half of the largest may lack
        assert abs(found.get(kind, 0) - ratio * n) <= 2, kind


def test_split_depends_on_seed_and_ids_alone():
    records = cohort(0)
    first = split_records(records, 0.2, 3)
    shuffled = [records[i] for i in np.random.default_rng(1).permutation(len(records))]
    second = split_records(shuffled, 0.2, 3)
    assert set(ids(first[1])) == set(ids(second[1]))
    assert set(ids(first[1])) != set(ids(split_records(records, 0.2, 4)[1]))


def test_ratio_zero_trains_on_all():
    records = cohort(0)
    assert split_records(records, 0, 1) == (records, [])
    assert split_records([], 0.5, 1) == ([], [])


def test_split_by_image_may_part_patients():
    records = [Record(f"{i}", Path("x"), patient="one") for i in range(40)]
    assert len(split_records(records, 0.25, 1, by="image")[1]) == 10
    assert len(split_records(records, 0.25, 1, by="patient")[1]) in (0, 40)


def test_a_patient_named_like_an_image_is_not_that_image():
    records = [Record("a", Path("x")), *(Record(f"b{i}", Path("x"), patient="a") for i in range(3))]
    valid = {frozenset(ids(split_records(records, 0.5, seed)[1])) for seed in range(20)}
    assert frozenset(["b0", "b1", "b2"]) in valid or frozenset(["a"]) in valid


def test_a_list_of_ids_splits(tmp_path, caplog):
    listed = write_text(tmp_path / "ids.txt", "c\n\n  a\r\nghost\n")
    with caplog.at_level(logging.WARNING):
        train, valid = split_by_ids(plain("a", "b", "c"), listed)
    assert (ids(train), ids(valid)) == (["b"], ["a", "c"])
    assert "1 of its 3 ids" in caplog.text
    with pytest.raises(ValueError, match="none of its 3 ids"):
        split_by_ids(plain("x", "y"), listed)
    with pytest.raises(FileNotFoundError, match="valid_ids"):
        split_by_ids(plain("a"), tmp_path / "absent.txt")


def test_a_list_of_ids_takes_what_was_made_from_them(tmp_path):
    a, b, c = plain("a", "b", "c")
    copy = derive_record("a_copy1", Path("x"), [a])
    made = [copy, derive_record("a_0_0", Path("x"), [copy]), derive_record("b_0_0", Path("x"), [b])]
    mixtures = [derive_record("ab", Path("x"), [a, b]), derive_record("ac", Path("x"), [a, c])]
    listed = write_text(tmp_path / "ids.txt", "a\nc\n")
    train, valid = split_by_ids([a, b, c, *made, *mixtures], listed)
    assert (ids(train), ids(valid)) == (["b", "b_0_0"], ["a", "c", "a_copy1", "a_0_0", "ac"])
    train, valid = split_by_ids(made[1:], listed)  # where the images themselves are not in the folder
    assert (ids(train), ids(valid)) == (["b_0_0"], [])


@pytest.mark.parametrize("seed", range(3))
def test_folds_validate_each_image_once(seed):
    records = cohort(seed)
    folds = [fold_records(records, 4, fold, seed) for fold in (1, 2, 3, 4)]
    assert sorted(image_id for _, valid in folds for image_id in ids(valid)) == sorted(ids(records))
    for train, valid in folds:
        assert sorted(ids(train) + ids(valid)) == sorted(ids(records))
        assert not {r.patient for r in train if r.patient} & {r.patient for r in valid if r.patient}
        for kind, n in count_by(records).items():
            assert abs(count_by(valid).get(kind, 0) - n / 4) <= 4, kind  # patients have up to four images
    with pytest.raises(ValueError, match="cv_folds = 3: .*too few patients"):
        fold_records(plain("a", "b"), 3, 1, 0)


def test_a_category_left_out_is_never_trained_on():
    mixed = [Record("m", Path("m"), patient="7", sub_category="F"), Record("n", Path("n"), patient="7")]
    records = plain("a", "b", sub_category="F") + plain("h", patient="7", sub_category="HE") + mixed
    train, valid = leave_out_records(records, ("HE",))
    assert (ids(train), ids(valid)) == (["a", "b"], ["h"])
    assert ids(leave_out_records(records, ("HE",), by="image")[0]) == ["a", "b", "m", "n"]
    with pytest.raises(ValueError, match="leave_out = H&E: no such sub_category; there are .*F, HE"):
        leave_out_records(records, ("H&E",))
    with pytest.raises(ValueError, match="nothing to train on"):
        leave_out_records(records[:3], ("HE", "F"))


def test_folders_that_part_a_patient_are_told(tmp_path, caplog):
    touch(tmp_path, "train/a.png", "train/b.png", "valid/c.png")
    write_text(tmp_path / "dataset.csv", "image_id,patient\na,7\nb,8\nc,7\n")
    with caplog.at_level(logging.WARNING):
        load_split(tmp_path, options())
    assert "1 patients have images on both sides" in caplog.text


@pytest.mark.parametrize(
    ("values", "wanted"),
    [({"cv_folds": 3}, 4), ({"leave_out": "HE"}, 2), ({"valid_sub_category": "F"}, 1)],
)
def test_load_split_divides_as_the_settings_say(tmp_path, values, wanted):
    touch(tmp_path, *(f"train/{i}.png" for i in range(12)), "valid/v.png", "valid/w.png")
    kinds = ["F"] * 10 + ["HE"] * 2
    rows = [f"{i},{kind}\n" for i, kind in enumerate(kinds)]
    write_text(tmp_path / "dataset.csv", "image_id,sub_category\n" + "".join(rows) + "v,F\nw,HE\n")
    train, valid = load_split(tmp_path, options(**values))
    assert len(valid) == wanted and not set(ids(train)) & set(ids(valid))
    assert ("v" in ids(valid)) == ("valid_sub_category" in values)  # a folder gives way to folds and categories


def test_load_split_of_a_flat_folder(tmp_path):
    touch(tmp_path, *(f"{i}/images/{i}.png" for i in range(20)))
    train, valid = load_split(tmp_path, options(cv_ratio=0.2))
    assert len(valid) == 4 and len(train) == 16
    assert valid == split_records(find_records(tmp_path), 0.2, Dataset().cv_seed)[1]


def test_load_split_uses_the_folders_where_there_are(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png", "valid/c.png")
    train, valid = load_split(tmp_path, options(cv_ratio=0.5))
    assert (ids(train), ids(valid)) == (["a", "b"], ["c"])


def test_load_split_prefers_the_list(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png", "valid/c.png")
    listed = write_text(tmp_path / "ids.txt", "b\n")
    train, valid = load_split(tmp_path, options(valid_ids=listed))
    assert (ids(train), ids(valid)) == (["a"], ["b"])


def test_load_split_reads_the_table_of_the_data_folder(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png", "valid/c.png", "valid/d.png")
    write_text(tmp_path / "dataset.csv", "image_id,sub_category\na,HE\nb,F\nc,HE\n")
    train, valid = load_split(tmp_path, options(sub_category="HE"))
    assert (ids(train), ids(valid)) == (["a"], ["c"])
    other = write_text(tmp_path / "other.csv", "image_id,sub_category\nb,HE\nd,HE\n")
    train, valid = load_split(tmp_path, options(sub_category="HE", csv_file=other))
    assert (ids(train), ids(valid)) == (["b"], ["d"])
    with pytest.raises(FileNotFoundError, match="csv_file"):
        load_split(tmp_path, options(csv_file=tmp_path / "absent.csv"))


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


def test_the_table_of_an_epoch():
    train = plain("a", "b", "c", sub_category="F") + plain("d")
    valid = plain("v", sub_category="HE")
    rows = [line.split() for line in format_epoch(train, valid, balance_weights(train)).splitlines()]
    assert rows == [
        ["training", "an", "epoch", "each", "validation"],
        ["uncategorised", "1", "2", "2.0x", "0"],
        ["F", "3", "2", "0.7x", "0"],
        ["HE", "0", "0", "-", "1"],
        ["all", "4", "4", "1.0x", "1"],
    ]
    assert "1.0x" in format_epoch(train, [], None).splitlines()[1]


def test_balance_weights_even_out_every_kind():
    records = cohort(1)
    total = defaultdict(float)
    for record, weight in zip(records, balance_weights(records), strict=True):
        total[record.sub_category] += weight
    assert np.allclose(list(total.values()), len(records) / 3)


# Real data


@pytest.fixture
def real(nuclei_data):
    table = read_table(nuclei_data / "dataset.csv")
    return describe_records(plain(*table), table)


@pytest.mark.data
@pytest.mark.parametrize("seed", range(3))
def test_real_patients_stay_together(real, seed):
    assert len(real) == 664
    train, valid = split_records(real, 0.12, seed)
    assert len(train) + len(valid) == 664
    assert not {r.patient for r in train} & {r.patient for r in valid}
    assert abs(len(valid) / 664 - 0.12) < 0.02
    for kind, n in count_by(real).items():
        found = sum(r.sub_category == kind for r in valid)
        assert abs(found - 0.12 * n) <= 5, kind  # patients of four, 13 of them of two kinds


@pytest.mark.data
def test_the_list_of_validation_images_parts_no_patient(real, nuclei_data):
    train, valid = split_by_ids(real, nuclei_data / "valid_ids.txt")
    assert len(valid) == 80
    assert not {r.patient for r in train} & {r.patient for r in valid}
    assert set(count_by(valid)) == set(count_by(real))
    assert max(Counter(r.patient for r in real).values()) == 4


def multiply(records: list[Record], seed: int = 0) -> list[Record]:
    """The records with pieces of each, copies of some, pieces of copies, and mixtures of two."""
    rng = np.random.default_rng(seed)
    pieces = [derive_record(f"{r.id}_{x}_0", Path("x"), [r]) for r in records for x in (0, 200)]
    copies = [
        derive_record(f"{records[i].id}_copy1", Path("x"), [records[i]]) for i in rng.permutation(len(records))[:60]
    ]
    cut_copies = [derive_record(f"{r.id}_0_0", Path("x"), [r]) for r in copies]
    chosen = [pieces[i] for i in rng.permutation(len(pieces))[:30]]
    mixtures = [
        derive_record(f"{a.id}+{b.id}", Path("x"), [a, b]) for a, b in zip(chosen[::2], chosen[1::2], strict=True)
    ]
    return [*records, *pieces, *copies, *cut_copies, *mixtures]


def specimens(records: list[Record], table: dict[str, dict[str, str]]) -> set[str]:
    """The patients of the table that an image shows, by the name of the image alone."""
    parts = [part.split("_")[0] for record in records for part in record.id.split("+")]
    return {table[part]["patient"] for part in parts}


SPLITS = [
    *({"cv_ratio": 0.1, "cv_seed": seed} for seed in range(3)),
    *({"cv_folds": 5, "cv_fold": fold} for fold in range(1, 6)),
    *({"leave_out": kind} for kind in ("HE", "PurpleTissue", "Fluorescence")),
    {"valid_ids": "valid_ids.txt"},
]


@pytest.mark.data
@pytest.mark.parametrize("how", SPLITS, ids=str)
def test_no_split_leaks_on_real_data(real, nuclei_data, how):
    if "valid_ids" in how:
        how = {"valid_ids": nuclei_data / how["valid_ids"]}
    table = read_table(nuclei_data / "dataset.csv")
    records = multiply(real)
    train, valid = divide_records(records, options(**how))
    assert min(len(train), len(valid)) > 50
    assert not specimens(train, table) & specimens(valid, table)
    if "leave_out" in how:
        assert how["leave_out"] not in count_by(train) and set(count_by(valid)) == {how["leave_out"]}
    else:
        assert set(count_by(valid)) >= {"Fluorescence", "FluorescenceField", "PurpleTissue"}


@pytest.mark.data
def test_without_its_origin_a_piece_would_leak(real, nuclei_data):
    """The test above can fail: pieces that are not booked are strangers to their images."""
    table = read_table(nuclei_data / "dataset.csv")
    strangers = [Record(record.id, record.image, sub_category=record.sub_category) for record in multiply(real)]
    train, valid = divide_records(strangers, options(cv_ratio=0.1))
    assert specimens(train, table) & specimens(valid, table)


def test_adding_copies_moves_no_original():
    for seed in range(5):
        records = cohort(seed)
        copies = [derive_record(f"{r.id}_copy1", Path("x"), [r]) for r in records if r.sub_category == "HE"]
        before = {r.id for r in split_records(records, 0.2, seed)[1]}
        after = {r.id for r in split_records([*records, *copies], 0.2, seed)[1]}
        assert {name for name in after if not name.endswith("_copy1")} == before
        assert any(name.endswith("_copy1") for name in after)


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
