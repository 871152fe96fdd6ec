"""What images there are: find them on disk, describe them by a CSV, filter, split and balance them. Pixels are not
touched.

What is made from images (pieces, copies, mixtures) is booked in the CSV with its `origin` and inherits their patients;
records are kin where they share either, and no split parts kin.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from config import Dataset
from files import replacing

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"})
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
        there = "; ".join(f"{column}: {_list_values(records, column)}" for column in wanted)
        raise ValueError(
            f"no image passes the filter ({'; '.join(rules)}); is [dataset] csv_file right? There are "
            + (there or f"{len(records)} images, all of them on the black list")
        )
    return kept


def split_records(
    records: Sequence[Record], ratio: float, seed: int, by: str = "patient"
) -> tuple[list[Record], list[Record]]:
    """Split into training and validation records.

    Kin stay together, and every sub-category gives about `ratio` of its images.

    Parameters
    ----------
    ratio : float
        Share of the images for validation; 0 puts all into training.
    seed : int
        The same seed and records give the same split.
    by : {'patient', 'image'}
        What must not be parted.

    Notes
    -----
    What was made from images that are there counts nothing, so that adding copies or stitched images to a training set
    does not move the images it was trained on to the other side.
    """
    rng = np.random.default_rng(seed)
    ids = {record.id for record in records}
    valid: set[str] = set()
    for members in _stratify(records, by):
        sizes = [sum(not ids.intersection(names_of(record.origin)) for record in group) for group in members]
        quota, taken = ratio * sum(sizes), 0
        for i in rng.permutation(len(members)):
            if taken + sizes[i] / 2 <= quota and ratio > 0:
                valid.update(record.id for record in members[i])
                taken += sizes[i]
    return [r for r in records if r.id not in valid], [r for r in records if r.id in valid]


def fold_records(
    records: Sequence[Record], n_folds: int, fold: int, seed: int, by: str = "patient"
) -> tuple[list[Record], list[Record]]:
    """Training and validation records of one of `n_folds` folds; each record validates in exactly one of them.

    Kin stay together. Every sub-category is dealt out evenly: the largest groups first, each to the fold that has the
    fewest images of the kind (of equal ones, the fewest in all).

    Parameters
    ----------
    n_folds : int
        At least 2.
    fold : int
        1..n_folds
    seed : int
        The same seed and records give the same folds.
    by : {'patient', 'image'}
        What must not be parted.

    Raises
    ------
    ValueError
        There are fewer groups than folds.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(n_folds, int)
    place: dict[str, int] = {}
    for members in _stratify(records, by):
        own = np.zeros(n_folds, int)
        for i in sorted(rng.permutation(len(members)), key=lambda i: -len(members[i])):
            target = np.lexsort((total, own))[0]
            own[target] += len(members[i])
            total[target] += len(members[i])
            place.update((record.id, int(target) + 1) for record in members[i])
    if not total.all():
        what = "patients" if by == "patient" else "images"
        raise ValueError(f"[dataset] cv_folds = {n_folds}: there are too few {what} for so many, a fold stays empty")
    return [r for r in records if place[r.id] != fold], [r for r in records if place[r.id] == fold]


def leave_out_records(
    records: Sequence[Record], names: Sequence[str], by: str = "patient"
) -> tuple[list[Record], list[Record]]:
    """All but some sub-categories to train on, and those to validate.

    What is kin of a validation image but of another sub-category is in neither.

    Raises
    ------
    ValueError
        A name is no sub-category of the records, or nothing is left to train on.
    """
    unknown = set(names) - {record.sub_category for record in records}
    if unknown:
        there = _list_values(records, "sub_category")
        raise ValueError(f"[dataset] leave_out = {', '.join(sorted(unknown))}: no such sub_category; there are {there}")
    valid = [record for record in records if record.sub_category in names]
    out = {r.id for group in group_records(records, by) if any(r.sub_category in names for r in group) for r in group}
    train = [record for record in records if record.id not in out]
    if not train:
        raise ValueError(f"[dataset] leave_out = {', '.join(names)} leaves nothing to train on")
    if len(out) > len(valid):
        logger.info(
            "%d images of other kinds share a patient with those left out, and are not used", len(out) - len(valid)
        )
    return train, valid


