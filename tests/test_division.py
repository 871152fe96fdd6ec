"""The division room: which images validate, and that kin are never parted."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from config import Dataset, load_config
from division import (
    divide_records,
    find_parted,
    fold_records,
    format_epoch,
    group_records,
    join_records,
    leave_out_records,
    load_split,
    recall_side,
    split_by_ids,
    split_records,
    training_records,
)
from listing import ids, options, touch
from record import (
    Record,
    balance_weights,
    count_by,
    derive_record,
    describe_records,
    find_records,
    read_table,
)


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def plain(*names: str, **fields) -> list[Record]:
    return [Record(name, Path(f"{name}.png"), **fields) for name in names]


def test_the_sides_have_lists_of_their_own():
    records = plain(*map(str, range(20)), sub_category="F") + plain(*map(str, range(20, 40)), sub_category="HE")
    everything = divide_records(records, options(cv_ratio=0.5))
    train, valid = divide_records(records, options(cv_ratio=0.5, train_sub_category="F", valid_sub_category="HE"))
    assert ids(train) == [r.id for r in everything[0] if r.sub_category == "F"]
    assert ids(valid) == [r.id for r in everything[1] if r.sub_category == "HE"]
    with pytest.raises(ValueError, match="valid_sub_category = Z.*There are sub_category: F, HE"):
        divide_records(records, options(cv_ratio=0.5, valid_sub_category="Z"))


def test_kin_are_found_over_patients_and_mixtures():
    a, b = plain("a", patient="b"), plain("b")
    c, d, e = plain("c", patient="7"), plain("d", patient="7"), plain("e")
    mixture = [derive_record("x", Path("x"), [*c, *e])]
    groups = [ids(group) for group in group_records([*mixture, *e, *d, *c, *b, *a])]
    assert groups == [["a"], ["b"], ["c", "d", "e", "x"]]
    by_image = [ids(group) for group in group_records([*c, *d, derive_record("c_1", Path("x"), c)], by="image")]
    assert by_image == [["c", "c_1"], ["d"]]


def test_what_would_be_parted_from_kin_is_found_and_ties_nobody():
    here, there = plain("a", patient="1"), plain("v", patient="7") + plain("w")
    mixture = derive_record("m", Path("m"), [*here, *there])
    new = [*plain("b", patient="7"), derive_record("w_0_0", Path("x"), there[1:]), mixture, *plain("c", patient="1")]
    assert find_parted(new, here, there) == {"b": ["v"], "w_0_0": ["w"], "m": ["v", "w"]}
    assert find_parted(new, here, there, by="image") == {"w_0_0": ["w"], "m": ["v", "w"]}
    chain = plain("x", patient="9") + [derive_record("y", Path("y"), [*plain("v"), *plain("q", patient="9")])]
    assert find_parted(chain, here, there) == {"y": ["v"]}
    assert find_parted([], here, there) == find_parted(new, here, []) == {}


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


@pytest.mark.parametrize("how", ["cv_ratio=0.3", "cv_folds=3"])
@pytest.mark.parametrize("further", ["sub_category=B", "blacklist=A00,A01,B02,B05,B11"])
def test_a_further_list_makes_no_trained_image_validate(tmp_path, how, further):
    """The division of what passes the list is another than that of all."""
    names = [f"{name}{i:02d}" for name in "AB" for i in range(20)]
    touch(tmp_path, *(f"train/{name}.png" for name in names))
    write_text(tmp_path / "dataset.csv", "image_id,sub_category\n" + "".join(f"{n},{n[0]}\n" for n in names))
    then = load_config(overrides=[f"dataset.{how}"])
    now = load_config(overrides=[f"dataset.{further}"])
    again = load_config(overrides=[f"dataset.{how}", f"dataset.{further}"])
    trained, held = load_split(tmp_path, then.dataset)
    assert set(ids(load_split(tmp_path, again.dataset)[1])) & set(ids(trained))  # what must not come about
    for config in (now, again):
        valid = recall_side(tmp_path, config, then.to_dict(), "valid")
        assert valid and set(ids(valid)) < set(ids(held))
        train = recall_side(tmp_path, config, then.to_dict(), "train")
        assert train and set(ids(train)) < set(ids(trained))


def test_a_list_of_the_training_divides_as_it_did(tmp_path):
    names = [f"{name}{i:02d}" for name in "AB" for i in range(20)]
    touch(tmp_path, *(f"train/{name}.png" for name in names))
    write_text(tmp_path / "dataset.csv", "image_id,sub_category\n" + "".join(f"{n},{n[0]}\n" for n in names))
    then = load_config(overrides=["dataset.sub_category=A", "dataset.cv_ratio=0.3"])
    trained, held = load_split(tmp_path, then.dataset)
    for config in (load_config(), then):
        assert ids(recall_side(tmp_path, config, then.to_dict(), "valid")) == ids(held)
        assert ids(recall_side(tmp_path, config, then.to_dict(), "train")) == ids(trained)
    with pytest.raises(ValueError, match="sub_category = B.*There are sub_category: A"):
        recall_side(tmp_path, load_config(overrides=["dataset.sub_category=B"]), then.to_dict(), "valid")
    exported = {name: values for name, values in load_config().to_dict().items() if name != "dataset"}
    assert ids(recall_side(tmp_path, then, exported, "valid")) == ids(held)


def test_a_folder_of_validation_images_serves_alone(tmp_path):
    touch(tmp_path, "valid/a.png", "valid/b.png")
    write_text(tmp_path / "dataset.csv", "image_id,sub_category\na,HE\nb,F\n")
    then = load_config(overrides=["dataset.sub_category=HE"])
    assert ids(recall_side(tmp_path, load_config(), then.to_dict(), "valid")) == ["a"]
    now = load_config(overrides=["dataset.sub_category=F"])  # a folder is divided by nobody
    assert ids(recall_side(tmp_path, now, then.to_dict(), "valid")) == ["b"]


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


# What joins a split, and what may be trained on


@pytest.mark.parametrize("how", ["valid_ids", "cv_folds", "leave_out"])
def test_strangers_are_divided_with_what_is_there(tmp_path, how):
    listed = write_text(tmp_path / "ids.txt", "1\n2\n")
    way = options(**{how: {"valid_ids": listed, "cv_folds": 3, "leave_out": "HE"}[how]})
    records = plain(*map(str, range(9)), sub_category="F") + plain("h", "i", sub_category="HE")
    train, valid = divide_records(records, way)
    new = plain("new", sub_category="F")
    more, held = join_records([*records, *new], train, valid, way)
    assert ids(more) + ids(held) == ["new"]
    assert how == "cv_folds" or not held


def test_what_may_be_trained_on_is_what_training_takes(tmp_path):
    touch(tmp_path, *(f"train/{i}.png" for i in range(20)), "train/piece.png")
    held = load_split(tmp_path, options(cv_ratio=0.2))[1]
    origin = next(record.id for record in held)
    write_text(tmp_path / "dataset.csv", f"image_id,origin\npiece,{origin}\n")
    train, valid = load_split(tmp_path, options(cv_ratio=0.2))
    free, out = training_records(tmp_path / "train", tmp_path, options(cv_ratio=0.2))
    assert ids(free) == ids(train) and ids(out) == ids(valid) and "piece" in ids(out)


@pytest.mark.parametrize("how", [{}, {"cv_folds": 2}, {"sub_category": "F"}])
def test_kin_of_the_validation_folder_are_never_trained_on(tmp_path, how):
    touch(
        tmp_path, *(f"train/{name}.png" for name in "abcd"), "valid/v.png", "other/v.png", "other/a.png", "other/x.png"
    )
    rows = ["a,F,1", "b,F,2", "c,F,3", "d,F,4", "v,HE,2", "x,F,2"]
    write_text(tmp_path / "dataset.csv", "image_id,sub_category,patient\n" + "\n".join(rows) + "\n")
    free, out = training_records(tmp_path / "train", tmp_path, options(**how))
    assert "b" in ids(out) and free and not set(ids(free)) & set(ids(out))
    free, out = training_records(tmp_path / "other", tmp_path, options(**how))
    assert set(ids(free)) <= {"a"} and {"x"} <= set(ids(out))


def test_another_folder_gives_nothing_of_what_training_validates(tmp_path):
    names = [str(i) for i in range(20)]
    touch(tmp_path, *(f"train/{name}.png" for name in names), *(f"source/{name}.png" for name in [*names, "x"]))
    _, valid = load_split(tmp_path, options(cv_ratio=0.2))
    free, out = training_records(tmp_path / "source", tmp_path, options(cv_ratio=0.2))
    assert set(ids(out)) == set(ids(valid)) and "x" in ids(free)


def test_a_folder_alone_is_divided_as_a_data_set(tmp_path):
    touch(tmp_path, *(f"source/{i}.png" for i in range(20)))
    free, out = training_records(tmp_path / "source", tmp_path / "absent", options(cv_ratio=0.2))
    assert [free, out] == list(divide_records([*free, *out], options(cv_ratio=0.2)))
    assert len(out) == 4
    assert training_records(tmp_path / "source", tmp_path / "absent", options(cv_ratio=0))[1] == []


@pytest.mark.parametrize("how", [{"cv_ratio": 0.3}, {"cv_folds": 3}, {"leave_out": "C"}])
@pytest.mark.parametrize("kind", ["A", "B"])
def test_a_list_that_chooses_material_moves_no_validation_image(tmp_path, how, kind):
    """The division of one kind alone is another than its share of the division of all."""
    names = [f"{name}{i:02d}" for name in "ABC" for i in range(20)]
    touch(tmp_path, *(f"train/{name}.png" for name in names), "source/A99.png", "source/D99.png")
    rows = [f"{name},{name[0]}\n" for name in [*names, "A99", "D99"]]
    write_text(tmp_path / "dataset.csv", "image_id,sub_category\n" + "".join(rows))
    _, valid = load_split(tmp_path, options(**how))
    _, alone = load_split(tmp_path, options(sub_category=kind, **how)) if "leave_out" not in how else ([], [])
    free, _ = training_records(tmp_path / "train", tmp_path, options(sub_category=kind, **how))
    assert free and not set(ids(free)) & set(ids([*valid, *alone]))
    assert {record.sub_category for record in free} == {kind}
    free, _ = training_records(tmp_path / "source", tmp_path, options(sub_category="D", cv_ratio=0.3))
    assert ids(free) == ["D99"]
