"""What images there are: find them on disk, describe them by a CSV, filter and weigh them. Pixels are not touched.

What is made from images (pieces, copies, mixtures) is booked in the CSV with its `origin` and inherits their patients.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from config import Dataset
from files import replacing

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"})
#: What scanners write, and folders: of such, an image may be too large to be anything but a loose one.
SLIDE_SUFFIXES = frozenset({".svs", ".ndpi"})
ZARR_SUFFIX = ".zarr"
LABEL_FOLDERS = ("masks", "labels")
LIST_SUFFIXES = frozenset({".txt", ".csv"})
CSV_COLUMNS = ("source", "major_category", "sub_category", "patient", "origin")
#: Between the names of a cell that holds several.
SEPARATOR = ";"


@dataclass(frozen=True)
class Record:
    """One image and what is known of it.

    Attributes
    ----------
    id : str
    image : path
    masks : path of a label map, tuple of paths of one mask a nucleus, or None where there is no ground truth
    source, major_category, sub_category : str
        From the CSV; empty where it has no row.
    problem : str
        Why it cannot be read, where that is known from the folder alone.
    patient : str
        Specimen; images that share it must stay on one side of a split. An image without one is its own. A mixture
        has several, with semicolons between.
    origin : str
        Ids of all images it was made from, with semicolons between; empty for an image that was taken.
    """

    id: str
    image: Path
    masks: Path | tuple[Path, ...] | None = None
    source: str = ""
    major_category: str = ""
    sub_category: str = ""
    patient: str = ""
    problem: str = ""
    origin: str = ""

    @property
    def patients(self) -> tuple[str, ...]:
        return names_of(self.patient)

    @property
    def origins(self) -> tuple[str, ...]:
        return names_of(self.origin)


def names_of(cell: str) -> tuple[str, ...]:
    """The names in a cell of the CSV that may hold several."""
    return tuple(name.strip() for name in cell.split(SEPARATOR) if name.strip())


def find_records(path: str | Path) -> list[Record]:
    """Find the images at `path`, in any of the layouts the toolkit reads.

    One image file; a folder of loose images, slides (.svs, .ndpi, folders .zarr) among them; the Kaggle layout
    (``<id>/images/<one image>``, ``<id>/masks/<one file per nucleus>``), of one image or of many; a folder ``images``
    with a folder ``masks`` or ``labels`` of label maps of the same names.

    Returns
    -------
    list of Record
        In order of id.

    Raises
    ------
    FileNotFoundError
        `path` does not exist.
    ValueError
        Two images share an id, or there is no image at all.

    Notes
    -----
    An image folder with no image or several, and an image without its label map, make a record with a `problem`:
    whether one bad image stops the work is not decided here.
    """
    path = Path(path)
    if path.is_file():
        return [Record(path.stem, path)]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / "images").is_dir():
        records = _label_map_layout(path) or [_kaggle_record(path)]
    else:
        zarrs = [entry for entry in _subfolders(path) if entry.suffix.lower() == ZARR_SUFFIX]
        kaggle = [entry for entry in _subfolders(path) if (entry / "images").is_dir() and entry not in zarrs]
        loose = [*_files(path, IMAGE_SUFFIXES | SLIDE_SUFFIXES), *zarrs]
        records = [_kaggle_record(folder) for folder in kaggle] + [Record(file.stem, file) for file in loose]
    if not records:
        raise ValueError(f"{path}: no image; wanted image files, or folders with an 'images' folder inside")
    for image_id, n in Counter(record.id for record in records).items():
        if n > 1:
            raise ValueError(f"{path}: {n} images share the id '{image_id}'; rename all but one")
    return sorted(records, key=lambda record: record.id)


def read_table(path: str | Path) -> dict[str, dict[str, str]]:
    """Read a CSV that describes images: id -> column -> value.

    Raises
    ------
    ValueError
        There is no column ``image_id``, an id comes twice, or a row has more cells than there are columns.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "image_id" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: no column 'image_id'; there are: {', '.join(reader.fieldnames or ())}")
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            if row["image_id"] in rows:
                raise ValueError(f"{path}: line {reader.line_num}: '{row['image_id']}' comes twice")
            if None in row:
                raise ValueError(f"{path}: line {reader.line_num}: more cells than the {len(row) - 1} columns")
            rows[row["image_id"]] = row
    return rows