def split_by_ids(records: Sequence[Record], path: str | Path) -> tuple[list[Record], list[Record]]:
    """Split by a list of validation ids, one a line.

    What was made from listed images alone validates, too; a mixture of listed and other images is in neither.

    Raises
    ------
    FileNotFoundError, ValueError
        No such list; or none of its ids is among the records.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"[dataset] valid_ids = {path}: no such file")
    ids = read_ids(path)
    known = {name for record in records for name in (record.id, *record.origins)}
    if not ids & known:
        raise ValueError(f"[dataset] valid_ids = {path}: none of its {len(ids)} ids is among the {len(known)} images")
    if ids - known:
        logger.warning("%s: %d of its %d ids are not among the images", path, len(ids - known), len(ids))
    touched = {r.id for r in records if r.id in ids or ids & set(r.origins)}
    pure = {r.id for r in records if r.id in ids or (r.id in touched and set(r.origins) <= ids | touched)}
    if len(touched) > len(pure):
        logger.info("%d mixtures of validation and other images are not used", len(touched) - len(pure))
    return [r for r in records if r.id not in touched], [r for r in records if r.id in pure]


def load_split(data: Path, options: Dataset) -> tuple[list[Record], list[Record]]:
    """The training and validation records of a data folder, as the settings have it.

    ``data/train`` (or `data` itself, where it has no such folder) split by ``valid_ids``, ``cv_folds`` or
    ``leave_out`` where one is set; else ``data/train`` and ``data/valid`` where both are there; else split by
    ``cv_ratio`` and ``cv_seed``. The lists of either side are applied last, so they never move an image to the other.
    """
    folder = data / "train" if (data / "train").is_dir() else data
    records = load_records(folder, data, options)
    if not options.divides and (data / "valid").is_dir():
        return _filter_sides(records, load_records(data / "valid", data, options), options)
    return divide_records(records, options)


def divide_records(records: Sequence[Record], options: Dataset) -> tuple[list[Record], list[Record]]:
    """Training and validation records by ``valid_ids``, ``cv_folds`` or ``leave_out``, else by ``cv_ratio``."""
    if options.valid_ids is not None:
        train, valid = split_by_ids(records, options.valid_ids)
    elif options.cv_folds:
        train, valid = fold_records(records, options.cv_folds, options.cv_fold, options.cv_seed, options.cv_group)
    elif options.leave_out:
        train, valid = leave_out_records(records, options.leave_out, options.cv_group)
    else:
        train, valid = split_records(records, options.cv_ratio, options.cv_seed, options.cv_group)
    return _filter_sides(train, valid, options)


def join_records(
    records: Sequence[Record], train: Sequence[Record], valid: Sequence[Record], options: Dataset
) -> tuple[list[Record], list[Record]]:
    """Which of `records`, new to a split that is there, join its training and its validation side.

    A record joins the side of its kin; those without kin there are divided by the settings.
    """
    held, trained = {record.id for record in valid}, {record.id for record in train}
    sides: dict[str, list[Record]] = {"train": [], "valid": [], "new": []}
    new = {record.id: record for record in records if record.id not in held | trained}
    for group in group_records([*train, *valid, *new.values()], options.cv_group):
        ids = {record.id for record in group}
        side = "valid" if ids & held else "train" if ids & trained else "new"
        sides[side] += [new[record.id] for record in group if record.id in new]
    more_train, more_valid = divide_records(sides["new"], options) if sides["new"] else ([], [])
    return sides["train"] + more_train, sides["valid"] + more_valid


def copy_records(records: Sequence[Record], taken: Iterable[str]) -> list[Record]:
    """A copy of each record, with its paths, under the first name ``<id>_copy<n>`` that is not taken."""
    names, copies = set(taken), []
    for record in records:
        name = next(name for n in itertools.count(1) if (name := f"{record.id}_copy{n}") not in names)
        copies.append(derive_record(name, record.image, [record], record.masks))
    return copies


def load_records(folder: Path, data: Path, options: Dataset) -> list[Record]:
    """The records of `folder`, described by the CSV of the data set and filtered by the settings."""
    table = table_path(data, options)
    records = find_records(folder)
    if table.is_file():
        records = describe_records(records, read_table(table))
    return filter_records(records, options)


def table_path(data: Path, options: Dataset) -> Path:
    """The CSV of a data folder; one that the settings do not name need not be there."""
    if options.csv_file is not None and not options.csv_file.is_file():
        raise FileNotFoundError(f"[dataset] csv_file = {options.csv_file}: no such file")
    return options.csv_file or data / "dataset.csv"


def group_records(records: Sequence[Record], by: str = "patient") -> list[list[Record]]:
    """Records that must not be parted, group by group, in order of id.

    Parameters
    ----------
    by : {'patient', 'image'}
        'image': an image and what was made from it are kin; 'patient': images of a patient are, too. A mixture makes
        kin of all it was made from.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    ordered = sorted(records, key=lambda record: record.id)
    for record in ordered:
        for tie in _ties(record, by):
            leader[find(tie)] = find(f"image {record.id}")
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in ordered:
        groups[find(f"image {record.id}")].append(record)
    return list(groups.values())


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


