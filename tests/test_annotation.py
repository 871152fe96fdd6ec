from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

import annotation
from benchmarks import plain


def scattered(n_nuclei: int, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Rectangles that cover each other and the border, numbered 1..N."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int64)
    for number in range(1, n_nuclei + 1):
        y, x, height, width = *rng.integers(-3, shape, 2), *rng.integers(2, 9, 2)
        labels[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = number
    return np.unique(np.append(labels, 0), return_inverse=True)[1][:-1].reshape(shape).astype(np.int32)


ONE_PIXEL = np.zeros((5, 7), np.int32)
ONE_PIXEL[4, 6] = 1
MAPS = {
    "none": np.zeros((5, 7), np.int32),
    "one pixel": ONE_PIXEL,
    "full": np.ones((4, 6), np.int32),
    "touching pair": np.array([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0]], np.int32),
    "scattered": scattered(40, (37, 52), seed=0),
    "noise": np.random.default_rng(1).integers(0, 9, (23, 31)).astype(np.int32),
    "over 255": np.arange(20 * 30, dtype=np.int32).reshape(20, 30) // 2,
}
every_map = pytest.mark.parametrize("labels", MAPS.values(), ids=MAPS.keys())


def plain_decode(text: str, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    words = [int(word) for word in text.split()]
    for start, length in zip(words[::2], words[1::2], strict=True):
        for place in range(start - 1, start - 1 + length):
            mask[place % shape[0], place // shape[0]] = True
    return mask


# run lengths


def test_encode_rle_by_hand() -> None:
    labels = np.array([[0, 2, 2, 0], [1, 2, 0, 0], [1, 0, 0, 1]])
    assert annotation.encode_rle(labels) == ["2 2 12 1", "4 2 7 1"]


def test_encode_rle_runs_on_into_the_next_column() -> None:
    assert annotation.encode_rle(np.array([[0, 1], [1, 0], [1, 0]])) == ["2 3"]


def test_encode_rle_goes_by_id_and_skips_gaps() -> None:
    assert annotation.encode_rle(np.array([[70, 0, 5]])) == ["3 1", "1 1"]


@every_map
def test_encode_rle_equals_one_scan_per_nucleus(labels: np.ndarray) -> None:
    runs = annotation.encode_rle(labels)
    assert runs == [plain.encode_mask(labels == number) for number in range(1, labels.max() + 1)]
    assert runs == plain.scan_masks(labels)
    for number, text in enumerate(runs, start=1):
        assert np.array_equal(plain_decode(text, labels.shape), labels == number)


@every_map
def test_rle_round_trip_is_exact(labels: np.ndarray) -> None:
    drawn = annotation.decode_rle(annotation.encode_rle(labels), labels.shape)
    assert drawn.dtype == np.int32
    assert drawn.flags.c_contiguous
    assert np.array_equal(drawn, labels)


def test_decode_rle_takes_runs_in_any_order() -> None:
    assert annotation.decode_rle(["5 2 1 1", "2 1"], (3, 2)).tolist() == [[1, 0], [2, 1], [0, 1]]


@pytest.mark.parametrize(
    ("runs", "fact"),
    [
        (["1 1", "2 1 5"], "string 2: 3 words"),
        (["1 1", " "], "string 2: 0 words"),
        (["1 two"], "string 1: .*two"),
        (["1 99999999999999999999"], "string 1"),
        (["0 1"], "string 1: run 0 1 .* 1 to 6"),
        (["3 0"], "string 1: run 3 0"),
        (["2 -1"], "string 1: run 2 -1"),
        (["1 1 6 2"], "string 1: run 6 2 .* 1 to 6"),
        (["1 3", "5 1", "3 1"], "strings 1 and 3 overlap at pixel 3"),
        (["1 3 2 1"], "strings 1 and 1 overlap at pixel 2"),
    ],
)
def test_decode_rle_refuses(runs: list[str], fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        annotation.decode_rle(runs, (2, 3))


# CSV


def test_write_csv_is_the_competition_s(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.csv"
    annotation.write_csv(path, [("b", MAPS["touching pair"]), ("a", MAPS["none"]), ("c", ONE_PIXEL)])
    assert path.read_bytes() == b"ImageId,EncodedPixels\nb,1 2 4 2\nb,7 2 10 2\na,\nc,35 1\n"
    assert os.listdir(path.parent) == ["result.csv"]


def test_csv_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "result.csv"
    annotation.write_csv(path, MAPS.items())
    found = annotation.read_csv(path)
    assert list(found) == list(MAPS)
    assert found["none"] == []
    for image_id, labels in MAPS.items():
        assert np.array_equal(annotation.decode_rle(found[image_id], labels.shape), labels)
    with path.open(newline="") as file:
        assert len(list(csv.reader(file))) == 1 + sum(max(labels.max(), 1) for labels in MAPS.values())


def test_write_csv_without_images_has_its_header(tmp_path: Path) -> None:
    annotation.write_csv(tmp_path / "result.csv", [])
    assert annotation.read_csv(tmp_path / "result.csv") == {}


def test_write_csv_leaves_the_earlier_file_when_cut_off(tmp_path: Path) -> None:
    def results() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", ONE_PIXEL
        raise KeyboardInterrupt

    path = tmp_path / "result.csv"
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        annotation.write_csv(path, results())
    with pytest.raises(ValueError, match="image a comes twice"):
        annotation.write_csv(path, [("a", ONE_PIXEL), ("a", ONE_PIXEL)])
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["result.csv"]


def test_read_csv_takes_other_columns_orders_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "result.csv"
    path.write_text("ImageId,Score,EncodedPixels\r\na,1,1 1\r\nb,1,\r\na,1,3 1\r\n", encoding="utf-8-sig")
    assert annotation.read_csv(path) == {"a": ["1 1", "3 1"], "b": []}


@pytest.mark.parametrize(
    ("text", "fact"),
    [("", "columns None"), ("id,EncodedPixels\n", "'id'"), ("ImageId,EncodedPixels\na,\nb\n", "line 3")],
)
def test_read_csv_refuses(tmp_path: Path, text: str, fact: str) -> None:
    path = tmp_path / "result.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=fact):
        annotation.read_csv(path)
    with pytest.raises(FileNotFoundError):
        annotation.read_csv(tmp_path / "missing.csv")


# masks


@every_map
def test_masks_round_trip(tmp_path: Path, labels: np.ndarray) -> None:
    annotation.write_masks(tmp_path / "image", labels)
    names = sorted(os.listdir(tmp_path / "image" / "masks"))
    assert names == [f"{number:04d}.png" for number in range(1, labels.max() + 1)]
    for number, name in enumerate(names, start=1):
        with Image.open(tmp_path / "image" / "masks" / name) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), np.where(labels == number, 255, 0))
    drawn = annotation.read_masks(tmp_path / "image", labels.shape)
    assert drawn.dtype == np.int32
    assert np.array_equal(drawn, labels)


def test_write_masks_replaces_its_own_and_spares_others(tmp_path: Path) -> None:
    annotation.write_masks(tmp_path, MAPS["scattered"])
    annotation.write_masks(tmp_path, ONE_PIXEL)
    assert os.listdir(tmp_path) == ["masks"]
    assert os.listdir(tmp_path / "masks") == ["0001.png"]
    (tmp_path / "masks" / "0a7d53.png").write_bytes(b"")
    with pytest.raises(FileExistsError, match="0a7d53.png"):
        annotation.write_masks(tmp_path, MAPS["scattered"])
    assert sorted(os.listdir(tmp_path / "masks")) == ["0001.png", "0a7d53.png"]


def test_write_masks_keeps_the_order_of_very_many(tmp_path: Path) -> None:
    labels = np.zeros((1, 10_000), np.int32)
    labels[0] = np.arange(10_000, 0, -1)
    annotation.write_masks(tmp_path, labels)
    assert sorted(os.listdir(tmp_path / "masks"))[::9_999] == ["00001.png", "10000.png"]
    assert np.array_equal(annotation.read_masks(tmp_path, labels.shape), labels)


def test_read_masks_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="masks"):
        annotation.read_masks(tmp_path, (5, 7))
    path = tmp_path / "masks" / "x.png"
    annotation.write_masks(tmp_path, ONE_PIXEL)
    for image, fact in (
        (np.ones((7, 5), np.uint8), r"\(7, 5\).*\(5, 7\)"),
        (np.zeros((5, 7), np.uint8), "no nucleus"),
        (np.ones((5, 7), np.uint8), "shares 1 pixels"),
    ):
        cv2.imwrite(str(path), image)
        with pytest.raises(ValueError, match=f"x.png: .*{fact}"):
            annotation.read_masks(tmp_path, (5, 7))
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="x.png"):
        annotation.read_masks(tmp_path, (5, 7))


# label maps


@every_map
def test_label_map_round_trip(tmp_path: Path, labels: np.ndarray) -> None:
    path = tmp_path / "new" / "a.tif"
    annotation.write_label_map(path, labels)
    assert os.listdir(path.parent) == ["a.tif"]
    with tifffile.TiffFile(path) as file:
        assert len(file.pages) == 1
        assert file.pages[0].dtype == np.uint16
        assert file.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), labels)
    drawn = annotation.read_label_map(path)
    assert drawn.dtype == np.int32
    assert np.array_equal(drawn, labels)


