"""Bring new images into the data set and take them out again: check, skip what is there, place, book in the CSV."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from annotation import write_sample
from config import DEFAULT_POLICY, Policy
from image import ImageError, read_image, read_labels, read_mask, read_pixels
from labels import same_instances
from likeness import pixel_hash
from outline import Annotation, draw, read_outlines
from record import SEPARATOR, Record, book_rows, find_clash, find_records, names_of, read_table, write_table

logger = logging.getLogger(__name__)

OUTLINE_SUFFIXES = frozenset({".xml", ".json", ".geojson"})
SIDES = ("train", "valid")


class Source(NamedTuple):
    """An image to be added; its nuclei are those of the annotation, where there is one, else of its masks."""

    record: Record
    annotation: Annotation | None = None

    def read(self) -> NDArray[np.int32] | None:
        """Its label map, (H, W); None where nobody says what its nuclei are."""
        shape = read_pixels(self.record.image).array.shape[:2]
        if self.annotation is not None:
            return draw(self.annotation.outlines, shape)[0]
        return None if self.record.masks is None else read_labels(self.record.masks, shape)


#: Hash of the pixels -> the images that have them, each with its id.
Index = dict[str, list[tuple[str, Source]]]


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


def ids_in(data: Path) -> set[str]:
    """Ids of all images of the data set, whatever the settings make of them."""
    return {record.id for folder in sides_of(data).values() for record in records_in(folder)}


def find_sources(folder: Path, outlines: Path | None = None) -> tuple[list[Source], list[str]]:
    """The images of a folder, and a line for each file of outlines that says nothing of them.

    Parameters
    ----------
    folder
        Any layout of `record.find_records`; beside images without masks, files of outlines: ``<id>.xml``,
        ``<id>.geojson``, or COCO's JSON for all.
    outlines
        Where the files of outlines are, if not in `folder`. An image that they name has these outlines, whatever its
        masks are.

    Raises
    ------
    FileNotFoundError, ValueError
        No images, or a file of outlines that cannot be read.
    """
    records = find_records(folder)
    wanted = {record.id for record in records if record.masks is None or outlines is not None}
    masked = {record.id for record in records} - wanted
    annotations: dict[str, Annotation] = {}
    unused: list[str] = []
    for path in _outline_files(outlines or folder):
        # Where all images have masks, files beside them may be anything; their names alone are looked at.
        found = read_outlines(path) if wanted else {path.stem: Annotation()} if path.stem in masked else {}
        unused += _unused(path, found, wanted, masked)
        for image_id in found.keys() & wanted:
            known = annotations.setdefault(image_id, Annotation())
            known.outlines += found[image_id].outlines
            known.refused += found[image_id].refused
    return [Source(record, annotations.get(record.id)) for record in records], unused


def add_images(
    sources: Sequence[Source],
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
        Stands before each id, of the images and of what they were made from, where that comes with them.
    policy
        How the settings want images read, as `image.read_image` takes it: what cannot be read so is refused.
    """
    folders = sides_of(data)
    target = folders.get(side, data / side)
    existing = _index(dict.fromkeys([*folders.values(), target]))
    taken = {name for twins in existing.values() for name, _ in twins}
    booked = read_table(table) if table.is_file() else {}
    wanted = _prefixed(rows, prefix, {source.record.id for source in sources})
    outcome = Outcome(target)
    for source in tqdm(sources, "adding", unit="image", disable=None):
        name = prefix + source.record.id
        try:
            digest = _checked_hash(source.record, policy)
            if clash := find_clash(booked, name, wanted.get(name, {})):
                raise ImageError(f"{table}: {clash}")
            if digest in existing:
                outcome.present.append(_find_twin(name, source, existing[digest]))
                continue
            if name in taken or (target / name).exists():
                raise ImageError(
                    f"{source.record.image}: another image is called {name} already; --prefix gives new names"
                )
            outcome.n_nuclei += _place(source, target / name, outcome.refused, dry_run)
            outcome.done.append(name)
            existing[digest] = [(name, source)]
            taken.add(name)
        except ImageError as error:
            outcome.refused.append(str(error))
    placed = {*outcome.done, *outcome.present}  # a row may be missing if an earlier call was cut off
    outcome.n_rows = book_rows(table, {name: row for name, row in wanted.items() if name in placed}, dry_run)
    return outcome


