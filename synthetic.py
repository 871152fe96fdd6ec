"""Draw images of nuclei that never were, with exact masks: for training, the demo, tests, benchmarks and docs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from annotation import write_sample
from config import pick
from image import Pixels, write_pixels
from paint import (
    Map,
    draw_flow,
    paint_brightfield,
    paint_cells,
    paint_counterstain,
    paint_fluorescence,
    paint_layer,
    paint_purple,
    paint_thick,
    paint_tissue,
)

Paint = Callable[[np.random.Generator, NDArray[np.int32], Map], Map]

GAP = 3  # background pixels between two nuclei that may not touch
MIN_AREA = 12  # pixels; what is left of a nucleus behind its neighbours or the image border
MIN_VISIBLE = 0.6  # a nucleus that others hide more than this is drawn elsewhere
MAX_COVER = 0.45  # of the image; nuclei shrink when more of them are asked for than fit
N_TRIES = 12  # places tried per nucleus before the image counts as full

TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)  # a contour is drawn through this many points
CIRCLE = np.stack([np.cos(TURN), np.sin(TURN)])
BUMPS = np.concatenate([2 / k * np.stack([np.cos(k * TURN), np.sin(k * TURN)]) for k in (2, 3, 4, 5)])


class Nucleus(NamedTuple):
    """An ellipse before its contour is deformed: centre and semi-axes in pixels, angle in radians."""

    y: float
    x: float
    major: float
    minor: float
    angle: float

    def reach(self, direction: float) -> float:
        """Distance in pixels from the centre to the ellipse along `direction` (radians)."""
        turn = direction - self.angle
        return self.major * self.minor / np.hypot(self.minor * np.cos(turn), self.major * np.sin(turn))


class Kind(NamedTuple):
    """One row of `KINDS`: how nuclei are shaped and strewn, and who paints them. Pairs are (low, high)."""

    radius: tuple[float, float]  # pixels; typical of an image, its nuclei vary around it
    spread: float  # standard deviation of the log radius within an image
    aspect: tuple[float, float]  # long over short axis
    wobble: float  # relative depth of the bumps of a contour
    cover: tuple[float, float]  # share of the image under nuclei
    cluster: float  # probability that a nucleus is laid against an earlier one
    align: float  # 0 any direction, 1 along the fibres
    paint: Paint
    flank: float = 0.0  # share of the nuclei laid against others that lie along their flank, as in a palisade


def draw_sample(
    seed: int,
    shape: tuple[int, int] = (256, 256),
    kind: str | None = None,
    n_nuclei: int | None = None,
    touching: bool = True,
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Draw one image and the label map it was painted from.

    Parameters
    ----------
    seed
        Not negative; the same seed and arguments give the same bits.
    shape
        (height, width) in pixels.
    kind
        A name of `KINDS`; None lets the seed choose.
    n_nuclei
        How many; None draws a number that suits the kind. Nuclei shrink to make room for many, and fewer come
        back when even so there is none left. 0 gives background alone.
    touching
        Whether nuclei may share borders; if not, at least `GAP` background pixels lie between any two.

    Returns
    -------
    image
        (H, W, 3) uint8, RGB; the three channels of a gray kind are equal.
    labels
        (H, W) int32, 0 = background, nuclei 1..N, each one 4-connected piece of at least
        `MIN_AREA` pixels.

    Raises
    ------
    ValueError
        If a size, the seed or the number of nuclei is out of range, or the kind is unknown.
    """
    if min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)}: height and width must be at least 1 pixel")
    if seed < 0 or (n_nuclei is not None and n_nuclei < 0):
        raise ValueError(f"seed {seed}, n_nuclei {n_nuclei}: neither may be negative")
    rng = np.random.default_rng(seed)
    drawn = list(KINDS)[rng.integers(len(KINDS))]  # drawn even where not needed: naming it changes nothing
    row = pick(KINDS, drawn if kind is None else kind, "kind")
    flow = draw_flow(rng, shape)
    labels = _draw_labels(rng, row, flow, n_nuclei, 0 if touching else GAP)
    image = row.paint(rng, labels, flow)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), labels


def image_ids(n_images: int, prefix: str = "") -> list[str]:
    """Ids of the images of a data set that `write_dataset` writes, in order, such as ``fluorescence_0000``."""
    kinds = list(KINDS)
    return [f"{prefix}{kinds[index % len(kinds)]}_{index:04d}" for index in range(n_images)]


