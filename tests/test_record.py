"""The record room: layouts on disk, the table that describes them, filters and splits."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from config import Dataset
from record import (
    Record,
    balance_weights,
    count_by,
    describe_records,
    filter_records,
    find_records,
    load_split,
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


def options(**values) -> Dataset:
    return Dataset.model_validate(values)


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
