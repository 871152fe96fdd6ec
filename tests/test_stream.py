"""The stream room: block by block every nucleus once, and the same files however often a run is cut off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr

import stream
from candidate import FEATURES
from confidence import Opinion
from config import Config, Contour, Post
from labels import relabel, split_fragments
from outline import draw, read_outlines
from postprocess import Separation
from predict import Segmenter
from slide import open_slide
from stream import CHUNK, Ledger, finish_files, run_blocks, segment_slide
from tile import Window, cut_blocks

SHAPE = (300, 420)
SIDE, HALO = 128, 16


class Cut(Exception):
    """A run that ends in its middle."""


class Bright(torch.nn.Module):
    """Sees what is bright."""

    stride, heads, active = 4, ("semantic",), ("semantic",)

    def forward(self, image):
        return {"semantic": image.float().mean(1, keepdim=True) / 16 - 8}


def scene(n: int = 60) -> np.ndarray:
    """Nuclei on the corners and borders of blocks, and one longer than the halo."""
    labels, (y, x) = np.zeros(SHAPE, np.int32), np.indices(SHAPE)
    centers = [(128, 128), (256, 128), (128, 300), (40, 128), (128, 40), (0, 0), (299, 419)]
    for cy, cx in centers + np.random.default_rng(1).integers(0, SHAPE, (n, 2)).tolist():
        distance = np.hypot(y - cy, x - cx)
        if not labels[distance <= 10].any():
            labels[distance <= 7] = labels.max() + 1
    labels[200:206, 90:170] = labels.max() + 1  # twice as long as the first halo, over a border
    return split_fragments(labels)


def write(path: Path, truth: np.ndarray) -> Path:
    image = np.where(truth > 0, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb")
    return path


class Large(Opinion):
    """Thinks well of what is not small beside the others."""

    def judge(self, features):
        return (features[:, FEATURES.index("relative_area")] > 0.5).astype(np.float32)


def segmenter(diameter: float = 0, opinion: Opinion | None = None, **valid) -> Segmenter:
    settings = {"test_time_augment": (), "border": 8, "tile": 96, "tile_overlap": 16}
    settings |= {"slide_block": SIDE, "slide_halo": HALO, **valid}
    rules = {"pre": {"nucleus_diameter": diameter}, "post": {"segmentation": opinion is not None}}
    config = Config.model_validate({"valid": settings, **rules})
    return Segmenter([Bright()], config, torch.device("cpu"), torch.float32, opinion=opinion)


def run(folder: Path, path: Path, **options) -> stream.Outcome:
    network = segmenter(**options)
    return segment_slide(open_slide(path, network.config.pre.policy), network, folder, "a")


def ledger(folder: Path, shape=SHAPE) -> Ledger:
    folder.mkdir(exist_ok=True)
    return Ledger(folder, shape)


def same_nuclei(found: np.ndarray, truth: np.ndarray) -> bool:
    pairs = np.unique(np.stack([found.ravel(), truth.ravel()]), axis=1)
    return pairs.shape[1] == truth.max() + 1 == found.max() + 1


def test_every_nucleus_once_as_in_memory(tmp_path):
    truth = scene()
    path = write(tmp_path / "a.tif", truth)
    outcome = run(tmp_path / "out", path)
    found = tifffile.imread(outcome.files[0])
    expected = segmenter()(tifffile.imread(path))
    assert found.dtype == np.uint32
    assert outcome.nuclei == expected.max() == truth.max()
    assert same_nuclei(found, truth) and same_nuclei(found, expected)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a_labels.tif", "a_nuclei.geojson"]


def test_a_slide_is_brought_to_size_as_an_image_is(tmp_path):
    truth = scene()
    path = write(tmp_path / "a.tif", truth)
    network = segmenter(diameter=28)
    assert network.look(tifffile.imread(path))[0] == 2
    plan = stream.make_plan(open_slide(path), network, tmp_path / "plan", "key")
    assert plan["zoom"] == "2"
    found = tifffile.imread(run(tmp_path, path, diameter=28).files[0])
    assert same_nuclei(found, network(tifffile.imread(path)))


def test_a_slide_whose_zoom_promises_far_less_stays_as_it_is(tmp_path, monkeypatch):
    slide = open_slide(write(tmp_path / "a.tif", scene()))
    separate = Segmenter.separate
    monkeypatch.setattr(Segmenter, "separate", lambda self, probs: separate(self, probs)._replace(promise=1.0))
    for least, zoom in [(0.9, "2"), (1.1, "1")]:  # a sample promises as much at either size
        monkeypatch.setattr("predict.LEAST_KEPT", least)
        plan = stream.make_plan(slide, segmenter(28, Large()), tmp_path / zoom, "key")
        assert plan["zoom"] == zoom


def test_an_opinion_sees_a_block_against_the_whole_slide(tmp_path, monkeypatch):
    """A speck is all that its block holds, and is still a speck."""
    monkeypatch.setattr("mosaic.PROBE", 64)  # so that several samples fit into a small slide
    truth, (y, x) = np.zeros(SHAPE, np.int32), np.indices(SHAPE)
    for number, (cy, cx, r) in enumerate([(30, 30, 8), (90, 60, 8), (60, 100, 8), (280, 400, 4)], start=1):
        truth[np.hypot(y - cy, x - cx) <= r] = number
    path = write(tmp_path / "a.tif", truth)
    outcome = run(tmp_path, path, opinion=Large())
    assert same_nuclei(tifffile.imread(outcome.files[0]), np.where(truth == 4, 0, truth))
    assert segmenter(opinion=Large())(tifffile.imread(path)).max() == outcome.nuclei == 3


def test_the_outlines_are_those_of_the_labels(tmp_path):
    outcome = run(tmp_path, write(tmp_path / "a.tif", scene()))
    content = json.loads(outcome.files[1].read_text())
    assert [feature["properties"]["name"] for feature in content["features"]] == [
        str(n) for n in range(1, outcome.nuclei + 1)
    ]
    (annotation,) = read_outlines(outcome.files[1]).values()
    drawn, refused = draw(annotation.outlines, SHAPE)
    assert not annotation.refused and not refused
    assert np.array_equal(drawn, tifffile.imread(outcome.files[0]))


def test_the_label_map_is_tiled_and_large(tmp_path):
    outcome = run(tmp_path, write(tmp_path / "a.tif", scene()))
    with tifffile.TiffFile(outcome.files[0]) as file:
        assert file.is_bigtiff and file.pages.first.is_tiled and file.pages.first.tile == (CHUNK, CHUNK)
    outcome = run(tmp_path, tmp_path / "a.tif", slide_labels="zarr")
    written = zarr.open_array(str(outcome.files[0]), mode="r")
    assert np.array_equal(written[:], tifffile.imread(tmp_path / "a_labels.tif"))


@pytest.mark.parametrize("labels", ["tif", "zarr"])
@pytest.mark.parametrize("where", ["tile", "note", "enter", "finish", "last"])
def test_a_run_that_is_cut_off_ends_the_same(where, labels, tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", scene())
    whole = run(tmp_path / "whole", path, slide_labels=labels)
    for count in (0, 4):
        out = tmp_path / f"{count}"
        with monkeypatch.context() as patch:
            cut_off(patch, where, count)
            if where in ("finish", "last") and count:
                continue
            with pytest.raises(Cut):
                run(out, path, slide_labels=labels)
        assert (out / "a_part" / "plan.json").is_file()
        again = run(out, path, slide_labels=labels)
        assert again.nuclei == whole.nuclei
        n_done = {"note": count, "enter": count + 1, "finish": again.blocks, "last": again.blocks}
        assert where == "tile" or again.done == n_done[where]
        assert again.files[1].read_bytes() == whole.files[1].read_bytes()
        assert np.array_equal(read(again.files[0]), read(whole.files[0]))
        assert not (out / "a_part").exists()


def read(path: Path) -> np.ndarray:
    return zarr.open_array(str(path), mode="r")[:] if path.suffix == ".zarr" else tifffile.imread(path)


def cut_off(patch, where: str, count: int) -> None:
    """End a run in a tile, before a block is noted, in the middle of entering it, before or after the results."""
    calls = {"tile": 0, "commit": 0, "enter": 0}

    def counted(name, call):
        def wrapped(*args, **options):
            calls[name] += 1
            if calls[name] > count:
                raise Cut
            return call(*args, **options)

        return wrapped

    def half(self, block):
        calls["enter"] += 1
        if calls["enter"] > count:
            (top, bottom), (left, right) = block["window"].tolist()
            rows = slice(top, (top + bottom) // 2)  # half of the labels, and more than half of the outlines
            there, own = self.labels[rows, left:right], block["own"][: rows.stop - top]
            self.labels[rows, left:right] = np.where(own > 0, own + np.uint32(self.nuclei), there)
            with (self.folder / "nuclei.geojson").open("ab") as file:
                file.write(b'{"half": ')
            raise Cut
        return enter(self, block)

    enter = Ledger._enter
    if where == "tile":
        patch.setattr("mosaic.Mosaic.tile", counted("tile", stream.Mosaic.tile))
    elif where == "note":
        patch.setattr(Ledger, "commit", counted("commit", Ledger.commit))
    elif where == "enter":
        patch.setattr(Ledger, "_enter", half)
    elif where == "finish":
        patch.setattr(stream, "finish_files", counted("tile", finish_files))
    else:
        patch.setattr("shutil.rmtree", counted("tile", None))


def test_each_tile_is_computed_once(tmp_path, monkeypatch):
    path, indices, tile = write(tmp_path / "a.tif", scene()), [], stream.Mosaic.tile

    def counting(self, index):
        indices.append(index)
        return tile(self, index)

    run(tmp_path / "one", path)  # the first look goes over tiles of its own
    monkeypatch.setattr(stream.Segmenter, "zoom_of", lambda self, read, shape: (1.0, np.zeros((1, 1), np.int32)))
    monkeypatch.setattr("mosaic.Mosaic.tile", counting)
    run(tmp_path / "two", path)
    assert len(indices) == len(set(indices)) > 9


def test_a_finished_run_is_not_done_again(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", scene())
    first = run(tmp_path, path)
    monkeypatch.setattr(stream, "run_blocks", None)
    again = run(tmp_path, path)
    assert (again.nuclei, again.files, again.done) == (first.nuclei, first.files, first.blocks)


def test_other_settings_do_not_go_on_with_a_run(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", scene())
    with monkeypatch.context() as patch:
        cut_off(patch, "note", 2)
        with pytest.raises(Cut):
            run(tmp_path, path)
    with pytest.raises(ValueError, match="a_part: an unfinished run"):
        run(tmp_path, path, slide_block=64)


def test_settings_that_change_no_nucleus_do_not_matter(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", scene())
    with monkeypatch.context() as patch:
        cut_off(patch, "note", 2)
        with pytest.raises(Cut):
            run(tmp_path, path)
    assert run(tmp_path, path, print_table=True, figure_pos_x=3, slide_size=2, slide_labels="zarr").done == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda network: {"opinion": Large()},
        lambda network: {"config": network.config.model_copy(update={"contour": Contour(detect=False)})},
        lambda network: {"config": network.config.model_copy(update={"post": Post(grow=1)})},
        lambda network: {"fingerprint": "other"},
    ],
)
def test_a_run_is_known_by_what_changes_nuclei(other, tmp_path):
    slide, network = open_slide(write(tmp_path / "a.tif", scene())), segmenter()
    assert stream.identify(slide, network) != stream.identify(slide, replace(network, **other(network)))
    assert stream.identify(slide, network) == stream.identify(slide, segmenter())


def test_opinions_are_told_apart_by_all_they_say(tmp_path):
    """Their sums may be the same, and what they were taught to expect is no parameter."""
    slide, one = open_slide(write(tmp_path / "a.tif", scene())), Opinion()
    two = Opinion.load(one.state_dict())
    two.mean += 1
    assert stream.identify(slide, segmenter(opinion=one)) != stream.identify(slide, segmenter(opinion=two))


def test_a_folder_of_others_stays(tmp_path):
    path = write(tmp_path / "a.tif", scene())
    (tmp_path / "a_part" / "tiles").mkdir(parents=True)
    (tmp_path / "a_part" / "tiles" / "0-0.npz").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="a_part: is there, and is no unfinished run"):
        run(tmp_path, path)
    (tmp_path / "a_part" / "plan.json").write_text('{"key": "of another program"}')
    with pytest.raises(FileExistsError, match="a_part"):
        run(tmp_path, path)
    assert (tmp_path / "a_part" / "tiles" / "0-0.npz").read_bytes() == b"mine"
    assert len(list((tmp_path / "a_part").rglob("*"))) == 3


def test_results_of_some_settings_leave_the_unfinished_run_of_others(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", scene())
    first = run(tmp_path, path)
    with monkeypatch.context() as patch:
        cut_off(patch, "note", 3)
        with pytest.raises(Cut):
            run(tmp_path, path, slide_block=64)
    assert run(tmp_path, path).done == first.blocks
    assert run(tmp_path, path, slide_block=64).done == 3


def test_results_of_two_runs_are_not_taken_for_one(tmp_path, monkeypatch):
    """The outlines of the second are there, its label map is not."""
    path = write(tmp_path / "a.tif", scene())
    run(tmp_path, path)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_cut_tiles", lambda labels: iter([np.zeros((CHUNK, CHUNK), np.uint32), 1 / 0]))
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, path, slide_block=64)
    with pytest.raises(ValueError, match="an unfinished run"):
        run(tmp_path, path)
    again = run(tmp_path, path, slide_block=64)
    assert again.done == again.blocks
    assert json.loads(again.files[1].read_text())["key"] == stream.read_note(again.files[0])["key"]


def test_one_run_at_a_time(tmp_path):
    path = write(tmp_path / "a.tif", scene())
    with stream.alone(tmp_path / "a_part"), pytest.raises(ValueError, match="another run is at work"):
        run(tmp_path, path)
    assert run(tmp_path, path).nuclei


def test_half_a_tile_is_computed_again(tmp_path):
    network = segmenter()
    slide = open_slide(write(tmp_path / "a.tif", scene()))
    files = stream.TileFiles(tmp_path / "tiles", network.mosaic(slide.read, slide.shape, 1.0))
    (expected,) = files.get((0, 0))
    path = tmp_path / "tiles" / "0-0.npz"
    for broken in (path.read_bytes()[:500], b"", b"\0" * 500):
        path.write_bytes(broken)
        (found,) = files.get((0, 0))
        assert np.array_equal(found["semantic"], expected["semantic"])


@pytest.mark.parametrize("name", ["a_labels.tif", "a_nuclei.geojson"])
def test_files_of_others_stay(name, tmp_path):
    path = write(tmp_path / "a.tif", scene())
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=name):
        run(tmp_path, path)
    assert (tmp_path / name).read_bytes() == b"mine"


def test_more_nuclei_than_sixteen_bits_can_count(tmp_path):
    shape = (1100, 1100)

    def separate(window: Window) -> Separation:
        y, x = np.indices(window.shape)
        y, x = y + window.rows.start, x + window.columns.start
        numbers = np.where((y % 4 < 3) & (x % 4 < 3), (y // 4) * 275 + x // 4 + 1, 0)
        return Separation(relabel(numbers), np.unique(numbers[numbers > 0]).astype(np.float32) % 1000 / 1000)

    book = ledger(tmp_path / "part", shape)
    assert run_blocks(book, separate, 512, 8) == 9
    assert book.nuclei == 275 * 275 > 65_535
    finish_files(book, tmp_path / "a.tif", tmp_path / "a.geojson", {})
    labels = tifffile.imread(tmp_path / "a.tif")
    assert labels.max() == 275 * 275
    assert (np.bincount(labels.ravel())[1:] == 9).all()
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert len(features) == 275 * 275
    corners = np.array([np.min(feature["geometry"]["coordinates"][0], axis=0) for feature in features])
    numbers = corners[:, 1] // 4 * 275 + corners[:, 0] // 4 + 1
    expected = [feature["properties"]["measurements"]["expected quality"] for feature in features]
    assert expected == pytest.approx(numbers % 1000 / 1000)  # each has its own, whatever block it was entered with


def test_a_slide_without_nuclei(tmp_path):
    outcome = run(tmp_path, write(tmp_path / "a.tif", np.zeros(SHAPE, np.int32)))
    assert outcome.nuclei == 0
    assert not tifffile.imread(outcome.files[0]).any()
    assert json.loads(outcome.files[1].read_text())["features"] == []


def test_old_tiles_go(tmp_path):
    network = segmenter()
    slide = open_slide(write(tmp_path / "a.tif", scene()))
    files = stream.TileFiles(tmp_path / "tiles", network.mosaic(slide.read, slide.shape, 1.0))
    for core in cut_blocks(SHAPE, SIDE):
        files.prepare(core)
    n_before = len(list((tmp_path / "tiles").iterdir()))
    files.forget(128)
    left = [path.stem for path in (tmp_path / "tiles").iterdir()]
    assert 0 < len(left) < n_before
    assert all(files.mosaic.strips[0][int(name.split("-")[0])].target.stop > 128 for name in left)


def test_a_detector_streams_too(tmp_path, monkeypatch):
    from model import build_model

    model = build_model("maskrcnn").eval()

    def instances(image, score, threshold):
        labels = torch.from_numpy(split_fragments((image[0] > 128).int().numpy()))
        return labels, labels.clamp(max=1) * 0.9

    monkeypatch.setattr(model, "instances", instances)
    truth = scene()
    path, config = write(tmp_path / "a.tif", truth), segmenter().config
    detector = Segmenter([model], config, torch.device("cpu"), torch.float32)
    outcome = segment_slide(open_slide(path, config.pre.policy), detector, tmp_path, "a")
    assert outcome.nuclei == truth.max()
    assert same_nuclei(tifffile.imread(outcome.files[0]), truth)
