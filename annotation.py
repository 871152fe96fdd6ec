"""Instances <-> files, each reader beside its writer: run-length CSV, one PNG per nucleus, label TIFF.

A writer builds its file under a hidden name in the same folder and moves it into place when it is complete,
so that an interrupted run leaves the earlier file or none, never half of one.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from files import replacing
from labels import Labels, relabel

#: Expected of nuclei 1..N, (N,) in [0, 1], where it is known.
Quality = NDArray[np.floating] | None

#: A mask is flat: without a filter it is written and read faster, and is smaller, than with one.
PNG_FILTER_NONE = 0x08
CSV_HEADER = ("ImageId", "EncodedPixels")


def encode_rle(labels: Labels) -> list[str]:
    """Write every nucleus as the run-length string of the 2018 Data Science Bowl.

    A string holds pairs "start length"; pixels are counted from 1, top to bottom and then left to right, and
    a run may go on from the foot of a column to the head of the next.

    Parameters
    ----------
    labels
        (H, W) integers >= 0, 0 for background. Since each pixel has one id, no pixel is in two strings.

    Returns
    -------
    One string per nucleus in order of its id; empty where there is no nucleus.

    Raises
    ------
    ValueError
        `labels` is not two-dimensional, not of integers, or holds a negative id.
    """
    flat = relabel(labels).T.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    lengths, ids = np.diff(starts, append=flat.size), flat[starts]
    by_id = np.argsort(ids, kind="stable")
    numbers = np.stack([starts + 1, lengths], axis=1)[by_id].ravel().tolist()
    ends = 2 * np.cumsum(np.bincount(ids, minlength=1))
    return [" ".join(map(str, numbers[begin:end])) for begin, end in zip(ends[:-1], ends[1:], strict=True)]


def decode_rle(runs: Sequence[str], shape: tuple[int, int]) -> NDArray[np.int32]:
    """Draw the label map that run-length strings describe; undoes `encode_rle`.

    Parameters
    ----------
    runs
        One string per nucleus, as `encode_rle` writes them.
    shape
        (height, width) of the image.

    Returns
    -------
    (H, W) int32: the pixels of the i-th string, counted from 1, hold i; all 0 where there is no string.

    Raises
    ------
    ValueError
        A string is empty, holds something else than pairs of positive integers or reaches beyond the image,
        or two runs overlap.
    """
    size = shape[0] * shape[1]
    pairs = [_parse(text, number, size) for number, text in enumerate(runs, start=1)]
    ids = np.repeat(np.arange(1, len(pairs) + 1), [len(pair) for pair in pairs])
    starts, lengths = np.concatenate([np.empty((0, 2), np.int64), *pairs]).T
    order = np.argsort(starts, kind="stable")
    ids, starts, ends = ids[order], starts[order] - 1, (starts + lengths)[order] - 1
    clash = np.flatnonzero(ends[:-1] > starts[1:])
    if clash.size:
        first, second, pixel = ids[clash[0]], ids[clash[0] + 1], starts[clash[0] + 1] + 1
        raise ValueError(f"run-length strings {first} and {second} overlap at pixel {pixel}, wanted in one")
    steps = np.zeros(size + 1, np.int32)
    np.add.at(steps, starts, ids.astype(np.int32))
    np.subtract.at(steps, ends, ids.astype(np.int32))
    return np.ascontiguousarray(np.cumsum(steps[:-1], dtype=np.int32).reshape(shape[::-1]).T)


def write_csv(path: str | os.PathLike[str], results: Iterable[tuple[str, Labels]]) -> None:
    """Write the competition's CSV, ``ImageId,EncodedPixels``: a row a nucleus.

    Parameters
    ----------
    path
        File to make or to replace; folders on the way are made.
    results
        Pairs of image id and (H, W) label map, taken one by one, so a generator need not hold all maps. An
        image without nuclei gets one row whose EncodedPixels is empty.

    Raises
    ------
    ValueError
        A map is no label map, or an image id comes twice; `path` stays as it was.
    """
    write_runs(path, ((image_id, encode_rle(labels)) for image_id, labels in results))


def write_runs(path: str | os.PathLike[str], results: Iterable[tuple[str, list[str]]]) -> None:
    """As `write_csv`, of nuclei that `encode_rle` has encoded already."""
    seen: set[str] = set()
    with replacing(path) as stage, stage.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_HEADER)
        for image_id, runs in results:
            if image_id in seen:
                raise ValueError(f"{path}: image {image_id} comes twice; its nuclei would overlap")
            seen.add(image_id)
            writer.writerows((image_id, text) for text in runs or [""])


def read_csv(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read what `write_csv` wrote; `decode_rle`, which needs the size of the image, makes label maps of it.

    Parameters
    ----------
    path
        File with the columns ImageId and EncodedPixels; others are passed over. The rows of an image need not
        follow each other.

    Returns
    -------
    Image id -> run-length strings, in the order of the file; an empty list for an image without nuclei.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        A column is missing, or a row is too short.
    """
    found: dict[str, list[str]] = {}
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if not set(CSV_HEADER) <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: columns {rows.fieldnames}, wanted {list(CSV_HEADER)}")
        for row in rows:
            image_id, text = (row[name] for name in CSV_HEADER)
            if not image_id or text is None:
                raise ValueError(f"{path}: line {rows.line_num} wants an image id and a comma after it")
            found.setdefault(image_id, []).extend([text] if text.strip() else [])
    return found


