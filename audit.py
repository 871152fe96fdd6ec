"""Look for what is wrong with labelled images: masks that do not fit, are empty, in pieces or in each other's way,
differ from a run-length table, and images that look like one another on both sides of a split."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from annotation import decode_rle
from config import DEFAULT_POLICY, Policy
from files import replacing
from image import ImageError, read_image, read_labels, read_mask, read_pixels
from likeness import near_pairs, perceptual_hash, pixel_hash, thumbnail
from record import Record, read_ids

PROBLEMS = {
    "unreadable": "an image or mask that cannot be used",
    "wrong size": "a mask of another size than its image",
    "no masks": "an image without ground truth",
    "no nuclei": "an image whose masks hold nothing",
    "empty mask": "a mask without a pixel",
    "same nucleus twice": "two masks that share most of their pixels",
    "overlap": "two masks that share some pixels; the smaller gets them",
    "fragments": "a mask in several pieces",
    "holes": "a mask with holes",
    "only in csv": "a row of the run-length table without its mask",
    "only in masks": "a mask without its row of the table",
    "same image": "two images of equal pixels",
    "near duplicate": "two images that look alike, on one side of the split",
    "leak": "two images that look alike or are equal, one for training and one for validation",
}
"""What can be found, in the order of the summary."""

UNUSABLE = ("unreadable", "wrong size", "no masks")
BANNED = (*UNUSABLE, "leak")  # what a blacklist holds unless it is told otherwise
SAME_NUCLEUS = 0.7  # least intersection over union; what competes for a pixel shares far less or nearly all
COLUMNS = ("image_id", "side", "problem", "file", "amount", "note")

Mask = tuple[str, NDArray[np.intp]]  # what to call it, and its indices in the flattened image


class Finding(NamedTuple):
    """One problem; `amount` counts pixels, or is a correlation where images look alike."""

    image_id: str
    side: str
    problem: str
    file: str = ""
    amount: float = 0
    note: str = ""


@dataclass
class Audit:
    """What was looked at, and what was found."""

    findings: list[Finding] = field(default_factory=list)
    n_images: int = 0
    n_masks: int = 0

    def summary(self) -> dict[str, tuple[int, int]]:
        """Problem -> number of findings and of images they are in; only of what was found."""
        return {
            problem: (len(found), len({finding.image_id for finding in found}))
            for problem in PROBLEMS
            if (found := [finding for finding in self.findings if finding.problem == problem])
        }

    def ids(self, problems: Iterable[str]) -> list[str]:
        """Images with one of these problems, in order; of a leak the one for training."""
        wanted = set(problems)
        return sorted({finding.image_id for finding in self.findings if finding.problem in wanted})


def audit(
    sides: Mapping[str, Sequence[Record]],
    policy: Policy = DEFAULT_POLICY,
    runs: Mapping[str, Sequence[str]] | None = None,
) -> Audit:
    """Look at every image and mask.

    Parameters
    ----------
    sides
        ``train`` and ``valid``, or others, with their images.
    policy
        How images are read, as `image.read_image` takes it.
    runs
        Id -> run-length strings, as `annotation.read_csv` gives them, to compare the masks with.
    """
    result = Audit()
    looks: list[tuple[str, str, str, NDArray[np.bool_], NDArray[np.float32]]] = []
    members = [(side, record) for side, records in sides.items() for record in records]
    for side, record in tqdm(members, "checking", unit="image", disable=None):
        result.n_images += 1
        try:
            image = _read(record, policy)
            digest = pixel_hash(*read_pixels(record.image))
        except ImageError as error:
            result.findings.append(Finding(record.id, side, "unreadable", note=str(error)))
            continue
        looks.append((record.id, side, digest, perceptual_hash(image), thumbnail(image)))
        masks, findings = load_masks(record, side, image.shape[:2])
        result.n_masks += len(masks)
        findings += check_masks(record.id, side, masks, image.shape[:2])
        if runs is not None:
            findings += compare_runs(record.id, side, masks, runs.get(record.id, ()), image.shape[:2])
        result.findings += findings
    if runs is not None:
        lost = sorted(set(runs).difference(record.id for _, record in members))
        result.findings += [Finding(name, "", "only in csv", note="no such image") for name in lost]
    result.findings += _alike(looks)
    return result


def load_masks(record: Record, side: str, shape: tuple[int, int]) -> tuple[list[Mask], list[Finding]]:
    """The nuclei of a record, and what is wrong with their files."""
    if record.masks is None:
        return [], [Finding(record.id, side, "no masks")]
    masks: list[Mask] = []
    findings: list[Finding] = []
    if isinstance(record.masks, Path):
        try:
            labels = read_labels(record.masks)
            order = np.argsort(labels, axis=None, kind="stable")
            pieces = np.split(order, np.cumsum(np.bincount(labels.ravel()))[:-1])[1:]
            if labels.shape != shape:
                findings.append(_wrong_size(record, side, record.masks, labels.shape, shape))
            else:
                masks = [(f"label {i}", np.sort(piece)) for i, piece in enumerate(pieces, start=1)]
        except ImageError as error:
            findings.append(Finding(record.id, side, "unreadable", record.masks.name, note=str(error)))
    else:
        for path in record.masks:
            try:
                mask = read_mask(path)
            except ImageError as error:
                findings.append(Finding(record.id, side, "unreadable", path.name, note=str(error)))
                continue
            if mask.shape != shape:
                findings.append(_wrong_size(record, side, path, mask.shape, shape))
            elif not mask.any():
                findings.append(Finding(record.id, side, "empty mask", path.name))
            else:
                masks.append((path.name, np.flatnonzero(mask)))
    if not masks and not findings:
        findings.append(Finding(record.id, side, "no nuclei"))
    return masks, findings


def check_masks(image_id: str, side: str, masks: Sequence[Mask], shape: tuple[int, int]) -> list[Finding]:
    """Look for masks in pieces, with holes, and on each other.

    Parameters
    ----------
    masks
        Of one image of `shape`, none empty.
    """
    findings = []
    for name, pixels in masks:
        n_pieces, stray, holes = _pieces(pixels, shape)
        if stray:
            note = f"{n_pieces} pieces; amount: pixels outside the largest"
            findings.append(Finding(image_id, side, "fragments", name, stray, note))
        if holes:
            findings.append(Finding(image_id, side, "holes", name, holes))
    if not masks:
        return findings
    shared = sparse.triu(_shared(masks, masks, shape), k=1).tocoo()
    for i, j, amount in sorted(zip(shared.row, shared.col, shared.data, strict=True)):
        iou = amount / (masks[i][1].size + masks[j][1].size - amount)
        problem = "same nucleus twice" if iou >= SAME_NUCLEUS else "overlap"
        findings.append(Finding(image_id, side, problem, masks[i][0], int(amount), f"{masks[j][0]}, IoU {iou:.2f}"))
    return findings


def compare_runs(
    image_id: str, side: str, masks: Sequence[Mask], runs: Sequence[str], shape: tuple[int, int]
) -> list[Finding]:
    """Look for masks and rows of a run-length table that are not each other's."""
    rows: list[Mask] = []
    findings = []
    for number, text in enumerate(runs, start=1):
        try:
            rows.append((f"row {number} of the image", np.flatnonzero(decode_rle([text], shape))))
        except ValueError as error:
            findings.append(Finding(image_id, side, "only in csv", f"row {number} of the image", note=str(error)))
    left, right = ({pixels.tobytes() for _, pixels in group} for group in (masks, rows))
    lone_masks = [mask for mask in masks if mask[1].tobytes() not in right]
    lone_rows = [row for row in rows if row[1].tobytes() not in left]
    for problem, lone, others in (("only in masks", lone_masks, lone_rows), ("only in csv", lone_rows, lone_masks)):
        nearest = _best_iou(lone, others, shape)
        findings += [
            Finding(image_id, side, problem, name, pixels.size, f"nearest: IoU {iou:.3f}")
            for (name, pixels), iou in zip(lone, nearest, strict=True)
        ]
    return findings


