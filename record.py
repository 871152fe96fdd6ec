"""What images there are: find them on disk, describe them by a CSV, filter, split and balance them. Pixels are not
touched."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import Dataset
from files import replacing

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"})
LABEL_FOLDERS = ("masks", "labels")
CSV_COLUMNS = ("source", "major_category", "sub_category", "patient")


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
        Specimen; images that share it must stay on one side of a split. An image without one is its own.
    """

    id: str
    image: Path
    masks: Path | tuple[Path, ...] | None = None
    source: str = ""
    major_category: str = ""
    sub_category: str = ""
    patient: str = ""
    problem: str = ""


def find_records(path: str | Path) -> list[Record]:
    """Find the images at `path`, in any of the layouts the toolkit reads.

    One image file; a folder of loose images; the Kaggle layout (``<id>/images/<one image>``, ``<id>/masks/<one file per
    nucleus>``), of one image or of many; a folder ``images`` with a folder ``masks`` or ``labels`` of label maps of
    the same names.

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
        kaggle = [entry for entry in _subfolders(path) if (entry / "images").is_dir()]
        records = [_kaggle_record(folder) for folder in kaggle] + [Record(file.stem, file) for file in _files(path)]
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
        There is no column ``image_id``, or an id comes twice.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "image_id" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: no column 'image_id'; there are: {', '.join(reader.fieldnames or ())}")
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            if row["image_id"] in rows:
                raise ValueError(f"{path}: line {reader.line_num}: '{row['image_id']}' comes twice")
            rows[row["image_id"]] = row
    return rows


def write_table(path: str | Path, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Write a CSV that describes images; undoes `read_table`.

    Columns that only some rows have are kept, and come behind the known ones where the first row does not have them.
    A link stays a link: what it points to is written. Lines end as they ended before.
    """
    path = Path(path).resolve()
    ending = "\n"
    if path.is_file():
        with path.open("rb") as old:
            ending = "\r\n" if old.readline().endswith(b"\r\n") else "\n"
    columns = dict.fromkeys([column for row in rows.values() for column in row] or ["image_id"])
    columns |= dict.fromkeys(CSV_COLUMNS)
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
            source, major, sub, patient = (row.get(column) or "" for column in CSV_COLUMNS)
            record = replace(record, source=source, major_category=major, sub_category=sub, patient=patient)
        described.append(record)
    return described


def filter_records(records: Sequence[Record], options: Dataset) -> list[Record]:
    """Keep what the white lists allow; an image passes when every list that is set names its value."""
    wanted = {column: set(getattr(options, column)) for column in CSV_COLUMNS[:3] if getattr(options, column)}
    kept = [r for r in records if all(getattr(r, column) in names for column, names in wanted.items())]
    if records and not kept:
        rules = "; ".join(f"{column} = {', '.join(sorted(names))}" for column, names in wanted.items())
        raise ValueError(f"no image passes the filter ({rules}); is [dataset] csv_file right?")
    return kept


def split_records(
    records: Sequence[Record], ratio: float, seed: int, by: str = "patient"
) -> tuple[list[Record], list[Record]]:
    """Split into training and validation records.

    Groups that share a patient stay together, and every sub-category gives about `ratio` of its images.

    Parameters
    ----------
    ratio : float
        Share of the images for validation; 0 puts all into training.
    seed : int
        The same seed and records give the same split.
    by : {'patient', 'image'}
        What must not be parted.
    """
    rng = np.random.default_rng(seed)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.id):
        groups[_group_key(record, by)].append(record)
    strata: dict[str, list[list[Record]]] = defaultdict(list)
    for group in groups.values():
        strata[group[0].sub_category].append(group)
    valid: set[str] = set()
    for name in sorted(strata):
        members = strata[name]
        quota = ratio * sum(map(len, members))
        taken = 0
        for i in rng.permutation(len(members)):
            if taken + len(members[i]) / 2 <= quota and ratio > 0:
                valid.update(record.id for record in members[i])
                taken += len(members[i])
    return [r for r in records if r.id not in valid], [r for r in records if r.id in valid]


def split_by_ids(records: Sequence[Record], path: str | Path) -> tuple[list[Record], list[Record]]:
    """Split by a list of validation ids, one a line.

    Raises
    ------
    FileNotFoundError, ValueError
        No such list; or none of its ids is among the records.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"[dataset] valid_ids = {path}: no such file")
    ids = {line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()} - {""}
    known = {record.id for record in records}
    if not ids & known:
        raise ValueError(f"[dataset] valid_ids = {path}: none of its {len(ids)} ids is among the {len(known)} images")
    if ids - known:
        logger.warning("%s: %d of its %d ids are not among the images", path, len(ids - known), len(ids))
    return [r for r in records if r.id not in ids], [r for r in records if r.id in ids]


def load_split(data: Path, options: Dataset) -> tuple[list[Record], list[Record]]:
    """The training and validation records of a data folder, as the settings have it.

    ``data/train`` (or `data` itself, where it has no such folder) split by ``valid_ids`` where that is set; else
    ``data/train`` and ``data/valid`` where both are there; else split by ``cv_ratio`` and ``cv_seed``.
    """
    folder = data / "train" if (data / "train").is_dir() else data
    records = load_records(folder, data, options)
    if options.valid_ids is None and (data / "valid").is_dir():
        return records, load_records(data / "valid", data, options)
    return divide_records(records, options)


def divide_records(records: Sequence[Record], options: Dataset) -> tuple[list[Record], list[Record]]:
    """Training and validation records by the settings: by ``valid_ids`` where it is set, else by ``cv_ratio``."""
    if options.valid_ids is not None:
        return split_by_ids(records, options.valid_ids)
    return split_records(records, options.cv_ratio, options.cv_seed, options.cv_group)


def load_records(folder: Path, data: Path, options: Dataset) -> list[Record]:
    """The records of `folder`, described by the CSV of the data set and filtered by the settings."""
    table = options.csv_file or data / "dataset.csv"
    if options.csv_file is not None and not table.is_file():
        raise FileNotFoundError(f"[dataset] csv_file = {table}: no such file")
    records = find_records(folder)
    if table.is_file():
        records = describe_records(records, read_table(table))
    return filter_records(records, options)


def balance_weights(records: Sequence[Record], strength: float = 1.0) -> np.ndarray:
    """How often each record is wanted in an epoch, so that rare sub-categories come more often; the mean is 1.

    Parameters
    ----------
    strength : float
        1: all sub-categories equally often; 0: every image as often; in between, a kind of n images comes as if it had
        ``n ** (1 - strength)``.

    Returns
    -------
    (N,) float64
    """
    counts = Counter(record.sub_category for record in records)
    weights = np.array([float(counts[record.sub_category]) ** -strength for record in records])
    return weights / weights.mean()


def count_by(records: Iterable[Record], key: Callable[[Record], str] = lambda r: r.sub_category) -> dict[str, int]:
    """How many records there are of each kind, in order of name."""
    return dict(sorted(Counter(key(record) for record in records).items()))


def format_counts(records: Iterable[Record]) -> str:
    """How many records there are of each kind, to print."""
    return ", ".join(f"{name or 'uncategorised'} {n}" for name, n in count_by(records).items())


def _group_key(record: Record, by: str) -> str:
    return f"patient {record.patient}" if by == "patient" and record.patient else f"image {record.id}"


def _subfolders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))


def _files(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        found = (Path(e.path) for e in entries if e.is_file() and not e.name.startswith("."))
        return sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)


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