def write_masks(folder: str | os.PathLike[str], labels: Labels) -> None:
    """Write one PNG per nucleus into ``folder/masks``, as in the Kaggle layout.

    Parameters
    ----------
    folder
        Folder of the image; made where it is missing. Masks of an earlier call are replaced as a whole.
    labels
        (H, W) integers >= 0. Nuclei are written in order of their id as ``0001.png``, ``0002.png`` ..., 8
        bit, 255 in the nucleus and 0 elsewhere. Without a nucleus the folder is empty.

    Raises
    ------
    ValueError
        `labels` is no label map.
    FileExistsError
        The folder of masks holds files that this function did not name, such as the true masks.
    """
    labels, masks = relabel(labels), Path(folder) / "masks"
    foreign = [path.name for path in masks.glob("[!.]*") if not re.fullmatch(r"\d{4,}\.png", path.name)]
    if foreign:
        raise FileExistsError(f"{masks}: holds {foreign[0]}, not one of our masks; write to another folder")
    width = max(4, len(str(labels.max(initial=0))))
    canvas = np.zeros(labels.shape, np.uint8)
    with replacing(masks) as stage:
        stage.mkdir()
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            canvas[box] = np.where(labels[box] == number, 255, 0)
            (stage / f"{number:0{width}d}.png").write_bytes(
                imagecodecs.png_encode(canvas, level=1, filter=PNG_FILTER_NONE)
            )
            canvas[box] = 0
        if masks.exists():
            shutil.rmtree(masks)


def write_sample(
    folder: Path, image_id: str, draw: Callable[[Path], object], masks: Labels | Sequence[Path] | None
) -> None:
    """Write an image and its nuclei in the Kaggle layout; ``<folder>/<image_id>`` appears whole or not at all.

    Parameters
    ----------
    folder
        Of many images; made where it is missing.
    draw
        Writes the image into the folder that it is given.
    masks
        A label map, (H, W) integers >= 0; or files of one nucleus each, which are copied; None where there is no
        ground truth.
    """
    with replacing(folder / image_id) as stage:
        (stage / "images").mkdir(parents=True)
        draw(stage / "images")
        if isinstance(masks, np.ndarray):
            write_masks(stage, masks)
        elif masks is not None:
            (stage / "masks").mkdir()
            for path in masks:
                shutil.copyfile(path, stage / "masks" / path.name)


