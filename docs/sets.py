"""Make the sets of images, beside the validation images, that ablation.md and weights.md speak of.

    python docs/sets.py DATA FOLDER
    python valid.py --input FOLDER/unknown --iou --output runs/NAME/unknown

DATA is a data folder with the competition's training images in train, and the 13 tissues of TCGA, added as data.md
says, in external_TCGA_train. FOLDER gets unknown (the 68 images of unknown_ids.txt), tcga (the middle 500 px of the 13)
and small (the 80 of valid_ids.txt at 0.4 times their size), each in the Kaggle layout; what is there already stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from annotation import write_sample
from image import Pixels, read_image, read_labels, write_pixels
from record import Record, find_records, read_ids

DOCS = Path(__file__).resolve().parent
#: Side (px) of what is cut from a tissue; how much of its size an image keeps.
MIDDLE, REDUCED = 500, 0.4

Image = NDArray[np.uint8]


def main(data: str, folder: str) -> None:
    target = Path(folder)
    real = {record.id: record for record in find_records(Path(data) / "train")}
    for record in find_records(Path(data) / "external_TCGA_train"):
        write(target / "tcga", record, middle)
    unknown = read_ids(DOCS / "unknown_ids.txt")
    for record in [*find_records(target / "tcga"), *real.values()]:
        if record.id in unknown:
            write(target / "unknown", record)
    for image_id in sorted(read_ids(DOCS / "valid_ids.txt")):
        write(target / "small", real[image_id], reduce)


def middle(image: Image, labels: NDArray[np.int32]) -> tuple[Image, NDArray[np.int32]]:
    """The middle, and what of nuclei lies there."""
    top, left = ((side - MIDDLE) // 2 for side in labels.shape)
    part = slice(top, top + MIDDLE), slice(left, left + MIDDLE)
    return image[part], labels[part]


def reduce(image: Image, labels: NDArray[np.int32]) -> tuple[Image, NDArray[np.int32]]:
    """By area; each nucleus has the pixels that it covers half of."""

    def smaller(values: NDArray) -> NDArray:
        return cv2.resize(values, None, fx=REDUCED, fy=REDUCED, interpolation=cv2.INTER_AREA)

    reduced = np.zeros(smaller(image).shape[:2], np.int32)
    for label in np.unique(labels[labels > 0]):
        reduced[smaller((labels == label).astype(np.float32)) >= 0.5] = label
    return smaller(image), reduced


def write(folder: Path, record: Record, change: Callable = lambda image, labels: (image, labels)) -> None:
    """An image and its nuclei, changed, where they are not there already."""
    if (folder / record.id).exists():
        return
    assert record.masks is not None
    image = read_image(record.image)
    image, labels = change(image, read_labels(record.masks, image.shape[:2]))
    pixels = Pixels(np.ascontiguousarray(image), False)
    write_sample(folder, record.id, partial(write_pixels, name=record.id, pixels=pixels), labels)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
