"""What the rows work on: the validation images of the real data where NUCLEI_DATA is set, else drawn ones."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import Machine
from config import Config, load_config
from helper import DEFAULT_WEIGHTS
from image import read_image, read_labels
from predict import Segmenter, load_segmenter
from record import Record, find_records
from synthetic import write_dataset

Labels = NDArray[np.int32]
#: How many images of each shape are drawn where there are no real ones.
DRAWN = {(256, 256): 6, (256, 320): 3, (512, 640): 2, (520, 696): 3, (1024, 1024): 1}
#: Nuclei of "one image", and of one crop of 256 px.
N_IMAGE, N_CROP = 300, 60


class Maps(NamedTuple):
    """An image as the network that ships sees it, once: head -> (H, W) float32."""

    image: NDArray[np.uint8]
    probs: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Inputs:
    """Images with masks, and what is made of them when a row asks.

    Attributes
    ----------
    folder : Path
        The rows may write below it.
    records : sequence of Record
        Sorted by id.
    real : bool
    machine : Machine
    """

    folder: Path
    records: Sequence[Record]
    real: bool
    machine: Machine

    def __str__(self) -> str:
        kind = "validation images of NUCLEI_DATA" if self.real else "images that are drawn"
        return f"{len(self.records)} {kind}"

    @cached_property
    def config(self) -> Config:
        """The defaults, whatever config.ini lies about."""
        return load_config(folder=self.folder)

    @cached_property
    def labels(self) -> list[Labels]:
        """Of every record."""
        return [read_labels(masks_of(record), read_image(record.image).shape[:2]) for record in self.records]

    @cached_property
    def segmenter(self) -> Segmenter:
        """The weights that ship, one view of the image as it is, in float32."""
        settings = ["valid.test_time_augment=", "pre.nucleus_diameter=0", "train.precision=float32"]
        return load_segmenter([DEFAULT_WEIGHTS], load_config(overrides=settings, folder=self.folder))

    @cached_property
    def maps(self) -> list[Maps]:
        """Of each shape the image with most nuclei, from 256 to 1024 px; those of more pixels are cropped."""
        large = [i for i, labels in enumerate(self.labels) if min(labels.shape) >= 256]
        most = {self.labels[i].shape: i for i in sorted(large, key=lambda i: self.labels[i].max())}
        torch.set_num_threads(self.machine.cores)
        return [self._see(self.records[i]) for _, i in sorted(most.items())]

    def _see(self, record: Record) -> Maps:
        image = read_image(record.image, *self.segmenter.config.pre.policy)[:1024, :1024]
        return Maps(image, self.segmenter.probs(image))

    @cached_property
    def crowded(self) -> Labels:
        """The image whose nuclei are nearest to `N_IMAGE` in number."""
        return min(self.labels, key=lambda labels: abs(int(labels.max()) - N_IMAGE))

    @cached_property
    def crop(self) -> Labels:
        """The crop of 256 px, of all in the upper left, whose nuclei are nearest to `N_CROP` in number."""
        crops = [labels[:256, :256] for labels in self.labels if min(labels.shape) >= 256]
        crop = min(crops, key=lambda labels: abs(np.count_nonzero(np.unique(labels)) - N_CROP))
        return np.ascontiguousarray(crop)


def masks_of(record: Record) -> Sequence[Path]:
    """The files of the nuclei of a record."""
    assert isinstance(record.masks, tuple), f"{record.id}: no masks"
    return record.masks


def open_inputs(folder: Path, machine: Machine) -> Inputs:
    """Unpack the validation images of ``NUCLEI_DATA``, or draw some, into `folder`."""
    source = os.environ.get("NUCLEI_DATA")
    data = folder / "images"
    if source:
        _unpack(Path(source), data)
    else:
        _draw(data)
    return Inputs(folder, sorted(find_records(data), key=lambda record: record.id), bool(source), machine)


def _draw(data: Path) -> None:
    for shape, n_images in DRAWN.items():
        name = "x".join(map(str, shape))
        write_dataset(data.with_name(name), n_images, shape[0], shape)
        data.mkdir(exist_ok=True)
        for path in data.with_name(name).iterdir():
            path.rename(data / f"{name}_{path.name}")


def _unpack(source: Path, data: Path) -> None:
    wanted = set((source / "valid_ids.txt").read_text().split())
    with zipfile.ZipFile(source / "stage1_train.zip") as archive:
        for name in archive.namelist():
            parts = name.rstrip("/").split("/")
            if wanted & set(parts) and not name.endswith("/"):
                path = data.joinpath(*parts[-3:])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