def read_masks(folder: str | os.PathLike[str], shape: tuple[int, int]) -> NDArray[np.int32]:
    """Read the PNGs of ``folder/masks``, one nucleus each; undoes `write_masks`.

    Parameters
    ----------
    folder
        Folder of the image.
    shape
        (height, width) of the image.

    Returns
    -------
    (H, W) int32, numbered 1..N in order of the file names; whatever is not 0 in a file is nucleus. All 0
    where the folder is empty.

    Raises
    ------
    FileNotFoundError
        There is no folder of masks.
    ValueError
        A file cannot be read, has another shape, has no nucleus, or covers pixels of an earlier one.
    """
    masks = Path(folder) / "masks"
    if not masks.is_dir():
        raise FileNotFoundError(f"{masks}: no such folder")
    labels = np.zeros(shape, np.int32)
    for number, path in enumerate(sorted(masks.glob("[!.]*.png")), start=1):
        image = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH)
        if image is None:
            raise ValueError(f"{path}: not a PNG that can be read")
        if image.shape != shape:
            raise ValueError(f"{path}: shape {image.shape}, wanted {shape}; is this mask from another image?")
        pixels = np.flatnonzero(image)
        shared = np.count_nonzero(labels.take(pixels))
        if not pixels.size:
            raise ValueError(f"{path}: no nucleus, all pixels are 0")
        if shared:
            raise ValueError(f"{path}: shares {shared} pixels with the masks before it, wanted none")
        labels.put(pixels, number)
    return labels


def write_label_map(path: str | os.PathLike[str], labels: Labels) -> None:
    """Write a label map as one TIFF, compressed without loss.

    Parameters
    ----------
    path
        File to make or to replace; folders on the way are made.
    labels
        (H, W) integers >= 0, at least one pixel. Ids are kept. Stored as uint16 while they fit, else as
        int32.

    Raises
    ------
    ValueError
        `labels` is no label map, has no pixel, or an id is beyond int32.
    """
    labels = _fitting(labels, f"{path}")
    stored = labels.astype(np.uint16) if labels.max() <= np.iinfo(np.uint16).max else labels
    with replacing(path) as stage:
        tifffile.imwrite(stage, stored, compression="zlib", photometric="minisblack")


def read_label_map(path: str | os.PathLike[str]) -> NDArray[np.int32]:
    """Read a label TIFF; undoes `write_label_map`.

    Parameters
    ----------
    path
        TIFF of one page of integers.

    Returns
    -------
    (H, W) int32, ids as stored.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no TIFF, or what it holds is no label map.
    """
    try:
        return _fitting(tifffile.imread(path), f"{path}")
    except tifffile.TiffFileError as error:
        raise ValueError(f"{path}: not a TIFF that can be read ({error})") from error


