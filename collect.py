"""Bring new images into the data set and take them out again: check, skip what is there, place, book in the CSV."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from annotation import write_sample
from config import DEFAULT_POLICY, Policy
from division import find_parted
from image import ImageError, read_image, read_labels, read_mask, read_pixels
from labels import same_instances
from likeness import pixel_hash
from outline import Annotation, draw, read_outlines
from record import (
    SEPARATOR,
    Record,
    book_rows,
    describe_records,
    find_clash,
    find_records,
    names_of,
    read_table,
    write_table,
)

logger = logging.getLogger(__name__)

OUTLINE_SUFFIXES = frozenset({".xml", ".json", ".geojson"})
SIDES = ("train", "valid")
#: Folder of the data folder that prediction writes to, by the ids of images; it holds none.
PREDICTED = "predict"
#: Images that a line names, before it only counts.
N_NAMED = 3


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
    tables : dict of str to path
        Of a removal: ``train`` and ``valid``, as far as anything came from there, and the table of what did.
    derived : list of str
        Of a removal: images of the data set that were made from what was removed, and stay.
    """

    folder: Path
    done: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    n_nuclei: int = 0
    n_rows: int = 0
    tables: dict[str, Path] = field(default_factory=dict)
    derived: list[str] = field(default_factory=list)


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


def describe_sources(
    sources: Sequence[Source], own: Path, given: Mapping[str, str]
) -> tuple[list[Source], dict[str, dict[str, str]], list[str]]:
    """The images of which something is known, a row of each, and a line for each of which nothing is.

    Parameters
    ----------
    own : path
        The table that came with the images; it need not be there.
    given : mapping
        Column -> what the user says of all; it counts more than the table. With a ``source`` no image needs a row.
    """
    known = read_table(own) if own.is_file() else {}
    described = [source for source in sources if "source" in given or source.record.id in known]
    rows = {record.id: {**known.get(record.id, {}), **given} for record, _ in described}
    lines = [
        f"{source.record.image}: {own} has no row '{source.record.id}', so its patient would be lost; "
        "take its row along (prepare.py remove says where it is), or name a --source"
        for source in sources
        if source.record.id not in rows
    ]
    return described, rows, lines