def format_epoch(train: Sequence[Record], valid: Sequence[Record], weights: NDArray[np.float64] | None) -> str:
    """A table of what an epoch will contain: a line a sub-category, to print.

    Parameters
    ----------
    weights : (N,) float64, optional
        How often each of the N training records is wanted, as `balance_weights` gives it; once each where not given.
    """
    weights = np.ones(len(train)) if weights is None else weights
    kinds = sorted({record.sub_category for record in (*train, *valid)})
    of = np.array([kinds.index(record.sub_category) for record in train], int)
    images, drawn = np.bincount(of, minlength=len(kinds)), np.bincount(of, weights, minlength=len(kinds))
    held = Counter(record.sub_category for record in valid)
    rows = [(k or "uncategorised", int(n), d, held[k]) for k, n, d in zip(kinds, images, drawn, strict=True)]
    rows.append(("all", len(train), float(drawn.sum()), len(valid)))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'':{width}}  training  an epoch   each  validation"]
    for name, n, d, v in rows:
        lines.append(f"{name:{width}}  {n:8}  {d:8.0f}  {f'{d / n:.1f}x' if n else '-':>5}  {v:10}")
    return "\n".join(lines)


def count_by(records: Iterable[Record], key: Callable[[Record], str] = lambda r: r.sub_category) -> dict[str, int]:
    """How many records there are of each kind, in order of name."""
    return dict(sorted(Counter(key(record) for record in records).items()))


def format_counts(records: Iterable[Record]) -> str:
    """How many records there are of each kind, to print."""
    return ", ".join(f"{name or 'uncategorised'} {n}" for name, n in count_by(records).items())


def _list_values(records: Iterable[Record], column: str) -> str:
    return ", ".join(sorted({getattr(record, column) or "(none)" for record in records}))


def _ties(record: Record, by: str) -> list[str]:
    """What makes records kin, in a name space a kind: a patient may be called like an image."""
    patients = record.patients if by == "patient" else ()
    return [f"image {name}" for name in record.origins] + [f"patient {name}" for name in patients]


def _stratify(records: Sequence[Record], by: str) -> list[list[list[Record]]]:
    """Groups of kin, those of each sub-category together, in order of its name."""
    strata: dict[str, list[list[Record]]] = defaultdict(list)
    for group in group_records(records, by):
        strata[group[0].sub_category].append(group)
    return [strata[name] for name in sorted(strata)]


def _filter_sides(
    train: Sequence[Record], valid: Sequence[Record], options: Dataset
) -> tuple[list[Record], list[Record]]:
    """Apply the lists of either side, and tell where kin stand on both."""
    train, valid = filter_records(train, options, "train"), filter_records(valid, options, "valid")
    held = {id(record) for record in valid}
    sides = ({id(record) in held for record in group} for group in group_records([*train, *valid], options.cv_group))
    if parted := sum(len(side) > 1 for side in sides):
        logger.warning("%d patients have images on both sides of the split; scores will flatter", parted)
    return train, valid


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