def write_table(path: str | Path, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Write a CSV that describes images; undoes `read_table`.

    Columns that only some rows have are kept, and come behind the known ones where the first row does not have them;
    ``origin`` is written where a row has one.
    A link stays a link: what it points to is written. Lines end as they ended before.
    """
    path = Path(path).resolve()
    ending = "\n"
    if path.is_file():
        with path.open("rb") as old:
            ending = "\r\n" if old.readline().endswith(b"\r\n") else "\n"
    columns = dict.fromkeys([column for row in rows.values() for column in row] or ["image_id"])
    columns |= dict.fromkeys(column for column in CSV_COLUMNS if column != "origin")
    with replacing(path) as stage, stage.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator=ending)
        writer.writeheader()
        writer.writerows(rows.values())


def describe_records(records: Sequence[Record], table: dict[str, dict[str, str]]) -> list[Record]:
    """Add the columns of `table` to the records; a record without a row stays as it is."""
    described = []
    for record in records:
        row = table.get(record.id)
        if row is not None:
            source, major, sub, patient, origin = (row.get(column) or "" for column in CSV_COLUMNS)
            record = replace(
                record, source=source, major_category=major, sub_category=sub, patient=patient, origin=origin
            )
        described.append(record)
    return described


def derive_record(
    id: str, image: Path, parents: Sequence[Record], masks: Path | tuple[Path, ...] | None = None
) -> Record:
    """The record of a piece, a copy or a mixture: it inherits what its parents agree on, and the patients of all."""
    shared = {column: {getattr(parent, column) for parent in parents} for column in CSV_COLUMNS[:3]}
    same = {column: values.pop() if len(values) == 1 else "" for column, values in shared.items()}
    patients = dict.fromkeys(name for parent in parents for name in parent.patients)
    origins = dict.fromkeys(name for parent in parents for name in (parent.id, *parent.origins))
    return Record(id, image, masks, **same, patient=SEPARATOR.join(patients), origin=SEPARATOR.join(origins))


def book_rows(path: str | Path, rows: Mapping[str, Mapping[str, str]], dry_run: bool = False) -> int:
    """Add rows to a CSV that describes images; what is in it already stays as it is.

    Parameters
    ----------
    path : path
        Made where it is missing; a column that is missing is added.
    rows : mapping
        Id -> column -> value, as `read_table` gives them. Ids that are booked already are passed over.
    dry_run : bool
        Write nothing.

    Returns
    -------
    int
        How many rows are new.

    Raises
    ------
    ValueError
        The CSV describes another image under one of the ids.
    """
    path = Path(path)
    table: dict[str, Mapping[str, str]] = dict(read_table(path)) if path.is_file() else {}
    for name, row in rows.items():
        if clash := find_clash(table, name, row):
            raise ValueError(f"{path}: {clash}")
    blank = dict.fromkeys(CSV_COLUMNS, "")
    new = {name: {"image_id": name, **blank, **row} for name, row in rows.items() if name not in table}
    if new and not dry_run:
        write_table(path, table | new)
    return len(new)


def find_clash(table: Mapping[str, Mapping[str, str]], name: str, row: Mapping[str, str]) -> str:
    """Why a row cannot stand for the one of that id in the table, as it is of another image; empty where it can."""
    if name not in table or "origin" not in row:
        return ""
    booked, wanted = table[name].get("origin") or "", row["origin"] or ""
    if booked == wanted:
        return ""
    return f"'{name}' is there with the origin '{booked}', not '{wanted}'; rename that image"


def book_records(path: str | Path, records: Sequence[Record], dry_run: bool = False) -> int:
    """Add a row a record to a CSV that describes images, as `book_rows` does."""
    rows = {r.id: {"image_id": r.id, **{column: getattr(r, column) for column in CSV_COLUMNS}} for r in records}
    return book_rows(path, rows, dry_run)


def read_ids(path: str | Path) -> set[str]:
    """Read a list of ids, one a line: the first cell of a CSV; what follows a # behind a space is a remark."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    ids = {f" {line}".split(" #")[0].split(",")[0].strip() for line in lines}
    return ids - {"", "image_id"}


def filter_records(records: Sequence[Record], options: Dataset, side: str = "") -> list[Record]:
    """Keep what the white lists allow and no black list names.

    An image passes when every white list that is set names its value, and when neither it nor an image it was made
    from is on the black list.

    Parameters
    ----------
    side : {'', 'train', 'valid'}
        Whose lists: those of both sides, or the further ones of one.

    Raises
    ------
    ValueError
        No image passes.
    FileNotFoundError
        The black list names a file that is not there.
    """
    prefix = f"{side}_" if side else ""
    lists = {column: set(getattr(options, prefix + column)) for column in CSV_COLUMNS[:3]}
    wanted = {column: names for column, names in lists.items() if names}
    black = _read_blacklist(getattr(options, f"{prefix}blacklist"), f"{prefix}blacklist")
    kept = [
        record
        for record in records
        if all(getattr(record, column) in names for column, names in wanted.items())
        and black.isdisjoint((record.id, *record.origins))
    ]
    if records and not kept:
        rules = [f"{prefix}{column} = {', '.join(sorted(names))}" for column, names in wanted.items()]
        rules += [f"{prefix}blacklist of {len(black)} ids"] if black else []
        there = "; ".join(f"{column}: {list_values(records, column)}" for column in wanted)
        raise ValueError(
            f"no image passes the filter ({'; '.join(rules)}); is [dataset] csv_file right? There are "
            + (there or f"{len(records)} images, all of them on the black list")
        )
    return kept


def copy_records(records: Sequence[Record], taken: Iterable[str]) -> list[Record]:
    """A copy of each record, with its paths, under the first name ``<id>_copy<n>`` that is not taken."""
    names, copies = set(taken), []
    for record in records:
        name = next(name for n in itertools.count(1) if (name := f"{record.id}_copy{n}") not in names)
        copies.append(derive_record(name, record.image, [record], record.masks))
    return copies


def load_records(folder: Path, data: Path, options: Dataset, beside: Path | None = None) -> list[Record]:
    """The records of `folder`, described by the CSV of the data set (`table_path`) and filtered by the settings."""
    table = table_path(data, options, beside)
    records = find_records(folder)
    if table.is_file():
        records = describe_records(records, read_table(table))
    return filter_records(records, options)


def table_path(data: Path, options: Dataset, beside: Path | None = None) -> Path:
    """The CSV of a data set: that of the settings, or one beside a folder of images, or that of the data folder.

    Parameters
    ----------
    data : path
        The data folder.
    beside : path, optional
        A folder of images that may lie elsewhere. A ``dataset.csv`` next to it comes first, there or not yet, unless
        only the data folder has one.

    Returns
    -------
    path
        It need not be there.

    Raises
    ------
    FileNotFoundError
        The settings name a CSV that is not there.
    """
    if options.csv_file is not None:
        if not options.csv_file.is_file():
            raise FileNotFoundError(f"[dataset] csv_file = {options.csv_file}: no such file")
        return options.csv_file
    inside = data / "dataset.csv"
    near = inside if beside is None else beside.parent / "dataset.csv"
    return near if near.is_file() or not inside.is_file() else inside


def balance_weights(
    records: Sequence[Record], strength: float = 1.0, factors: Mapping[str, float] | None = None
) -> NDArray[np.float64]:
    """How often each record is wanted in an epoch, so that rare sub-categories come more often; the mean is 1.

    Parameters
    ----------
    strength : float
        1: all sub-categories equally often; 0: every image as often; in between, a kind of n images comes as if it had
        ``n ** (1 - strength)``.
    factors : mapping
        Sub-category -> weight on top of that; 1 for those not named.

    Returns
    -------
    (N,) float64

    Raises
    ------
    ValueError
        The factors leave nothing.
    """
    counts = Counter(record.sub_category for record in records)
    factors = factors or {}
    if unknown := factors.keys() - counts.keys():
        logger.warning("[train] category_weights: there is no image of %s", ", ".join(sorted(unknown)))
    weights = np.array([counts[r.sub_category] ** -strength * factors.get(r.sub_category, 1.0) for r in records])
    if not weights.any():
        raise ValueError("[train] category_weights leave no image to train on; all are 0")
    return weights / weights.mean()


def count_by(records: Iterable[Record], key: Callable[[Record], str] = lambda r: r.sub_category) -> dict[str, int]:
    """How many records there are of each kind, in order of name."""
    return dict(sorted(Counter(key(record) for record in records).items()))


def format_counts(records: Iterable[Record]) -> str:
    """How many records there are of each kind, to print."""
    return ", ".join(f"{name or 'uncategorised'} {n}" for name, n in count_by(records).items())


def list_values(records: Iterable[Record], column: str) -> str:
    """The values of a column that there are, to print."""
    return ", ".join(sorted({getattr(record, column) or "(none)" for record in records}))


def _read_blacklist(entries: Iterable[str], key: str) -> set[str]:
    """Ids, and those of the files among the entries."""
    ids: set[str] = set()
    for entry in entries:
        if Path(entry).suffix.lower() not in LIST_SUFFIXES:
            ids.add(entry)
        elif Path(entry).is_file():
            ids |= read_ids(entry)
        else:
            raise FileNotFoundError(f"[dataset] {key} = {entry}: no such file")
    return ids


def _subfolders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))


