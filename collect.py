"""Bring new images into the data set and take them out again: check, skip what is there, place, book in the CSV."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from annotation import write_masks
from config import DEFAULT_POLICY, Policy
from files import replacing
from image import ImageError, read_image, read_labels, read_mask, read_pixels
from likeness import pixel_hash
from outline import Annotation, draw, read_outlines
from record import CSV_COLUMNS, Record, find_records, read_table, write_table

logger = logging.getLogger(__name__)

OUTLINE_SUFFIXES = frozenset({".xml", ".json", ".geojson"})
SIDES = ("train", "valid")


@dataclass
class Outcome:
    """What came of adding or removing.

    Attributes
    ----------
    done : list of str
        Ids that were added or removed.
    present : list of str
        Images that are there already.
    refused : list of str
        A line for each thing that could not be used.
    n_nuclei : int
        In the images that were added.
    n_rows : int
        Rows of the table that came or went.
    folder : path
        Where the images are now.
    """

    folder: Path
    done: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    n_nuclei: int = 0
    n_rows: int = 0


def sides_of(data: Path) -> dict[str, Path]:
    """The folders that hold the data set: ``train`` and ``valid``, or the data folder itself as ``train``."""
    found = {side: data / side for side in SIDES if (data / side).is_dir()}
    if "train" not in found:
        found["train"] = data if records_in(data) else data / "train"
    return found


def records_in(folder: Path) -> list[Record]:
    """The records of a folder that may be missing or empty."""
    if not folder.is_dir():
        return []
    try:
        return find_records(folder)
    except ValueError:
        if any(folder.glob("*/images")):
            raise
        return []


def find_sources(folder: Path, outlines: Path | None = None) -> list[tuple[Record, Annotation | None]]:
    """The images of a folder, each with its outlines where it has no masks.

    Parameters
    ----------
    folder
        Any layout of `record.find_records`; beside images without masks, files of outlines: ``<id>.xml``,
        ``<id>.geojson``, or COCO's JSON for all.
    outlines
        Where the files of outlines are, if not in `folder`.

    Raises
    ------
    FileNotFoundError, ValueError
        No images, or a file of outlines that cannot be read.
    """
    records = find_records(folder)
    annotations: dict[str, Annotation] = {}
    if any(record.masks is None for record in records) or outlines is not None:
        for path in _outline_files(outlines or folder):
            for image_id, annotation in read_outlines(path).items():
                known = annotations.setdefault(image_id, Annotation())
                known.outlines += annotation.outlines
                known.refused += annotation.refused
    return [(record, annotations.get(record.id) if record.masks is None else None) for record in records]


def add_images(
    sources: Sequence[tuple[Record, Annotation | None]],
    data: Path,
    table: Path,
    rows: Mapping[str, Mapping[str, str]],
    *,
    side: str = "train",
    prefix: str = "",
    policy: Policy = DEFAULT_POLICY,
    dry_run: bool = False,
) -> Outcome:
    """Place images in the data set and book them.

    Each image appears complete or not at all, and rows are booked at the end; a call that was interrupted does the rest
    when it is made again.

    Parameters
    ----------
    sources
        As `find_sources` gives them.
    data, table
        The data folder and the CSV that describes its images.
    rows
        Id in `sources` -> what the table shall say of it. A row that the table has already stays as it is.
    side
        ``train``, ``valid``, or another folder of the data folder, whose images wait to be cut or divided.
    prefix
        Stands before each id.
    policy
        How the settings want images read, as `image.read_image` takes it: what cannot be read so is refused.
    """
    folders = sides_of(data)
    target = folders.get(side, data / side)
    existing = _index(dict.fromkeys([*folders.values(), target]))
    taken = set(existing.values())
    outcome = Outcome(target)
    for record, annotation in tqdm(sources, "adding", unit="image", disable=None):
        name = prefix + record.id
        try:
            digest = _checked_hash(record, policy)
            if digest in existing:
                outcome.present.append(name if existing[digest] == name else f"{name} (as {existing[digest]})")
            elif name in taken or (target / name).exists():
                raise ImageError(f"{record.image}: another image is called {name} already; --prefix gives new names")
            else:
                outcome.n_nuclei += _place(record, annotation, target / name, outcome.refused, dry_run)
                outcome.done.append(name)
                existing[digest] = name
                taken.add(name)
        except ImageError as error:
            outcome.refused.append(str(error))
    placed = {*outcome.done, *outcome.present}  # a row may be missing if an earlier call was cut off
    wanted = {prefix + image_id: row for image_id, row in rows.items() if prefix + image_id in placed}
    outcome.n_rows = _book(table, wanted, dry_run)
    return outcome


def remove_images(
    data: Path, table: Path, ids: Iterable[str] = (), sources: Iterable[str] = (), *, dry_run: bool = False
) -> Outcome:
    """Move images, and their rows, out of the data set into ``removed/<side>`` of the data folder.

    Nothing is deleted: adding that folder brings them back.

    Raises
    ------
    ValueError
        There is nothing of that kind, or the data set is not in the Kaggle layout.
    """
    ids, sources = set(ids), set(sources)
    rows = read_table(table) if table.is_file() else {}
    chosen = {name for name, row in rows.items() if row.get("source") in sources} | ids
    moves = [
        (side, folder / record.id)
        for side, folder in sides_of(data).items()
        for record in _kaggle_records(folder)
        if record.id in chosen
    ]
    outcome = Outcome(_fresh(data / "removed"), done=[path.name for _, path in moves])
    outcome.refused = [f"{name}: no image of that id" for name in sorted(ids.difference(outcome.done, rows))]
    booked = chosen & set(rows)
    outcome.n_rows = len(booked)
    if not moves and not booked:
        what = [f"source {name}" for name in sorted(sources)] + sorted(ids)
        raise ValueError(f"{data}: nothing to remove of {', '.join(what)}")
    if not dry_run:
        _move(moves, outcome.folder, {name: rows[name] for name in booked})
        if booked:
            write_table(table, {name: row for name, row in rows.items() if name not in booked})
    return outcome


def _kaggle_records(folder: Path) -> list[Record]:
    records = records_in(folder)
    for record in records:
        if folder / record.id / "images" not in (record.image, record.image.parent):
            raise ValueError(
                f"{record.image}: not in the Kaggle layout (<id>/images/<one image>), wanted for add, remove"
            )
    return records


def _index(folders: Iterable[Path]) -> dict[str, str]:
    """Hash of the pixels -> id, of all images of the data set."""
    index = {}
    records = [record for folder in folders for record in _kaggle_records(folder) if not record.problem]
    for record in tqdm(records, "reading what is there", unit="image", disable=None):
        try:
            index[pixel_hash(*read_pixels(record.image))] = record.id
        except ImageError as error:
            logger.warning("%s", error)
    return index


def _outline_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of outlines")
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in OUTLINE_SUFFIXES and not path.name.startswith(".")
    )


def _checked_hash(record: Record, policy: Policy) -> str:
    if record.problem:
        raise ImageError(record.problem)
    read_image(record.image, *policy)
    return pixel_hash(*read_pixels(record.image))


def _place(record: Record, annotation: Annotation | None, target: Path, notes: list[str], dry_run: bool) -> int:
    """Put image and masks into the new folder `target`; the number of nuclei."""
    shape = read_pixels(record.image).array.shape[:2]
    files: list[Path] = []
    labels: NDArray[np.int32] | None = None
    if annotation is not None:
        labels, refused = draw(annotation.outlines, shape)
        notes += [*annotation.refused, *refused]
    elif record.masks is None:
        raise ImageError(f"{record.image}: no masks, and no outlines of that name (.xml, .geojson, COCO .json)")
    elif isinstance(record.masks, Path):
        labels = read_labels(record.masks, shape)
    else:
        files = _whole_masks(record.masks, shape, notes)
    if not dry_run:
        with replacing(target) as stage:
            (stage / "images").mkdir(parents=True)
            shutil.copyfile(record.image, stage / "images" / f"{target.name}{record.image.suffix.lower()}")
            (stage / "masks").mkdir()
            for file in files:
                shutil.copyfile(file, stage / "masks" / file.name)
            if labels is not None:
                write_masks(stage, labels)
    return len(files) if labels is None else int(labels.max(initial=0))


def _whole_masks(masks: Sequence[Path], shape: tuple[int, int], notes: list[str]) -> list[Path]:
    """The masks that hold a nucleus. They are copied as they are: where they overlap, nothing is lost."""
    read_labels(masks, shape)  # raises where one is of another image
    filled = [path for path in masks if read_mask(path).any()]
    notes += [f"{path}: no nucleus, left out" for path in masks if path not in filled]
    return filled


def _book(table: Path, wanted: Mapping[str, Mapping[str, str]], dry_run: bool) -> int:
    """Append the rows that the table does not have; how many."""
    rows: dict[str, Mapping[str, str]] = dict(read_table(table)) if table.is_file() else {}
    new = {name: {**row, "image_id": name} for name, row in wanted.items() if name not in rows}
    if new and not dry_run:
        columns = dict.fromkeys(("image_id", *CSV_COLUMNS), "")
        write_table(table, {**rows, **{name: {**columns, **row} for name, row in new.items()}})
    return len(new)


def _fresh(path: Path) -> Path:
    """`path`, or `path`-2, ...: the first that is not there."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _move(moves: Sequence[tuple[str, Path]], target: Path, rows: Mapping[str, Mapping[str, str]]) -> None:
    """The rows go first: whatever is cut off behind this, none is lost."""
    side_of = {path.name: side for side, path in moves}
    for side in sorted({*side_of.values(), *(["train"] if set(rows) - set(side_of) else [])}):
        write_table(
            target / side / "dataset.csv",
            {name: row for name, row in rows.items() if side_of.get(name, "train") == side},
        )
    for side, path in moves:
        path.rename(target / side / path.name)
