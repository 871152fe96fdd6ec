"""Labelled images -> new ones in which nuclei touch and overlap, booked so that no patient is parted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from annotation import write_sample
from collage import mirror_tile, paste_nuclei
from columns import align
from config import Policy
from image import Pixels, read_image, read_labels, write_pixels
from labels import adjacency, relabel, remove_small, split_fragments
from record import Record, derive_record
from score import read_scores

#: In the id of every image that is made here; such images are no material for others.
MARK = "_stitch_"
#: Nuclei pasted, as a share of those that are there.
SHARE = (0.25, 0.75)
#: Share of an image that nuclei may come to cover.
MAX_COVER = 0.5
#: Least area (pixels) of what is left of a nucleus.
MIN_PIECE = 8
#: How often a nucleus comes from another image, where there is one.
FOREIGN = 0.4
#: Nuclei pasted from one image before another is drawn.
N_AT_ONCE = 5


class Summary(NamedTuple):
    """What the table of a run tells of an image: its kind, its nuclei, and pairs of them that touch."""

    kind: str
    n_nuclei: int
    n_pasted: int
    n_before: int
    n_after: int


@dataclass(frozen=True)
class Stitch:
    """One image that was made.

    Attributes
    ----------
    id : str
    image : (H, W, 3) uint8
    labels : (H, W) int32
        Numbers 1..N, one connected piece each.
    summary : Summary
    """

    id: str
    image: NDArray[np.uint8]
    labels: NDArray[np.int32]
    summary: Summary


@dataclass(frozen=True)
class Plan:
    """What an image of `width` pixels will be made from: a base, and others that give nuclei; `index` numbers them."""

    index: int
    width: int
    seed: int
    base: Record
    mates: tuple[Record, ...]

    @property
    def id(self) -> str:
        """Named after the parents, the first in full, and after all that makes it another image."""
        parents = "+".join([self.base.id, *(mate.id[:8] for mate in self.mates)])
        return f"{parents}{MARK}{self.width}_{self.seed}_{self.index:04d}"

    @property
    def record(self) -> Record:
        return derive_record(self.id, Path(self.id), [self.base, *self.mates])


def pick_worst(path: str | Path, records: Sequence[Record], keep: int) -> list[Record]:
    """The `keep` records with the lowest score in a CSV that ``valid.py --iou`` wrote, the worst first.

    Raises
    ------
    FileNotFoundError, ValueError
        As `score.read_scores`; or none of its images is among the records.
    """
    scores = read_scores(Path(path))
    known = [record for record in records if record.id in scores]
    if not known:
        raise ValueError(f"{path}: none of its {len(scores)} images is among the {len(records)} of the folder")
    return sorted(known, key=lambda record: (scores[record.id], record.id))[:keep]


def plan_stitches(records: Sequence[Record], n: int, width: int, seed: int, mix: bool = False) -> list[Plan]:
    """Choose what each of `n` images is made from; kinds (sub-categories) take turns.

    Parameters
    ----------
    records : sequence of Record
        With masks; those that were stitched themselves are passed over.
    width : int
        Side of the images in pixels.
    seed : int
        The same seed and records give the same plan, and a longer one begins with the shorter one.
    mix : bool
        Take nuclei from images of other patients of the same kind, too.

    Raises
    ------
    ValueError
        There is no image with nuclei among the records.
    """
    kinds: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: r.id):
        if record.masks and MARK not in record.id and not record.problem:
            kinds.setdefault(record.sub_category, []).append(record)
    if not kinds:
        raise ValueError(f"none of the {len(records)} images has masks to take nuclei from")
    plans = []
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        members = kinds[sorted(kinds)[index % len(kinds)]]
        base = members[rng.integers(len(members))]
        mates = [r for r in members if r is not base and (mix or (r.patient and r.patient == base.patient))]
        chosen = (mates[rng.integers(len(mates))],) if mates and rng.random() < FOREIGN else ()
        plans.append(Plan(index, width, seed, base, chosen))
    return plans


def make_stitch(plan: Plan, policy: Policy) -> Stitch:
    """Make an image: a window of the mirrored plane of the base, and nuclei pasted against those that are there.

    Parameters
    ----------
    plan : Plan
    policy : Policy
        How to read the images: `Policy.stored`, as what is made is stored and read like any other.

    Raises
    ------
    ImageError
        The base, or one of the others, cannot be read.
    """
    rng = np.random.default_rng([plan.seed, plan.index, 1])
    base, *others = (_read(record, policy) for record in (plan.base, *plan.mates))
    corner = _place(base[1], plan.width, rng)
    image, labels = mirror_tile(*base, (plan.width, plan.width), corner)
    labels = _tidy(labels)
    before, contacts = int(labels.max(initial=0)), len(adjacency(labels))
    image, labels = _crowd(image, labels, [base, *others], rng)
    pasted = int(labels.max(initial=0)) - before
    labels = _tidy(labels)
    n, touching = int(labels.max(initial=0)), len(adjacency(labels))
    return Stitch(plan.id, image, labels, Summary(plan.base.sub_category, n, pasted, contacts, touching))


def write_stitch(folder: Path, stitch: Stitch) -> None:
    """Write an image in the Kaggle layout below `folder`, whole or not at all."""
    name = stitch.id
    write_sample(folder, name, lambda images: write_pixels(images, name, Pixels(stitch.image, False)), stitch.labels)


def format_summaries(summaries: Sequence[Summary]) -> str:
    """What was made, by kind, as a table to print."""
    rows: list[tuple[object, ...]] = [("", "images", "nuclei", "pasted", "contacts before", "after")]
    for kind in sorted({summary.kind for summary in summaries}):
        members = [summary[1:] for summary in summaries if summary.kind == kind]
        rows.append((kind or "uncategorised", len(members), *(sum(column) for column in zip(*members, strict=True))))
    return align(rows)


def _read(record: Record, policy: Policy) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    assert record.masks is not None
    image = read_image(record.image, *policy)
    return image, read_labels(record.masks, image.shape[:2])


def _place(labels: NDArray[np.int32], width: int, rng: np.random.Generator) -> tuple[int, int]:
    """A corner (top, left) of a window that shows some nucleus, inside the image where that is larger."""
    inside = np.argwhere(labels > 0)
    middle = inside[rng.integers(len(inside))] if len(inside) else np.array(labels.shape) // 2
    corner = middle - rng.integers(width // 4, width - width // 4, 2)
    room = np.array(labels.shape) - width
    top, left = np.where(room >= 0, np.clip(corner, 0, np.maximum(room, 0)), corner).tolist()
    return top, left


def _crowd(
    image: NDArray[np.uint8],
    labels: NDArray[np.int32],
    sources: Sequence[tuple[NDArray[np.uint8], NDArray[np.int32]]],
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Paste nuclei of other images, a few of each at a time."""
    left = _room(labels, rng)
    while left > 0:
        source = sources[int(rng.integers(len(sources)))]
        image, labels = paste_nuclei(image, labels, rng, min(left, N_AT_ONCE), source)
        left -= N_AT_ONCE
    return image, labels


def _room(labels: NDArray[np.int32], rng: np.random.Generator) -> int:
    """How many nuclei to paste: a share of those there are, as far as they do not fill the image."""
    n = int(labels.max(initial=0))
    covered = np.count_nonzero(labels)
    if not n:
        return 0
    most = (MAX_COVER * labels.size - covered) / (covered / n)
    return int(max(min(np.ceil(n * rng.uniform(*SHARE)) + 1, most), 1))


def _tidy(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Every nucleus one connected piece, crumbs left out, numbered without gaps."""
    return relabel(remove_small(split_fragments(labels), MIN_PIECE))