def trace(mask: NDArray[np.bool_]) -> list[list[NDArray[np.int64]]]:
    """Follow the outlines of a mask, along the sides of its pixels.

    Parameters
    ----------
    mask
        (H, W) bool.

    Returns
    -------
    Of each piece (pixels that share a side or a corner) its ring and the rings of its holes. A ring is (K, 2) int64,
    (x, y) from the outer corner of the first pixel, not closed, corners alone.
    """
    # Of a mask twice as large the outermost pixels lie on the two sides of every side of a pixel: halved they meet.
    double = np.ascontiguousarray(mask.repeat(2, axis=0).repeat(2, axis=1)).view(np.uint8)
    found, tree = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [_corners((ring[:, 0].astype(np.int64) + 1) // 2) for ring in found]
    pieces = {i: [rings[i]] for i in range(len(rings)) if tree[0, i, 3] < 0}
    for i, ring in enumerate(rings):
        if tree[0, i, 3] >= 0:
            pieces[int(tree[0, i, 3])].append(ring)
    return list(pieces.values())


def _corners(ring: NDArray[np.int64]) -> NDArray[np.int64]:
    """Without points that come twice in a row, and those between two others on a line."""
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def geojson_features(
    labels: Labels, origin: tuple[int, int] = (0, 0), first: int = 1, quality: NDArray[np.floating] | None = None
) -> list[str]:
    """Describe every nucleus as a feature of GeoJSON, as QuPath reads it.

    Parameters
    ----------
    labels
        (H, W) integers >= 0: a region of an image.
    origin
        Row and column where it begins.
    first
        Name of the nucleus with label 1; the others follow.
    quality
        Expected of each nucleus 1..N, in [0, 1]; a measurement of the feature.

    Returns
    -------
    One line of JSON per nucleus in order of its id: a Polygon, or a MultiPolygon where it is in pieces.
    """
    features = []
    for label, box in enumerate(ndimage.find_objects(np.asarray(labels, np.int32)), start=1):
        if box is None:
            continue
        corner = np.array([box[1].start + origin[1], box[0].start + origin[0]])
        pieces = [
            [(np.concatenate([ring, ring[:1]]) + corner).tolist() for ring in piece]
            for piece in trace(labels[box] == label)
        ]
        single = len(pieces) == 1
        geometry = {
            "type": "Polygon" if single else "MultiPolygon",
            "coordinates": pieces[0] if single else pieces,
        }
        properties: dict[str, Any] = {"objectType": "detection", "name": str(first + label - 1)}
        if quality is not None:
            properties["measurements"] = {"expected quality": round(float(quality[label - 1]), 3)}
        feature = {"type": "Feature", "geometry": geometry, "properties": properties}
        features.append(json.dumps(feature, separators=(",", ":")))
    return features


def _write_mask(folder: Path, image_id: str, labels: Labels, quality: Quality = None) -> None:
    """One PNG a nucleus."""
    write_masks(folder / image_id, labels)


def _read_mask(folder: Path, image_id: str, shape: tuple[int, int]) -> NDArray[np.int32]:
    return read_masks(folder / image_id, shape)


def _write_label(folder: Path, image_id: str, labels: Labels, quality: Quality = None) -> None:
    """One label map (TIFF) an image."""
    write_label_map(folder / f"{image_id}.tif", labels)


def _write_geojson(folder: Path, image_id: str, labels: Labels, quality: Quality = None) -> None:
    """One file of outlines (GeoJSON, as of QuPath) an image, with the quality expected of each nucleus."""
    with replacing(folder / f"{image_id}.geojson") as stage:
        features = ",\n".join(geojson_features(labels, quality=quality))
        stage.write_text(f'{{"type":"FeatureCollection","features":[\n{features}\n]}}\n', encoding="utf-8")


def _read_label(folder: Path, image_id: str, shape: tuple[int, int]) -> NDArray[np.int32]:
    labels = read_label_map(folder / f"{image_id}.tif")
    if labels.shape != shape:
        raise ValueError(f"labels of {image_id}: shape {labels.shape}, image is {shape}; of another image?")
    return labels


WRITERS: dict[str, Callable[[Path, str, Labels, Quality], None]] = {
    "mask": _write_mask,
    "label": _write_label,
    "geojson": _write_geojson,
}
"""Format -> ``write(folder, image_id, labels, quality)``: files of one image, under names made from its id; `quality`
is what is expected of each nucleus, or None. The docstring of a row is the help of its option."""

READERS: dict[str, Callable[[Path, str, tuple[int, int]], NDArray[np.int32]]] = {
    "mask": _read_mask,
    "label": _read_label,
}
"""Format -> ``read(folder, image_id, shape)``: the label map that the writer of that name was given. Outlines are read
by `outline.read_outlines`."""


def _parse(text: str, number: int, size: int) -> NDArray[np.int64]:
    """Return the (K, 2) starts and lengths of run-length string `number`, all within `size` pixels."""
    words = text.split()
    if not words or len(words) % 2:
        raise ValueError(f"run-length string {number}: {len(words)} words, wanted pairs of start and length")
    try:
        pairs = np.array([int(word) for word in words], np.int64).reshape(-1, 2)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"run-length string {number}: {error}, wanted pairs of start and length") from error
    starts, lengths = pairs.T
    wrong = np.flatnonzero((starts < 1) | (lengths < 1) | (lengths > size + 1 - starts))
    if wrong.size:
        start, length = pairs[wrong[0]]
        raise ValueError(f"run-length string {number}: run {start} {length} is not within pixels 1 to {size}")
    return pairs


def _fitting(labels: Labels, name: str) -> NDArray[np.int32]:
    """Return `labels` as int32, or say what of `name` is no label map of int32."""
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "biu" or not labels.size:
        raise ValueError(f"{name}: {labels.dtype} of shape {labels.shape}, wanted integers (height, width)")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest > np.iinfo(np.int32).max:
        raise ValueError(f"{name}: ids from {lowest} to {highest}, wanted 0 to {np.iinfo(np.int32).max}")
    return labels.astype(np.int32)