def write_report(path: Path, findings: Iterable[Finding]) -> None:
    """Write a CSV, a row a finding."""
    with replacing(path) as stage, stage.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(findings)


def extend_blacklist(path: Path, ids: Sequence[str], dry_run: bool = False) -> int:
    """Append ids, one a line, to a list that may exist; lines that are there stay. How many are new."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    there = read_ids(path) if path.is_file() else set()
    new = [name for name in ids if name not in there]
    if new and not dry_run:
        with replacing(path) as stage:
            stage.write_text(text + ("\n" if text and not text.endswith("\n") else "") + "\n".join(new) + "\n", "utf-8")
    return len(new)


def _read(record: Record, policy: Policy) -> NDArray[np.uint8]:
    if record.problem and record.image.is_dir():
        raise ImageError(record.problem)
    return read_image(record.image, *policy)


def _wrong_size(record: Record, side: str, path: Path, found: tuple[int, ...], wanted: tuple[int, int]) -> Finding:
    note = f"{found[0]} x {found[1]}, image is {wanted[0]} x {wanted[1]}"
    return Finding(record.id, side, "wrong size", path.name, int(np.prod(found)), note)


def _pieces(pixels: NDArray[np.intp], shape: tuple[int, int]) -> tuple[int, int, int]:
    """Pieces of a mask (joined by sides or corners), pixels outside the largest, pixels in its holes."""
    rows, columns = np.divmod(pixels, shape[1])
    box = np.zeros((np.ptp(rows) + 3, np.ptp(columns) + 3), np.uint8)
    box[rows - rows.min() + 1, columns - columns.min() + 1] = 1
    n_pieces, _, stats, _ = cv2.connectedComponentsWithStats(box, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    _, outside = cv2.connectedComponents(1 - box, connectivity=4)
    holes = np.count_nonzero((outside != outside[0, 0]) & (box == 0))
    return n_pieces - 1, int(areas.sum() - areas.max()), int(holes)


def _shared(first: Sequence[Mask], second: Sequence[Mask], shape: tuple[int, int]) -> sparse.spmatrix:
    """Pixels that each of `first` shares with each of `second`, (N, M)."""

    def matrix(masks: Sequence[Mask]) -> sparse.csr_matrix:
        columns = np.concatenate([pixels for _, pixels in masks])
        ends = np.cumsum([0, *(pixels.size for _, pixels in masks)])
        return sparse.csr_matrix((np.ones(columns.size, np.int64), columns, ends), (len(masks), shape[0] * shape[1]))

    return matrix(first) @ matrix(second).T


def _best_iou(masks: Sequence[Mask], others: Sequence[Mask], shape: tuple[int, int]) -> NDArray[np.float64]:
    """For each mask the intersection over union with the nearest of the others."""
    if not masks or not others:
        return np.zeros(len(masks))
    shared = np.asarray(_shared(masks, others, shape).todense(), float)
    sizes, other_sizes = (np.array([pixels.size for _, pixels in group]) for group in (masks, others))
    return (shared / (sizes[:, None] + other_sizes - shared)).max(axis=1)


def _alike(looks: Sequence[tuple[str, str, str, NDArray[np.bool_], NDArray[np.float32]]]) -> list[Finding]:
    findings = []
    for i, j, correlation in near_pairs([look[3] for look in looks], [look[4] for look in looks]):
        (first, side, digest, *_), (second, other_side, other_digest, *_) = looks[i], looks[j]
        equal = digest == other_digest
        problem = "leak" if side != other_side else "same image" if equal else "near duplicate"
        if problem == "leak" and side != "train":
            first, side, second, other_side = second, other_side, first, side
        note = f"{second} ({other_side})" + (", equal pixels" if equal else "")
        findings.append(Finding(first, side, problem, "", round(correlation, 4), note))
    return findings
