"""The dataset room: what an item depends on, the order of an epoch, and threads that end."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config
from dataset import N_DRAWN, N_FRESH, Loader, NucleiDataset, build_cleaner, build_loader, open_cache
from image import ImageError, Pixels, read_image, write_pixels
from record import Record, describe_records, find_records
from synthetic import write_dataset
from transform import CALMED

HEADS = ("semantic", "contour", "marker")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Seven small images of five kinds, in the Kaggle layout."""
    path = tmp_path_factory.mktemp("data")
    write_dataset(path, 7, shape=(72, 80))
    return path


@pytest.fixture(scope="session")
def records(folder):
    found = find_records(folder)
    return describe_records(found, {record.id: {"sub_category": record.id.split("_")[0]} for record in found})


def settings(**sections) -> Config:
    return Config.model_validate({"default": {"width": 32}, **sections})


def build(folder, records, heads=HEADS, **sections) -> NucleiDataset:
    config = settings(**sections)
    return NucleiDataset(records, open_cache(config, folder), config, heads)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


# Items


def test_item_types_and_shapes(folder, records):
    item = build(folder, records).item(0, epoch=0)
    assert list(item) == ["image", *HEADS, "weight"]
    assert item["image"].dtype == np.uint8 and item["image"].shape == (3, 32, 32)
    for name in (*HEADS, "weight"):
        assert item[name].dtype == np.float32 and item[name].shape == (1, 32, 32)


def test_heads_and_weight_follow_the_settings(folder, records):
    assert list(build(folder, records, ("semantic",), param={"weight_map": False}).item(0, 0)) == ["image", "semantic"]
    soft = build(folder, records, ("semantic",), pre={"label_to_binary": False}).item(1, 0)["semantic"]
    assert len(np.unique(soft)) == 3


def test_item_depends_on_seed_epoch_and_index(folder, records):
    dataset = build(folder, records)
    first = dataset.item(2, 5)
    dataset.item(3, 5)  # what was asked for before must not matter
    assert equal(first, dataset.item(2, 5))
    assert equal(first, build(folder, records).item(2, 5))
    assert not equal(first, dataset.item(2, 6))
    assert not equal(first, dataset.item(3, 5))
    assert not equal(first, build(folder, records, train={"seed": 2}).item(2, 5))


def test_sample_is_what_lies_on_disk(folder, records):
    dataset = build(folder, records, pre={"stretch": False})
    for index, record in enumerate(records):
        sample = dataset.sample(index)
        assert (sample.id, sample.group) == (record.id, record.sub_category)
        assert np.array_equal(sample.image, np.asarray(Image.open(record.image).convert("RGB")))
        for i, mask in enumerate(record.masks, 1):  # drawn without overlap
            assert np.array_equal(sample.labels == i, np.asarray(Image.open(mask)) > 0)


def test_whole_image_unchanged_when_all_is_off(folder, records):
    off = dict.fromkeys(
        ["random_crop", "flip", "rotate", "elastic_distortion", "color_jitter", "gray", "color_space_shift", "stretch"]
        + ["channel_shuffle"],
        False,
    )
    square = [record for record in records if record.id.startswith("tissue")]
    dataset = build(folder, square, pre=off, default={"width": 80})
    item, sample = dataset.item(0, 0), dataset.sample(0)
    middle = item["semantic"][0][np.rint(np.linspace(0, 79, 72)).astype(int)]  # 72 rows, squeezed to 80
    assert (middle == (sample.labels > 0)).mean() > 0.97


def test_a_calm_data_set_is_one_without_the_strong_changes(folder, records):
    strong, mild = (build(folder, records, pre=dict.fromkeys(CALMED, on)) for on in (True, False))
    items, expected = ([dataset.item(index, 0) for index in range(len(records))] for dataset in (strong, mild))
    assert not all(np.array_equal(a["image"], b["image"]) for a, b in zip(items, expected, strict=True))
    strong.calm = True
    for index, item in enumerate(expected):
        for name, value in strong.item(index, 0).items():
            assert np.array_equal(value, item[name]), name


