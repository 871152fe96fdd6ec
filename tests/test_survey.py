"""The survey room: numbers of hand-made images, and of real files' opacity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image import Cache
from record import Record, find_records
from survey import COLUMNS, alpha_lines, channel_statistics, series, survey, table
from synthetic import write_dataset


def write(folder: Path, name: str, array: np.ndarray, kind: str = "", masks=None) -> Record:
    Image.fromarray(array).save(folder / f"{name}.png")
    return Record(name, folder / f"{name}.png", masks, sub_category=kind)


def test_mean_and_std_are_over_all_pixels(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (h, 30, 3), np.uint8) for h in (10, 40)]
    records = [write(tmp_path, f"{i}", array) for i, array in enumerate(arrays)]
    mean, std = channel_statistics(survey(records, Cache(tmp_path / "cache")).measures)
    pixels = np.concatenate([array.reshape(-1, 3) for array in arrays]) / 255
    assert mean == pytest.approx(pixels.mean(0)) and std == pytest.approx(pixels.std(0))


def test_no_image_has_no_mean(tmp_path):
    with pytest.raises(ValueError, match="no image"):
        channel_statistics([])


def test_nuclei_are_counted_and_measured_by_kind(tmp_path):
    labels = np.zeros((20, 30), np.uint8)
    labels[2:4, 2:4], labels[10:14, 10:15] = 3, 9
    Image.fromarray(labels).save(tmp_path / "labels.png")
    gray = np.full((20, 30), 51, np.uint8)
    records = [write(tmp_path, "a", gray, "Dim", tmp_path / "labels.png"), write(tmp_path, "b", gray, "Bright")]
    result = survey(records, Cache(tmp_path / "cache"))
    bright, dim, both = (dict(zip(COLUMNS, row, strict=True)) for row in table(result))
    assert dim["kind"] == "Dim" and dim["nuclei"] == "2" and dim["an image"] == "2" and dim["area"] == "12"
    assert dim["cover"] == "4 %" and dim["red"] == "0.20 (0.00)" and dim["height x width"] == "20 x 30"
    assert bright["nuclei"] == "-" and both["images"] == "2" and both["nuclei"] == "2"
    assert list(series(result)["area of a nucleus (pixels)"]) == ["Dim"]


def test_opacity_is_told(tmp_path):
    array = np.full((10, 10, 4), 255, np.uint8)
    array[:5, :, 3] = 40
    records = [write(tmp_path, "clear", array), write(tmp_path, "plain", array[..., 0])]
    stored, alpha = alpha_lines(survey(records, Cache(tmp_path / "cache")).measures)
    assert stored == "stored as: uint8 x 4 in 1, uint8 x 1 in 1"
    assert alpha == (
        "alpha: in 1 images, opaque everywhere in 0; least value 40, 50.00 % of an image opaque in the mean"
    )


def test_images_that_cannot_be_read_are_named(tmp_path):
    write_dataset(tmp_path / "set", 2, shape=(32, 32))
    records = find_records(tmp_path / "set")
    records[0].image.write_bytes(b"broken")
    result = survey(records, Cache(tmp_path / "cache"))
    assert len(result.measures) == 1 and len(result.refused) == 1 and records[0].id in result.refused[0]