def add_images(
    sources: Sequence[Source],
    data: Path,
    table: Path,
    rows: Mapping[str, Mapping[str, str]],
    *,
    side: str = "train",
    prefix: str = "",
    policy: Policy = DEFAULT_POLICY,
    by: str = "patient",
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
    by
        What makes kin, as `division.group_records` takes it: an image for ``train`` is refused where it has kin in
        ``valid``, and the other way round. Empty where folders do not say which images validate.
    """
    folders = sides_of(data)
    target = folders.get(side, data / side)
    existing = _index(dict.fromkeys([*folders.values(), target]))
    taken = {name for twins in existing.values() for name, _ in twins}
    booked = read_table(table) if table.is_file() else {}
    wanted = _prefixed(rows, prefix, {source.record.id for source in sources})
    parted = _parted({prefix + record.id: record for record, _ in sources}, folders, side, wanted | booked, by)
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
            if name in parted:
                raise ImageError(f"{source.record.image}: {parted[name]}")
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
    data: Path,
    table: Path,
    ids: Iterable[str] = (),
    sources: Iterable[str] = (),
    *,
    derived: bool = False,
    dry_run: bool = False,
) -> Outcome:
    """Move images, and their rows, out of the data set into ``removed/<side>`` of the data folder.

    Nothing is deleted: adding that folder brings them back. The table keeps the rows of images that another folder of
    the data folder still holds, or these would lose their patient; a row without any image goes.

    Parameters
    ----------
    data, table
        The data folder and the CSV that describes its images.
    ids, sources
        Which images: by id, and all of a ``source``.
    derived
        Take along what was made from them: pieces, copies, mixtures.
    dry_run
        Say what would be done, and do nothing.

    Raises
    ------
    ValueError
        There is nothing of that kind, or the data set is not in the Kaggle layout.
    """
    ids, sources = set(ids), set(sources)
    rows = read_table(table) if table.is_file() else {}
    chosen = {name for name, row in rows.items() if row.get("source") in sources} | ids
    there = [
        (side, folder / record.id) for side, folder in sides_of(data).items() for record in _kaggle_records(folder)
    ]
    made = _made_from(chosen, {path.name for _, path in there}, rows)
    chosen |= made if derived else set()
    moves = [(side, path) for side, path in there if path.name in chosen]
    paths = {path for _, path in moves}
    moved = {path.name for path in paths}
    held = _held(data, paths)
    gone = (chosen & set(rows)) - held
    outcome = Outcome(_fresh(data / "removed"), done=[path.name for _, path in moves], n_rows=len(gone))
    outcome.derived = sorted(made - moved)
    outcome.refused = [
        f"{name}: no image of that id in {' or '.join(sides_of(data))}" + (", its row stays" if name in rows else "")
        for name in sorted(ids - moved - gone)
        if not _made_from({name}, moved, rows)
    ]
    if not moves and not gone:
        what = [f"source {name}" for name in sorted(sources)] + sorted(ids)
        hint = f"; --derived takes what was made from it: {name_some(outcome.derived)}" if outcome.derived else ""
        raise ValueError(f"{data}: nothing to remove of {', '.join(what)} in {' or '.join(sides_of(data))}{hint}")
    parts = _part_rows(moves, {name: rows[name] for name in chosen & set(rows) & (moved | gone)})
    outcome.tables = {side: outcome.folder / side / "dataset.csv" for side in parts}
    if not dry_run:
        for side, part in parts.items():  # the rows go first: whatever is cut off behind this, none is lost
            write_table(outcome.tables[side], part)
        for side, path in moves:
            path.rename(outcome.folder / side / path.name)
        if gone:
            write_table(table, {name: row for name, row in rows.items() if name not in gone})
    return outcome


def name_some(names: Sequence[str]) -> str:
    """The first few of some names, and how many there are, in words."""
    more = f", ... ({len(names)} in all)" if len(names) > N_NAMED else ""
    return ", ".join(names[:N_NAMED]) + more


def _held(data: Path, moved: set[Path]) -> set[str]:
    """Names of what lies in the folders of the data folder, but for what is moved: images, or folders of one."""
    folders = (folder for folder in data.glob("*") if folder.name != PREDICTED)
    there = (path for folder in folders for pattern in ("*", "images/*") for path in folder.glob(pattern))
    return {name for path in there if path not in moved for name in (path.name, path.stem)}


def _made_from(chosen: set[str], names: set[str], rows: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Which of some images were made from chosen ones, and are not chosen themselves."""
    return {
        name
        for name in names - chosen
        if name in rows and not chosen.isdisjoint(names_of(rows[name].get("origin") or ""))
    }


def _parted(
    new: Mapping[str, Record],
    folders: Mapping[str, Path],
    side: str,
    table: dict[str, dict[str, str]],
    by: str,
) -> dict[str, str]:
    """Why images, by their id in the data set, must not go to a side: they have kin on the other."""
    if side not in SIDES or not by:
        return {}
    other = SIDES[1 - SIDES.index(side)]
    here, there = (
        describe_records(records_in(folders[name]) if name in folders else [], table) for name in (side, other)
    )
    taken = {record.id for record in (*here, *there)}
    strangers = [replace(record, id=name) for name, record in new.items() if name not in taken]
    return {
        name: f"has kin in {folders[other]}: {name_some(kin)}; --to {other} keeps them together"
        for name, kin in find_parted(describe_records(strangers, table), here, there, by).items()
    }


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
        lines.append(f"{path.name}: outlines of {name_some(lost)}, and there is no such image")
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


def _part_rows(
    moves: Sequence[tuple[str, Path]], rows: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Mapping[str, str]]]:
    """Side -> the rows of its images; an image of both sides has its row in both, a row without image in the first."""
    parts: dict[str, dict[str, Mapping[str, str]]] = defaultdict(dict)
    for side, path in moves:
        parts[side] |= {path.name: rows[path.name]} if path.name in rows else {}
    for name in sorted(set(rows) - {path.name for _, path in moves}):
        parts[SIDES[0]][name] = rows[name]
    return dict(parts)