def test_records_without_masks_are_refused(folder, records):
    bare = Record("bare", records[0].image)
    with pytest.raises(ValueError, match="1 images have no masks.*'bare'"):
        build(folder, [*records, bare])


def test_cache_lies_where_the_settings_say(tmp_path, records):
    config = settings(
        dataset={"cache_dir": tmp_path / "here"},
        pre={"channels": "0", "percentile_low": 1, "percentile_high": 99, "stretch": False},
    )
    cache = open_cache(config, tmp_path)
    assert cache.folder == tmp_path / "here"
    assert (cache.channels, cache.percentiles, cache.stretch) == ((0,), (1, 99), False)
    assert open_cache(settings(), tmp_path).folder == tmp_path / ".cache"


def test_cleaner_drops_specks_and_fills_holes():
    labels = np.zeros((12, 12), np.int32)
    labels[1:6, 1:6], labels[3, 3], labels[9, 9] = 1, 0, 2
    labels.flags.writeable = False
    assert build_cleaner(settings())(labels) is labels
    filled = build_cleaner(settings(pre={"fill_holes": True}))(labels)
    assert (filled == 1).sum() == 25 and (filled == 2).sum() == 1
    kept = build_cleaner(settings(pre={"min_object_size": 2}))(labels)
    assert kept.max() == 1 and (kept == 1).sum() == 24


def test_drawn_items_take_the_place_of_images(folder, records):
    """As often as the settings say, each another one, and the same again for the same place in the training."""
    never = build(folder, records, train={"drawn_share": 0})
    half, always = (build(folder, records, train={"drawn_share": share}) for share in (0.5, 1))
    drawn = [half.draw(np.random.default_rng(seed), 0) for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0].image, drawn[1].image) and np.array_equal(drawn[0].labels, drawn[1].labels)
    assert not np.array_equal(drawn[0].image, drawn[2].image)
    items = [(half.item(0, epoch), always.item(0, epoch), always.item(1, epoch)) for epoch in range(60)]
    assert 15 < sum(equal(mixed, every) for mixed, every, _ in items) < 45
    assert not any(equal(every, other) for _, every, other in items)
    assert equal(always.item(0, 3), items[3][1]) and not equal(never.item(0, 3), items[3][1])


def test_every_epoch_brings_new_drawn_images(folder, records, monkeypatch):
    seen = []

    def note(number, policy):
        seen[-1].add(number)
        return np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int16)

    monkeypatch.setattr("dataset.draw_once", note)
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        dataset, rng = build(folder, records, train={"seed": seed}), np.random.default_rng(0)
        seen.append(set())
        for _ in range(12_000):
            dataset.draw(rng, epoch)
    assert len(seen[0]) == len(seen[1]) == N_DRAWN
    assert len(seen[1] - seen[0]) == 1 and not seen[0] & seen[2]  # a tenth of what so short an epoch draws
    dataset.records *= 1000
    assert dataset.drawn_numbers(3)[0] - dataset.drawn_numbers(2)[0] == N_FRESH


def test_drawn_images_are_shown_as_files_are(folder, records, tmp_path):
    plain = build(folder, records).draw(np.random.default_rng(5), 0)
    write_pixels(tmp_path, "drawn", Pixels(plain.image, False))
    pre = {"color_space": "lab", "stretch": True}
    config = settings(pre=pre)
    seen = build(folder, records, pre=pre).draw(np.random.default_rng(5), 0)
    assert np.array_equal(seen.image, read_image(tmp_path / "drawn.png", *config.pre.policy))
    assert not np.array_equal(seen.image, plain.image) and np.array_equal(seen.labels, plain.labels)


# Order


