"""Which images are trained on and which validate: by a list, by folds, by kind or by a ratio.

Records are kin where they share a patient or an image they were made from, and no division parts kin.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from columns import align
from config import SPLIT_KEYS, Config, Dataset
from files import is_filled
from record import (
    CSV_COLUMNS,
    Record,
    describe_records,
    filter_records,
    find_records,
    list_values,
    load_records,
    read_ids,
    read_table,
    table_path,
)

logger = logging.getLogger(__name__)

#: The settings that choose images before they are divided, and all that choose images.
COMMON_LISTS = (*CSV_COLUMNS[:3], "blacklist")
LISTS = tuple(f"{side}{name}" for side in ("", "train_", "valid_") for name in COMMON_LISTS)


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


def recall_side(data: Path, config: Config, saved: Mapping[str, Any], side: str) -> list[Record]:
    """The training or the validation images of a network that is there, as far as the user wants them now.

    Which images a ratio or folds choose depends on what is divided. So the lists that the network was trained with are
    applied before the division, and those that the user sets now behind it: they leave images out, and never bring one
    that was trained on among those that validate.

    Parameters
    ----------
    data : path
        The data folder.
    config : Config
        Where the user set how to divide, that counts.
    saved : mapping
        The settings of the training, as `Config.to_dict` makes them. Where they say nothing of the data, as those of an
        exported network, all is as the settings have it now.
    side : {'train', 'valid'}

    Raises
    ------
    ValueError
        No image passes the lists.
    """
    options = config.inherit(saved, SPLIT_KEYS).dataset
    if side == "valid" and not options.divides and (data / "valid").is_dir():  # data/train need not be there
        return filter_records(load_records(data / "valid", data, options), options, side)
    if "dataset" in saved:
        then = {name: tuple(saved["dataset"].get(name, ())) for name in COMMON_LISTS}
        train, valid = load_split(data, options.model_copy(update=then))
    else:
        train, valid = load_split(data, options)
    return filter_records(train if side == "train" else valid, options)


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

    A record joins the side of its kin; those without kin there are divided by the settings: by ``cv_ratio`` among
    themselves, else as they would be in one set with what is there.
    """
    held, trained = {record.id for record in valid}, {record.id for record in train}
    sides: dict[str, list[Record]] = {"train": [], "valid": [], "new": []}
    new = {record.id: record for record in records if record.id not in held | trained}
    for group in group_records([*train, *valid, *new.values()], options.cv_group):
        ids = {record.id for record in group}
        side = "valid" if ids & held else "train" if ids & trained else "new"
        sides[side] += [new[record.id] for record in group if record.id in new]
    if strangers := sides["new"]:
        pool = [*train, *valid, *new.values()] if options.divides else strangers
        divided = divide_records(pool, options)
        for side, members in zip(("train", "valid"), divided, strict=True):
            chosen = {record.id for record in members}
            sides[side] += [record for record in strangers if record.id in chosen]
    return sides["train"], sides["valid"]


def training_records(folder: Path, data: Path, options: Dataset) -> tuple[list[Record], list[Record]]:
    """The records of a folder that may be trained on, and those that may not: they validate, or are kin of one.

    Parameters
    ----------
    folder : path
        That of the training images of the data set, or another one.
    data : path
        The data folder. What lies in ``data/valid`` validates, and so does what `load_split` takes from the training
        images there are. Where there is neither, `folder` is divided as it would be as a data set.
    options : Dataset
        Its lists choose among the records; what validates, with them or without, is left out.
    """
    records = load_records(folder, data, options)
    held = _held_records(data / "valid", data, options)
    out: set[str] = set()
    for rules in _ways(options) if options.divides or not held else ():
        pool = _pool(folder, data, rules)
        train, valid = divide_records(pool, rules) if pool else ([], [])
        held = [*held, *valid]
        out |= {record.id for record in pool} - {record.id for record in train}
    names = {record.id for record in held}
    for group in group_records([*records, *held], options.cv_group):
        ids = {record.id for record in group}
        out |= ids if ids & names else set()
    free = filter_records([record for record in records if record.id not in out], options, "train")
    return free, [record for record in records if record.id in out]


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
        sizes = [sum(not ids.intersection(record.origins) for record in group) for group in members]
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
        there = list_values(records, "sub_category")
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


def find_parted(
    new: Sequence[Record], here: Sequence[Record], there: Sequence[Record], by: str = "patient"
) -> dict[str, list[str]]:
    """Which of the `new` records would be parted from kin if they joined those that are `here`.

    Parameters
    ----------
    new : sequence of Record
        They join one by one; one that would be parted stays away, so it makes no kin of others.
    here, there : sequence of Record
        The two sides of a division.
    by : {'patient', 'image'}
        As in `group_records`.

    Returns
    -------
    dict
        Id of a new record -> ids of its kin `there`.
    """
    wanted, others = {record.id for record in new}, {record.id for record in there}
    parted: dict[str, list[str]] = {}
    for group in group_records([*here, *there, *new], by):
        if others.isdisjoint(record.id for record in group):
            continue
        joined = [record for record in group if record.id not in wanted]
        for record in (record for record in group if record.id in wanted):
            (kin,) = (kin for kin in group_records([*joined, record], by) if record in kin)
            if across := [other.id for other in kin if other.id in others]:
                parted[record.id] = across
            else:
                joined.append(record)
    return parted


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
    titles = ("", "training", "an epoch", "each", "validation")
    return align([titles, *((name, n, f"{d:.0f}", f"{d / n:.1f}x" if n else "-", v) for name, n, d, v in rows)])


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


def _held_records(folder: Path, data: Path, options: Dataset) -> list[Record]:
    """All that lies in a folder of validation images, whatever the filters say of it; nothing where there is none."""
    if not is_filled(folder):
        return []
    table = table_path(data, options)
    return describe_records(find_records(folder), read_table(table) if table.is_file() else {})


def _ways(options: Dataset) -> list[Dataset]:
    """Settings that a training may have where these choose some of its images: without lists, and as they are.

    A list of ids and kinds left out say of each image by itself whether it validates; other rules by its company, too.
    """
    bare = options.model_copy(update=dict.fromkeys(LISTS, ()))
    alone = options.valid_ids is not None or options.leave_out
    return [bare] if alone or bare == options else [bare, options]


def _pool(folder: Path, data: Path, options: Dataset) -> list[Record]:
    """What is divided to know which images of a folder validate: they, or the training images there are.

    By a ratio these must be divided alone, or others would validate than in a training; by other rules together.
    """
    records, home = load_records(folder, data, options), data / "train"
    if not home.is_dir() or home.resolve() == folder.resolve():
        return records
    try:
        there = load_records(home, data, options)
    except ValueError:  # none of them passes the lists
        there = []
    return list({record.id: record for record in [*there, *(records if options.divides else ())]}.values())


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