def write_dataset(
    folder: Path,
    n_images: int,
    seed: int = 0,
    shape: tuple[int, int] = (256, 256),
    masks: bool = True,
    prefix: str = "",
) -> list[str]:
    """Write a data set in the Kaggle layout, the kinds of `KINDS` in turn.

    Image number i depends on `seed`, `shape` and i alone, so a longer data set begins with the shorter one.
    An image folder that is there already is left as it is; each appears complete or not at all.

    Parameters
    ----------
    folder
        Receives ``<image id>/images/<image id>.png`` (8-bit RGB) and ``<image id>/masks/<nnnn>.png`` (8-bit,
        0 or 255, one file per nucleus); created where missing.
    n_images
        How many images.
    seed
        Not negative.
    shape
        (height, width) of each image.
    masks
        False leaves the masks out, as in a test set.
    prefix
        Stands before each id.

    Returns
    -------
    ids
        As `image_ids` gives them.
    """
    folder, kinds, ids = Path(folder), list(KINDS), image_ids(n_images, prefix)
    for index, name in enumerate(ids):
        if not (folder / name).exists():
            own_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
            image, labels = draw_sample(own_seed, shape, kinds[index % len(kinds)])
            draw = partial(write_pixels, name=name, pixels=Pixels(image, False))
            write_sample(folder, name, draw, labels if masks else None)
    return ids


# Shapes and places


def _draw_labels(rng: np.random.Generator, row: Kind, flow: Map, n_nuclei: int | None, gap: int) -> NDArray[np.int32]:
    """Lay nuclei one behind another: each gets what earlier ones (and the gap around them) left free.

    So no earlier nucleus is ever cut, ids are sequential, and nuclei that overlap end in a shared border.
    """
    labels = np.zeros(flow.shape[1:], np.int32)
    taken = np.zeros(labels.shape, np.uint8)
    radius = rng.uniform(*row.radius)
    cover = rng.uniform(*row.cover)
    if n_nuclei is None:
        n_nuclei = max(1, round(cover * labels.size / (np.pi * radius**2)))
    most = np.sqrt(MAX_COVER * labels.size / (np.pi * max(n_nuclei, 1))) - gap / 2
    radius = min(radius, max(most, 2.5))

    placed: list[Nucleus] = []
    for _ in range(N_TRIES * n_nuclei):
        if len(placed) == n_nuclei:
            break
        nucleus = draw_nucleus(rng, row, radius, flow, placed, gap)
        if _is_taken(taken, nucleus.y, nucleus.x):  # hidden at its centre: not worth drawing
            continue
        window, mask = _draw_mask(rng, nucleus, row.wobble, labels.shape)
        visible = _largest_piece(mask & (taken[window] == 0))
        if visible.sum() < max(MIN_AREA, MIN_VISIBLE * mask.sum()):
            continue
        placed.append(nucleus)
        labels[window][visible] = len(placed)
        _take(taken, window, visible, gap)
    return labels


def draw_nucleus(
    rng: np.random.Generator,
    row: Kind,
    radius: float,
    flow: Map,
    placed: list[Nucleus],
    gap: int,
) -> Nucleus:
    """Draw size and direction, and a place: anywhere, or against a nucleus that is there."""
    _, height, width = flow.shape
    size = radius * np.exp(np.clip(rng.normal(0, row.spread), -1, 1))
    stretch = np.sqrt(rng.uniform(*row.aspect))
    turn = rng.uniform(-np.pi, np.pi) / 2 * (1 - row.align)
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    along = np.arctan2(*flow[:, int(y), int(x)])
    if not placed or rng.random() >= row.cluster:
        return Nucleus(y, x, size * stretch, size / stretch, along + turn)
    other, direction = placed[rng.integers(len(placed))], rng.uniform(-np.pi, np.pi)
    if row.flank and rng.random() < row.flank:
        direction = other.angle + rng.choice([-1, 1]) * np.pi / 2 + rng.uniform(-0.3, 0.3)
    nucleus = Nucleus(other.y, other.x, size * stretch, size / stretch, other.angle + turn)
    distance = (other.reach(direction) + nucleus.reach(direction)) * rng.uniform(0.82, 1.0) + 1.5 * gap
    return nucleus._replace(
        y=other.y + distance * np.sin(direction),
        x=other.x + distance * np.cos(direction),
    )