def test_an_epoch_holds_every_item_once_in_an_order_of_its_own(folder, records):
    dataset = build(folder, records, train={"balance_group": False})
    orders = [dataset.order(epoch) for epoch in range(5)]
    assert all(sorted(order) == list(range(len(records))) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders[3] == build(folder, records, train={"balance_group": False}).order(3)


def test_balance_evens_out_categories(folder):
    kinds = ["common"] * 30 + ["rare"] * 6 + ["once"]
    many = [Record(f"{i:02d}", folder, masks=(), sub_category=kind) for i, kind in enumerate(kinds)]
    dataset = build(folder, many, train={"balance_group": True})
    plain = build(folder, many, train={"balance_group": False})
    total = dict.fromkeys(kinds, 0)
    for epoch in range(30):
        order = dataset.order(epoch)
        assert len(order) == 37
        found = dict.fromkeys(kinds, 0)
        for index in order:
            found[kinds[index]] += 1
        assert all(11 <= n <= 14 for n in found.values())  # a third each
        total = {kind: total[kind] + n for kind, n in found.items()}
        assert sorted(plain.order(epoch)) == list(range(37))
    assert all(abs(n / (30 * 37) - 1 / 3) < 0.01 for n in total.values())
    assert len({i for epoch in range(30) for i in dataset.order(epoch)}) == 37  # in the long run nothing is left out


# Batches


def test_batches_are_the_same_for_any_number_of_threads(folder, records):
    dataset = build(folder, records)
    runs = [list(Loader(dataset, 2, n_worker).epoch(4)) for n_worker in (0, 1, 3)]
    assert len(runs[0]) == 4
    for other in runs[1:]:
        assert len(other) == 4
        assert all(equal(a, b) for a, b in zip(runs[0], other, strict=True))
    assert not loader_threads()


@pytest.mark.parametrize("n_worker", [0, 2])
def test_a_batch_is_items_stacked_and_the_last_is_kept(folder, records, n_worker):
    dataset = build(folder, records)
    loader = Loader(dataset, 3, n_worker)
    batches = list(loader.epoch(1))
    assert len(loader) == len(batches) == 3
    assert [len(batch["image"]) for batch in batches] == [3, 3, 1]
    assert batches[0]["image"].dtype == torch.uint8 and batches[0]["image"].shape == (3, 3, 32, 32)
    assert batches[0]["weight"].dtype == torch.float32 and batches[0]["weight"].shape == (3, 1, 32, 32)
    order = dataset.order(1)
    for place, index in enumerate(order):
        batch = {key: value[place % 3].numpy() for key, value in batches[place // 3].items()}
        assert equal(batch, dataset.item(index, 1, place))


def test_copies_of_an_image_differ(folder, records):
    dataset = build(folder, records)
    assert not equal(dataset.item(0, 1, 2), dataset.item(0, 1, 3))
    assert equal(dataset.item(0, 1, 2), dataset.item(0, 1, 2))


def test_the_loader_follows_the_settings(folder, records):
    config = settings(train={"n_batch": 4, "n_worker": 1})
    loader = build_loader(records, open_cache(config, folder), config, HEADS)
    assert (loader.n_batch, loader.n_worker, len(loader)) == (4, 1, 2)


class Stub:
    """Stands in for a data set: counts what is asked for, and may fail."""

    def __init__(self, n: int, bad: int | None = None) -> None:
        self.n, self.bad, self.asked = n, bad, 0

    def __len__(self) -> int:
        return self.n

    def order(self, epoch: int) -> list[int]:
        return list(range(self.n))

    def item(self, index: int, epoch: int, position: int) -> dict[str, np.ndarray]:
        self.asked += 1
        if index == self.bad:
            raise ImageError(f"{index}.png: empty file")
        return {"image": np.array([index])}


@pytest.mark.parametrize("n_worker", [0, 1, 3])
def test_an_error_in_a_thread_reaches_the_consumer(n_worker):
    batches = Loader(Stub(20, bad=7), 2, n_worker).epoch(0)
    good = [next(batches)["image"].ravel().tolist() for _ in range(3)]
    assert good == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ImageError, match="7.png: empty file"):
        next(batches)
    assert not loader_threads()


@pytest.mark.parametrize("how", ["break", "close", "exception"])
def test_leaving_early_leaves_no_threads(how):
    batches = Loader(Stub(1000), 2, 3).epoch(0)
    next(batches)
    assert loader_threads()
    if how == "close":
        batches.close()
    elif how == "break":
        for _ in batches:
            break
    else:
        with pytest.raises(RuntimeError):
            for _ in batches:
                raise RuntimeError
    del batches
    gc.collect()
    assert not loader_threads()


def test_no_more_batches_wait_than_promised():
    stub = Stub(1000)
    batches = Loader(stub, 1, 2).epoch(0)
    for taken in range(1, 20):
        next(batches)
        time.sleep(0.002)
        assert stub.asked <= taken + 3
    batches.close()


def test_an_epoch_of_nothing():
    assert list(Loader(Stub(0), 2, 2).epoch(0)) == []


# Real data


@pytest.mark.data
def test_real_images_become_batches(nuclei_data, tmp_path):
    import zipfile

    with zipfile.ZipFile(nuclei_data / "stage1_train.zip") as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        some = {name.split("/")[1] for name in names[:: len(names) // 4]}
        archive.extractall(tmp_path, [name for name in names if name.split("/")[1] in some])
    records = find_records(tmp_path / "stage1_train")
    dataset = build(tmp_path, records)
    for index, record in enumerate(records):
        assert dataset.sample(index).labels.max() == len(record.masks)
    (batch,) = Loader(dataset, len(records), 1).epoch(0)
    assert batch["image"].shape == (len(records), 3, 32, 32)


# Parts of a step


@pytest.mark.parametrize(
    ("n", "n_batch", "accumulate", "world"), [(7, 3, 1, 2), (20, 8, 2, 3), (5, 10, 1, 4), (9, 4, 4, 1)]
)
def test_processes_have_each_image_once(n, n_batch, accumulate, world):
    loaders = [Loader(Stub(n), n_batch, 0, accumulate, (rank, world)) for rank in range(world)]
    steps = [loader.steps() for loader in loaders]
    assert {len(mine) for mine in steps} == {len(loaders[0])} == {-(-n // n_batch)}
    assert all(len(pieces) == accumulate for mine in steps for pieces in mine)
    for i, whole in enumerate(Loader(Stub(n), n_batch, 0).steps()):
        pieces = [piece for mine in steps for piece in mine[i]]
        assert [place for piece in pieces if piece.n for place in piece.positions] == list(whole[0].positions)
        assert sum(piece.n for piece in pieces) == whole[0].n == pieces[0].n_step
        counts = [piece.n for piece in pieces]
        assert max(counts) - min(counts) <= 1
        assert all(len(piece.positions) == max(piece.n, 1) for piece in pieces)


@pytest.mark.parametrize("n_worker", [0, 2])
def test_parts_hold_the_items_that_one_process_has(folder, records, n_worker):
    dataset = build(folder, records)
    whole = list(Loader(dataset, 4, 0).epoch(2))
    parts = [iter(list(Loader(dataset, 4, n_worker, 2, (rank, 2)).epoch(2))) for rank in (0, 1)]
    for batch in whole[:1]:  # the second step is short
        images = torch.cat([next(mine)["image"] for mine in parts for _ in range(2)])
        assert torch.equal(images, batch["image"])


def test_a_step_has_an_image_for_each_part():
    Loader(Stub(9), 4, 0, 2, (0, 2))
    with pytest.raises(ValueError, match=r"n_batch = 3: wanted at least 4, an image for each of 2 processes, 2 times"):
        Loader(Stub(9), 3, 0, 2, (0, 2))


@pytest.mark.gpu
def test_batches_are_pinned_for_a_gpu(folder, records):
    (batch,) = Loader(build(folder, records), len(records), 1, pin=True).epoch(0)
    assert all(value.is_pinned() for value in batch.values())