@pytest.mark.parametrize(("highest", "dtype"), [(65535, "uint16"), (65536, "int32"), (2**31 - 1, "int32")])
def test_label_map_keeps_ids_of_any_size(tmp_path: Path, highest: int, dtype: str) -> None:
    labels = np.array([[0, 3], [highest, 0]])
    annotation.write_label_map(tmp_path / "a.tif", labels)
    assert tifffile.imread(tmp_path / "a.tif").dtype == dtype
    assert np.array_equal(annotation.read_label_map(tmp_path / "a.tif"), labels)


@pytest.mark.parametrize(
    ("labels", "fact"),
    [
        (np.array([[-1, 0]]), "from -1 to 0"),
        (np.array([[2**31, 0]]), "2147483648"),
        (np.zeros((2, 3, 3), np.uint8), r"\(2, 3, 3\)"),
        (np.zeros((2, 3), np.float32), "float32"),
    ],
)
def test_label_map_refuses(tmp_path: Path, labels: np.ndarray, fact: str) -> None:
    path = tmp_path / "a.tif"
    with pytest.raises(ValueError, match=f"a.tif: .*{fact}"):
        annotation.write_label_map(path, labels)
    assert not os.listdir(tmp_path)
    tifffile.imwrite(path, labels)
    with pytest.raises(ValueError, match=f"a.tif: .*{fact}"):
        annotation.read_label_map(path)