def remove_images(
    data: Path, table: Path, ids: Iterable[str] = (), sources: Iterable[str] = (), *, dry_run: bool = False
) -> Outcome:
    """Move images, and their rows, out of the data set into ``removed/<side>`` of the data folder.

    Nothing is deleted: adding that folder brings them back. The table keeps the rows of images that another folder of
    the data folder still holds, or these would lose their patient; a row without any image goes.

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
    paths = {path for _, path in moves}
    moved = {path.name for path in paths}
    held = _held(data, paths)
    gone = (chosen & set(rows)) - held
    outcome = Outcome(_fresh(data / "removed"), done=[path.name for _, path in moves], n_rows=len(gone))
    outcome.refused = [
        f"{name}: no image of that id in {' or '.join(sides_of(data))}" + (", its row stays" if name in rows else "")
        for name in sorted(ids - moved - gone)
    ]
    if not moves and not gone:
        what = [f"source {name}" for name in sorted(sources)] + sorted(ids)
        raise ValueError(f"{data}: nothing to remove of {', '.join(what)} in {' or '.join(sides_of(data))}")
    if not dry_run:
        _move(moves, outcome.folder, {name: rows[name] for name in chosen & set(rows) & (moved | gone)})
        if gone:
            write_table(table, {name: row for name, row in rows.items() if name not in gone})
    return outcome


def _held(data: Path, moved: set[Path]) -> set[str]:
    """Names of what lies in the folders of the data folder, but for what is moved: images, or folders of one."""
    there = (path for pattern in ("*/*", "*/images/*") for path in data.glob(pattern) if path not in moved)
    return {name for path in there for name in (path.name, path.stem)}


def _kaggle_records(folder: Path) -> list[Record]:
    records = records_in(folder)
    for record in records:
        if folder / record.id / "images" not in (record.image, record.image.parent):
            raise ValueError(
                f"{record.image}: not in the Kaggle layout (<id>/images/<one image>), wanted for add, remove"
            )
    return records


def _index(folders: Iterable[Path]) -> Index:
    """All images of the data set by their pixels."""
    index: Index = {}
    records = [record for folder in folders for record in _kaggle_records(folder) if not record.problem]
    for record in tqdm(records, "reading what is there", unit="image", disable=None):
        try:
            index.setdefault(pixel_hash(*read_pixels(record.image)), []).append((record.id, Source(record)))
        except ImageError as error:
            logger.warning("%s", error)
    return index


def _find_twin(name: str, source: Source, twins: Sequence[tuple[str, Source]]) -> str:
    """Which image of the same pixels has the same nuclei, in words.

    Raises
    ------
    ImageError
        None has: what is new about the image would be lost if it were passed over.
    """
    labels = source.read()
    for other, twin in sorted(twins, key=lambda twin: twin[0] != name):
        there = twin.read() if labels is not None else None
        if labels is None or (there is not None and same_instances(labels, there)):
            return name if other == name else f"{name} (as {other})"
    names = [other for other, _ in twins]
    raise ImageError(
        f"{source.record.image}: is there with other masks, as {' and '.join(names)}; "
        f"prepare.py remove {' '.join(names)} first"
    )


def _prefixed(rows: Mapping[str, Mapping[str, str]], prefix: str, ids: set[str]) -> dict[str, dict[str, str]]:
    """Rows under their new ids; a row that says what its image was made from says it by the new ids, too."""
    renamed = {}
    for name, row in rows.items():
        renamed[prefix + name] = {**row, "image_id": prefix + name}
        if row.get("origin"):
            origins = [prefix + origin if origin in ids else origin for origin in names_of(row["origin"])]
            renamed[prefix + name]["origin"] = SEPARATOR.join(origins)
    return renamed


def _outline_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of outlines")
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in OUTLINE_SUFFIXES and not path.name.startswith(".")
    )


def _unused(path: Path, found: Iterable[str], wanted: set[str], masked: set[str]) -> list[str]:
    """What a file of outlines says of images that are not there, or that have masks."""
    lines = [
        f"{path.name}: {name} has masks, and these count; --outlines {path.parent} takes its outlines"
        for name in sorted(masked.intersection(found))
    ]
    if lost := sorted(set(found) - wanted - masked):
        more = f", ... ({len(lost)} in all)" if len(lost) > 3 else ""
        lines.append(f"{path.name}: outlines of {', '.join(lost[:3])}{more}, and there is no such image")
    return lines


def _checked_hash(record: Record, policy: Policy) -> str:
    if record.problem:
        raise ImageError(record.problem)
    read_image(record.image, *policy)
    return pixel_hash(*read_pixels(record.image))


def _place(source: Source, target: Path, notes: list[str], dry_run: bool) -> int:
    """Put image and masks into the new folder `target`; the number of nuclei."""
    record, annotation = source
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
        name = f"{target.name}{record.image.suffix.lower()}"
        write_sample(
            target.parent,
            target.name,
            lambda images: shutil.copyfile(record.image, images / name),
            files if labels is None else labels,
        )
    return len(files) if labels is None else int(labels.max(initial=0))


def _whole_masks(masks: Sequence[Path], shape: tuple[int, int], notes: list[str]) -> list[Path]:
    """The masks that hold a nucleus. They are copied as they are: where they overlap, nothing is lost."""
    read_labels(masks, shape)  # raises where one is of another image
    filled = [path for path in masks if read_mask(path).any()]
    notes += [f"{path}: no nucleus, left out" for path in masks if path not in filled]
    return filled


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
