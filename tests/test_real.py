"""What must hold on real images; without NUCLEI_DATA these tests skip."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from annotation import encode_rle
from benchmarks import plain
from config import load_config
from metric import THRESHOLDS, average_precision
from postprocess import instances
from record import Record, find_records
from target import make_targets, plan_targets

pytestmark = pytest.mark.data
N_IMAGES = 12


@pytest.fixture(scope="module")
def label_maps(nuclei_data: Path, tmp_path_factory) -> dict[str, np.ndarray]:
    """Label maps of some validation images, of every kind."""
    from image import read_image, read_labels

    folder = tmp_path_factory.mktemp("real")
    with open(nuclei_data / "dataset.csv", newline="") as file:
        kinds = {row["image_id"]: row["sub_category"] for row in csv.DictReader(file)}
    ids = sorted((nuclei_data / "valid_ids.txt").read_text().split(), key=lambda i: (kinds[i], i))
    chosen = set(ids[:: len(ids) // N_IMAGES])
    with zipfile.ZipFile(nuclei_data / "stage1_train.zip") as archive:
        for name in archive.namelist():
            if chosen & set(name.split("/")):
                archive.extract(name, folder)

    def labels_of(record: Record) -> np.ndarray:
        assert record.masks is not None
        return read_labels(record.masks, read_image(record.image).shape[:2])

    return {record.id: labels_of(record) for record in find_records(next(folder.iterdir()))}


def test_every_kind_is_there(label_maps):
    assert len(label_maps) >= N_IMAGES and all(labels.max() > 0 for labels in label_maps.values())


def test_run_lengths_decode_to_the_same_label_maps(label_maps):
    for image_id, labels in label_maps.items():
        decoded = np.zeros(labels.size, np.int32)
        for label, run in enumerate(encode_rle(labels), start=1):
            numbers = np.array(run.split(), int)
            for start, length in zip(numbers[::2], numbers[1::2], strict=True):
                assert not decoded[start - 1 : start - 1 + length].any()
                decoded[start - 1 : start - 1 + length] = label
        assert np.array_equal(decoded.reshape(labels.shape[::-1]).T, labels), image_id


def test_the_metric_is_the_competitions(label_maps):
    rng = np.random.default_rng(0)
    for labels in label_maps.values():
        labels = labels[:128, :128]
        shifted = np.roll(labels, (1, 2), (0, 1))
        keep = rng.random(labels.max() + 1) < 0.8
        pred = np.where(keep[shifted], shifted, 0)
        assert average_precision(labels, pred).tolist() == plain.average_precision(labels, pred, THRESHOLDS)


@pytest.mark.parametrize("policy", ["ws", "rw"])
@pytest.mark.parametrize("marker", ["marker", "contour"])
def test_perfect_maps_give_the_nuclei_back(label_maps, policy, marker):
    config = load_config(overrides=[f"post.policy={policy}", f"post.marker={marker}"])
    plan = plan_targets(("semantic", "contour", "marker"), config.pre, config.contour)
    every = config.post.model_copy(update={"min_object_share": 0.0})
    scores: dict[str, list[float]] = {"every nucleus": [], "without specks": []}
    for labels in label_maps.values():
        probs = {head: value[0] for head, value in make_targets(labels, plan).items()}
        for post, found in zip((every, config.post), scores.values(), strict=True):
            found.append(average_precision(labels, instances(probs, post, config.thresholds)).mean())
    assert np.mean(scores["every nucleus"]) > 0.93
    assert np.mean(scores["without specks"]) > 0.9  # some true nuclei are small beside their neighbours


@pytest.fixture(scope="module")
def tiles(nuclei_data: Path, tmp_path_factory) -> Path:
    """Two tissue tiles with their Aperio outlines."""
    folder = tmp_path_factory.mktemp("tiles")
    with zipfile.ZipFile(nuclei_data / "tcga_train.zip") as archive:
        for name in archive.namelist():
            if "A7-A13E" in name or "E2-A1B5" in name:
                (folder / Path(name).name).write_bytes(archive.read(name))
    return folder


def test_outlines_sit_on_nuclei(tiles):
    from image import read_image
    from outline import draw, read_outlines

    for path in sorted(tiles.glob("*.xml")):
        image = read_image(path.with_suffix(".tif")).mean(axis=2)
        outlines = read_outlines(path)[path.stem].outlines
        labels, refused = draw(outlines, image.shape)
        assert labels.max() == len(outlines) - len(refused) and len(refused) <= 1
        # Nuclei are darker than what is around them, and less so for a map that was moved by a few pixels.
        contrast = {shift: image[moved == 0].mean() - image[moved > 0].mean() for shift, moved in shifted(labels)}
        assert max(contrast, key=contrast.__getitem__) == (0, 0) and contrast[0, 0] > 40


def shifted(labels: np.ndarray):
    for shift in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)):
        yield shift, np.roll(labels, shift, (0, 1))


def test_every_form_of_outlines_gives_the_same_nuclei(tiles, tmp_path):
    from outline import draw, read_outlines

    path = next(iter(sorted(tiles.glob("*A13E*.xml"))))
    outlines = read_outlines(path)[path.stem].outlines
    rings = [outline.parts[0][0] for outline in outlines]
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[*ring.tolist(), ring[0].tolist()]]}}
        for ring in rings
    ]
    items = [{"image_id": 1, "id": i, "segmentation": [ring.ravel().tolist()]} for i, ring in enumerate(rings)]
    image = {"id": 1, "file_name": f"{path.stem}.tif", "height": 1000, "width": 1000}
    (tmp_path / f"{path.stem}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (tmp_path / "coco.json").write_text(json.dumps({"images": [image], "annotations": items}))
    wanted = draw(outlines, (1000, 1000))[0]
    for file in tmp_path.iterdir():
        (annotation,) = read_outlines(file).values()
        assert np.array_equal(draw(annotation.outlines, (1000, 1000))[0], wanted)


def test_tiles_find_what_the_whole_image_gives(nuclei_data, tmp_path):
    """Images of about a megapixel; the shipped weights, at the zoom that suits the nuclei."""
    from helper import DEFAULT_WEIGHTS
    from image import read_image
    from labels import overlap_table
    from predict import load_segmenter

    settings = ("valid.test_time_augment=none", "train.device=cpu")
    whole = load_segmenter([DEFAULT_WEIGHTS], load_config(None, [*settings, "valid.tile=0"], tmp_path))
    tiles = load_segmenter([DEFAULT_WEIGHTS], load_config(None, [*settings, "valid.tile=640"], tmp_path))
    found = n_nuclei = 0
    with zipfile.ZipFile(nuclei_data / "stage1_train.zip") as archive:
        names = sorted(name for name in archive.namelist() if "/images/" in name and name.endswith(".png"))
        large = [name for name in names if archive.getinfo(name).file_size > 400_000]
        images = (read_image(archive.extract(name, tmp_path), *whole.config.pre.policy) for name in large)
        chosen = [image for image, _ in zip((i for i in images if min(i.shape[:2]) >= 1000), range(3), strict=False)]
    for image in chosen:
        table = overlap_table(whole(image[:1024, :1024]), tiles(image[:1024, :1024]))
        union = table.sum(1)[1:, None] + table.sum(0)[1:] - table[1:, 1:]
        found += int((table[1:, 1:] >= 0.9 * union).any(1).sum())
        n_nuclei += len(table) - 1
    assert n_nuclei > 100 and found >= 0.99 * n_nuclei