def test_read_label_map_refuses_what_is_no_tiff(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"not a TIFF")
    with pytest.raises(ValueError, match="a.tif: not a TIFF"):
        annotation.read_label_map(tmp_path / "a.tif")
    with pytest.raises(FileNotFoundError):
        annotation.read_label_map(tmp_path / "missing.tif")


# tables


def test_tables_have_a_reader_beside_each_writer() -> None:
    assert annotation.WRITERS.keys() == annotation.READERS.keys() | {"geojson"}  # outline.py reads that


@pytest.mark.parametrize("name", annotation.READERS)
@every_map
def test_every_format_round_trips(tmp_path: Path, name: str, labels: np.ndarray) -> None:
    for image_id in ("one.v2", "two"):
        annotation.WRITERS[name](tmp_path, image_id, labels, None)
    annotation.WRITERS[name](tmp_path, "two", ONE_PIXEL, None)
    assert np.array_equal(annotation.READERS[name](tmp_path, "one.v2", labels.shape), labels)
    assert np.array_equal(annotation.READERS[name](tmp_path, "two", ONE_PIXEL.shape), ONE_PIXEL)


@pytest.mark.parametrize("name", annotation.READERS)
def test_every_reader_names_what_is_missing_or_of_another_shape(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="one"):
        annotation.READERS[name](tmp_path, "one", (5, 7))
    annotation.WRITERS[name](tmp_path, "one", ONE_PIXEL, None)
    with pytest.raises(ValueError, match=r"one.*\(5, 7\).*\(9, 9\)"):
        annotation.READERS[name](tmp_path, "one", (9, 9))


@pytest.mark.parametrize("seed", range(4))
def test_outlines_filled_are_the_nuclei_again(seed):
    """By an independent reader; the rectangles cover each other, so there are holes, corners and pieces."""
    labels = scattered(40, (60, 70), seed)
    for number, feature in enumerate(map(json.loads, annotation.geojson_features(labels, (100, 200), 7)), start=1):
        geometry = feature["geometry"]
        parts = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
        filled = np.zeros(labels.shape, int)
        for part in parts:
            for ring in part:
                assert ring[0] == ring[-1] and len(ring) > 4
                crossed = np.zeros(labels.shape, int)  # by parity: upright sides to the left of a pixel
                for (x, y), (_, below) in zip(ring, ring[1:], strict=False):
                    crossed[min(y, below) - 100 : max(y, below) - 100, x - 200 :] += 1
                filled += crossed
        assert np.array_equal(filled % 2 == 1, labels == number)
        assert feature["properties"]["name"] == str(number + 6)


def test_an_outline_has_corners_alone():
    ring_with_hole = np.ones((5, 6), bool)
    ring_with_hole[2, 2:4] = False
    ((outer, hole),) = annotation.trace(ring_with_hole)
    assert sorted(outer.tolist()) == [[0, 0], [0, 5], [6, 0], [6, 5]]
    assert sorted(hole.tolist()) == [[2, 2], [2, 3], [4, 2], [4, 3]]