def _draw_mask(
    rng: np.random.Generator, nucleus: Nucleus, wobble: float, shape: tuple[int, ...]
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Fill the ellipse after deforming its contour by a low-order Fourier series; cut at the image border.

    Returns the window of the image that holds it, and the mask in that window.
    """
    factor = np.maximum(1 + rng.normal(0, wobble, len(BUMPS)) @ BUMPS, 0.4)
    cos, sin = np.cos(nucleus.angle), np.sin(nucleus.angle)
    axes = np.array([[nucleus.major * cos, -nucleus.minor * sin], [nucleus.major * sin, nucleus.minor * cos]])
    points = (axes @ (CIRCLE * factor)).T + (nucleus.x, nucleus.y)

    size = np.array(shape[::-1])
    low = np.minimum(np.maximum(points.min(0), 0).astype(int), size)
    high = np.minimum(np.maximum(points.max(0) + 2, low).astype(int), size)
    mask = np.zeros((high - low)[::-1], np.uint8)
    if mask.size:
        cv2.fillPoly(mask, [np.round((points - low) * 16).astype(np.int32)], 1, shift=4)
    return (slice(low[1], high[1]), slice(low[0], high[0])), mask.astype(bool)


def _largest_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if not mask.any():
        return mask
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return pieces == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


def _is_taken(taken: NDArray[np.uint8], y: float, x: float) -> bool:
    height, width = taken.shape
    return 0 <= y < height and 0 <= x < width and bool(taken[int(y), int(x)])


def _take(taken: NDArray[np.uint8], window: tuple[slice, slice], mask: NDArray[np.bool_], gap: int) -> None:
    """Mark `mask` and `gap` pixels around it, diagonals too, as no longer free."""
    rows, columns = window
    top, left = min(gap, rows.start), min(gap, columns.start)
    around = taken[rows.start - top : rows.stop + gap, columns.start - left : columns.stop + gap]
    grown = np.zeros_like(around)
    grown[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    square = np.ones((2 * gap + 1, 2 * gap + 1), np.uint8)
    np.maximum(around, cv2.dilate(grown, square), out=around)


KINDS: dict[str, Kind] = {
    "fluorescence": Kind((9, 17), 0.18, (1.0, 1.8), 0.035, (0.08, 0.30), 0.35, 0.2, paint_fluorescence),
    "dense": Kind((5, 8), 0.15, (1.0, 1.5), 0.035, (0.12, 0.35), 0.85, 0.0, paint_fluorescence),
    "tissue": Kind((7, 11), 0.22, (1.1, 2.6), 0.04, (0.12, 0.30), 0.35, 0.75, paint_tissue),
    "purple": Kind((7, 12), 0.22, (1.0, 2.0), 0.045, (0.10, 0.28), 0.50, 0.4, paint_purple),
    "brightfield": Kind((6, 10), 0.20, (1.0, 1.6), 0.04, (0.02, 0.08), 0.30, 0.0, paint_brightfield),
    "thick": Kind((5, 11), 0.22, (1.1, 2.8), 0.05, (0.22, 0.42), 0.85, 0.5, paint_thick),
    "infiltrate": Kind((5, 9), 0.20, (1.0, 1.8), 0.05, (0.22, 0.42), 0.80, 0.2, paint_tissue),
    "counterstain": Kind((5, 11), 0.22, (1.0, 2.4), 0.045, (0.12, 0.36), 0.60, 0.4, paint_counterstain),
    "epithelium": Kind((7, 14), 0.20, (1.0, 1.8), 0.04, (0.12, 0.40), 0.30, 0.2, paint_cells),
    "carcinoma": Kind((8, 19), 0.35, (1.0, 2.4), 0.055, (0.20, 0.42), 0.25, 0.4, paint_cells),
    "layer": Kind((7, 15), 0.22, (1.0, 2.2), 0.045, (0.15, 0.45), 0.30, 0.4, paint_layer),
    "palisade": Kind((5, 9), 0.18, (1.6, 3.6), 0.04, (0.20, 0.45), 0.93, 0.75, paint_layer, 0.85),
    "gland": Kind((6, 10), 0.20, (1.4, 2.8), 0.045, (0.20, 0.42), 0.90, 0.75, paint_cells, 0.85),
}
