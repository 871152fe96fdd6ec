"""Cut labelled images into pieces, each a labelled image of its own that inherits what is known of the whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from annotation import write_sample
from columns import align
from files import is_filled, replacing
from image import ImageError, Pixels, read_labels, read_pixels, write_pixels
from labels import areas
from record import Record, book_records, derive_record

#: Pieces are booked and written together until they hold so many pixels.
N_PIXELS_AHEAD = 2**24
#: Says in the folder of the pieces how they were cut.
MARK = ".crop.json"


class Cut(NamedTuple):
    """How to cut: the side of a piece and the way from one to the next, in pixels of the image enlarged by `scale`."""

    step: int
    width: int
    scale: float = 1.0


class Piece(NamedTuple):
    """One piece: its record without paths, its pixels, and its label map, (H, W) int32."""

    record: Record
    pixels: Pixels
    labels: NDArray[np.int32]


@dataclass
class Tally:
    """What was done, by sub-category; `refused` says what could not be read."""

    images: Counter[str] = field(default_factory=Counter)
    nuclei: Counter[str] = field(default_factory=Counter)
    pieces: Counter[str] = field(default_factory=Counter)
    cut_nuclei: Counter[str] = field(default_factory=Counter)
    n_empty: int = 0
    n_there: int = 0
    n_lost: int = 0
    n_booked: int = 0
    refused: list[str] = field(default_factory=list)


def starts(length: int, width: int, step: int) -> list[int]:
    """Where pieces begin along a side: every `step` pixels, and the last one flush with the far end."""
    last = max(length - width, 0)
    return [*range(0, last, step), last]


def rescale(pixels: Pixels, labels: NDArray[np.int32], scale: float) -> tuple[Pixels, NDArray[np.int32]]:
    """Enlarge or reduce an image and its label map by a factor; nuclei without a pixel left are gone."""
    height, width = (max(1, round(n * scale)) for n in labels.shape)
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    array = pixels.array
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    planes = array.reshape(*array.shape[:2], -1).astype(np.float64)
    planes = np.stack([cv2.resize(plane, (width, height), interpolation=kind) for plane in np.moveaxis(planes, -1, 0)])
    resized = np.moveaxis(planes, 0, -1).reshape(height, width, *array.shape[2:])
    if array.dtype.kind in "ui":
        limits = np.iinfo(array.dtype)
        resized = np.clip(np.rint(resized), limits.min, limits.max)
    return Pixels(resized.astype(array.dtype), pixels.alpha), labels[rows[:, None], columns]


def cut_pieces(record: Record, pixels: Pixels, labels: NDArray[np.int32], cut: Cut) -> Iterator[Piece]:
    """The pieces of an image, named ``<id>_<x>_<y>`` by their upper left corner; those without a nucleus too.

    The whole image is covered, unless the step is larger than the width; an image smaller than a piece is one.
    """
    height, width = labels.shape
    for y in starts(height, cut.width, cut.step):
        for x in starts(width, cut.width, cut.step):
            box = np.s_[y : y + cut.width, x : x + cut.width]
            inherited = derive_record(f"{record.id}_{x}_{y}", record.image, [record])
            yield Piece(inherited, Pixels(pixels.array[box], pixels.alpha), labels[box])


def write_piece(folder: Path, piece: Piece) -> None:
    """Write a piece in the Kaggle layout, one mask a nucleus; the folder ``<folder>/<id>`` appears complete."""
    name = piece.record.id
    write_sample(folder, name, lambda images: write_pixels(images, name, piece.pixels), piece.labels)


def crop_records(records: Sequence[Record], folder: Path, table: Path, cut: Cut, dry_run: bool = False) -> Tally:
    """Cut images into pieces and book them; pieces that are there already stay as they are.

    Parameters
    ----------
    records : sequence of Record
    folder : path
        Receives the pieces.
    table : path
        CSV that describes images. A piece is booked before it appears, so that none is ever a stranger to its patient.
    dry_run : bool
        Count, and write nothing.

    Raises
    ------
    ValueError
        The folder holds pieces that were cut in another way, or other things; or the CSV has other images of such
        names.
    """
    tally, waiting = Tally(), list[Piece]()
    claim_folder(folder, cut, dry_run)
    for record in tqdm(records, "cropping", leave=False, disable=None):
        try:
            waiting += _cut_record(record, cut, tally)
        except ImageError as error:
            tally.refused.append(str(error))
        if sum(piece.labels.size for piece in waiting) > N_PIXELS_AHEAD:
            _keep(waiting, folder, table, tally, dry_run)
            waiting.clear()
    _keep(waiting, folder, table, tally, dry_run)
    return tally


def claim_folder(folder: Path, cut: Cut, dry_run: bool = False) -> None:
    """Mark a folder as one of pieces cut in this way.

    Raises
    ------
    ValueError
        It holds pieces cut in another way, or things that are no pieces.
    """
    mark, wanted = folder / MARK, cut._asdict()
    found = json.loads(mark.read_text()) if mark.is_file() else None
    if is_filled(folder) and found != wanted:
        what = "things that are no pieces" if found is None else f"pieces of {_words(found)}, not of {_words(wanted)}"
        raise ValueError(f"{folder} holds {what}; move it away or delete it first")
    if found != wanted and not dry_run:
        with replacing(mark) as stage:
            stage.write_text(json.dumps(wanted))


def format_tally(tally: Tally) -> str:
    """A table of what was cut: a line a sub-category, to print."""
    columns = (tally.images, tally.nuclei, tally.pieces, tally.cut_nuclei)
    rows = [(kind or "uncategorised", *(column[kind] for column in columns)) for kind in sorted(tally.images)]
    rows.append(("all", *(column.total() for column in columns)))
    return align([("", "images", "nuclei", "pieces", "nuclei in pieces"), *rows])


def _words(cut: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in cut.items())


def _cut_record(record: Record, cut: Cut, tally: Tally) -> list[Piece]:
    """The pieces of an image that hold a nucleus."""
    if record.problem or record.masks is None:
        raise ImageError(record.problem or f"{record.image}: has no masks")
    pixels = read_pixels(record.image)
    labels = read_labels(record.masks, pixels.array.shape[:2])
    kind, n_nuclei = record.sub_category, int(labels.max(initial=0))
    if cut.scale != 1:
        pixels, labels = rescale(pixels, labels, cut.scale)
        tally.n_lost += n_nuclei - int(np.count_nonzero(areas(labels)[1:]))
    pieces = list(cut_pieces(record, pixels, labels, cut))
    full = [piece for piece in pieces if piece.labels.any()]
    tally.images[kind] += 1
    tally.nuclei[kind] += n_nuclei
    tally.pieces[kind] += len(full)
    tally.cut_nuclei[kind] += sum(int(np.count_nonzero(areas(piece.labels)[1:])) for piece in full)
    tally.n_empty += len(pieces) - len(full)
    return full


def _keep(pieces: Iterable[Piece], folder: Path, table: Path, tally: Tally, dry_run: bool) -> None:
    """Book pieces, then write those that are not there."""
    pieces = list(pieces)
    fresh = [piece for piece in pieces if not (folder / piece.record.id).is_dir()]
    tally.n_there += len(pieces) - len(fresh)
    tally.n_booked += book_records(table, [piece.record for piece in pieces], dry_run)
    for piece in () if dry_run else fresh:
        write_piece(folder, piece)
