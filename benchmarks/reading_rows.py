"""Rows: decode images with their masks, and take them from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import agree, plain
from benchmarks.inputs import Inputs, masks_of
from benchmarks.row import Floor, Row
from image import Cache, read_image, read_labels
from labels import relabel
from record import Record

Decoded = list[tuple[NDArray[np.uint8], NDArray[np.int32]]]
#: Every so manieth image, so that all kinds are there.
STEP = 4


def decode(inputs: Inputs) -> Row:
    records = inputs.records[::STEP]

    def ours() -> Decoded:
        return [(image := read_image(r.image), read_labels(masks_of(r), image.shape[:2])) for r in records]

    return Row(
        f"{len(records)} images with {_n_masks(records)} masks decoded and composed, nothing cached",
        plain=lambda: [_decode(record, _pillow_image, plain.read_gray) for record in records],
        ours=ours,
        agree=agree.equal,
        wanted=2.0,
        libraries={
            "opencv": lambda: [_decode_lean(record, _opencv_image, _opencv_mask) for record in records],
            "imagecodecs": lambda: [_decode_lean(record, _codec_image, _codec_mask) for record in records],
        },
        floor=_floor(records, n_masks=_n_masks(records)),
    )


def cache(inputs: Inputs) -> Row:
    records = inputs.records[::STEP]
    cache = Cache(inputs.folder / "cache")

    def ours() -> Decoded:
        return [(np.array(cache.image(r.image)), np.array(cache.labels(r.image, masks_of(r)))) for r in records]

    ours()
    return Row(
        "the same, decoded before: opened in the cache, every byte read",
        plain=lambda: [_decode(record, _pillow_image, plain.read_gray) for record in records],
        ours=ours,
        agree=agree.equal,
        wanted=50.0,
        floor=_floor(records),
    )


def _n_masks(records: Sequence[Record]) -> int:
    return sum(len(masks_of(record)) for record in records)


def _floor(records: Sequence[Record], n_masks: int = 0) -> Floor:
    """Every image (3 bytes a pixel) and label map (4) is written, and every mask (1) written and read."""
    sizes = [np.prod(Image.open(record.image).size) for record in records]
    masks = [len(masks_of(record)) if n_masks else 0 for record in records]
    return Floor(n_bytes=float(sum(size * (7 + 2 * n) for size, n in zip(sizes, masks, strict=True))))


def _decode(
    record: Record, read: Callable[[Path], NDArray[np.uint8]], read_mask: Callable[[Path], NDArray[np.uint8]]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    image = read(record.image)
    return image, plain.read_labels(masks_of(record), image.shape[:2], read_mask)


def _decode_lean(
    record: Record, read: Callable[[Path], NDArray[np.uint8]], read_mask: Callable[[Path], NDArray[np.uint8]]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """As `_decode`, but of each mask only the pixels that are set are kept and painted, as a user in a hurry would."""
    image = read(record.image)
    masks = [np.flatnonzero(read_mask(path) > 127) for path in sorted(masks_of(record))]
    labels = np.zeros(image.shape[0] * image.shape[1], np.int32)
    for i in sorted(range(len(masks)), key=lambda i: (masks[i].size, i), reverse=True):
        labels[masks[i]] = i + 1
    return image, relabel(labels.reshape(image.shape[:2]))


def _pillow_image(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def _opencv_image(path: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)


def _opencv_mask(path: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), np.uint8)


def _codec_image(path: Path) -> NDArray[np.uint8]:
    image = imagecodecs.png_decode(path.read_bytes())
    return np.ascontiguousarray(
        np.broadcast_to(image[..., None], (*image.shape, 3)) if image.ndim == 2 else image[..., :3]
    )


def _codec_mask(path: Path) -> NDArray[np.uint8]:
    mask = imagecodecs.png_decode(path.read_bytes())
    return mask if mask.ndim == 2 else mask[..., 0]