def _files(path: Path, suffixes: Set[str] = IMAGE_SUFFIXES) -> list[Path]:
    with os.scandir(path) as entries:
        found = (Path(e.path) for e in entries if e.is_file() and not e.name.startswith("."))
        return sorted(file for file in found if file.suffix.lower() in suffixes)


def _kaggle_record(folder: Path) -> Record:
    images = _files(folder / "images")
    if len(images) != 1:
        problem = f"{folder / 'images'}: {len(images)} images, wanted one"
        return Record(folder.resolve().name, folder / "images", problem=problem)
    masks = tuple(_files(folder / "masks")) if (folder / "masks").is_dir() else None
    return Record(folder.resolve().name, images[0], masks)


def _label_map_layout(path: Path) -> list[Record]:
    """Records of a folder of images beside a folder of label maps; empty where the names do not match."""
    images = _files(path / "images")
    for name in LABEL_FOLDERS:
        if not (path / name).is_dir():
            continue
        maps = {file.stem: file for file in _files(path / name)}
        if any(image.stem in maps for image in images) or len(images) > 1:
            lost = f"no label map of that name in {path / name}"
            return [
                Record(
                    image.stem, image, maps.get(image.stem), problem="" if image.stem in maps else f"{image}: {lost}"
                )
                for image in images
            ]
    if len(images) > 1:
        return [Record(image.stem, image) for image in images]
    return []
