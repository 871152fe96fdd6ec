"""Measure a data set: intensities of its channels, opacity, sizes of images, numbers and areas of nuclei, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from image import Cache, ImageError, read_pixels
from labels import areas
from record import Record

COLUMNS = (
    "kind",
    "images",
    "height x width",
    "red",
    "green",
    "blue",
    "nuclei",
    "an image",
    "area",
    "10 to 90 %",
    "cover",
)


@dataclass(frozen=True)
class Measure:
    """What is known of one image.

    Attributes
    ----------
    kind : str
    shape : (int, int)
        (height, width) in pixels.
    mean, square : (3,) float64
        Mean of red, green, blue and of their squares, in 0..1, as a network is shown them.
    areas : (N,) int64 or None
        Of its nuclei, in pixels; None without ground truth.
    stored : str
        Type and channels of the file, such as ``uint8 x 4``.
    opacity : (float, float) or None
        Least value of the alpha channel and share of its pixels that are opaque; None without one.
    """

    kind: str
    shape: tuple[int, int]
    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    areas: NDArray[np.int64] | None
    stored: str
    opacity: tuple[float, float] | None


@dataclass
class Survey:
    """Measures of the images that could be read, and a line for each that could not."""

    measures: list[Measure] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, list[Measure]]:
        """Kind -> its measures, in order of name."""
        names = sorted({measure.kind for measure in self.measures})
        return {name: [measure for measure in self.measures if measure.kind == name] for name in names}


def survey(records: Sequence[Record], cache: Cache) -> Survey:
    """Measure images; what `cache` holds is not decoded again, and how it reads images is how they are measured."""
    result = Survey()
    for record in tqdm(records, "measuring", unit="image", disable=None):
        try:
            if record.problem:
                raise ImageError(record.problem)
            result.measures.append(_measure(record, cache))
        except ImageError as error:
            result.refused.append(str(error))
    return result


def channel_statistics(measures: Sequence[Measure]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of red, green, blue over all pixels of all images.

    Returns
    -------
    mean, std : (3,) float64
        In 0..1, as `[pre] mean` and `std` want them.

    Raises
    ------
    ValueError
        There is no image.
    """
    if not measures:
        raise ValueError("no image could be measured; mean and std need at least one")
    weights = np.array([np.prod(measure.shape) for measure in measures], float)
    mean = np.average([measure.mean for measure in measures], axis=0, weights=weights)
    square = np.average([measure.square for measure in measures], axis=0, weights=weights)
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def table(result: Survey) -> list[tuple[str, ...]]:
    """Rows of text under `COLUMNS`: a kind each, and all of them."""
    return [_row(name or "uncategorised", found) for name, found in result.kinds().items()] + [
        _row("all", result.measures)
    ]


def alpha_lines(measures: Iterable[Measure]) -> list[str]:
    """How files store their pixels, and what their alpha channels hold."""
    measures = list(measures)
    stored = Counter(measure.stored for measure in measures)
    lines = [f"stored as: {', '.join(f'{name} in {n}' for name, n in stored.most_common())}"]
    found = np.array([measure.opacity for measure in measures if measure.opacity is not None]).reshape(-1, 2)
    if found.size:
        opaque = int((found[:, 1] == 1).sum())
        lines.append(
            f"alpha: in {len(found)} images, opaque everywhere in {opaque}; least value {found[:, 0].min():g}, "
            f"{100 * found[:, 1].mean():.2f} % of an image opaque in the mean"
        )
    return lines


def series(result: Survey) -> dict[str, dict[str, NDArray]]:
    """What is worth a histogram: title -> kind -> values."""
    kinds = result.kinds()

    def each(values) -> dict[str, NDArray]:
        found = {name: np.asarray(values(measures), float) for name, measures in kinds.items()}
        return {name or "uncategorised": array for name, array in found.items() if array.size}

    return {
        "area of a nucleus (pixels)": each(_areas),
        "nuclei in an image": each(lambda measures: [len(m.areas) for m in measures if m.areas is not None]),
        "area of an image (pixels)": each(lambda measures: [np.prod(m.shape) for m in measures]),
        "mean intensity (0 to 1)": each(lambda measures: [m.mean.mean() for m in measures]),
    }


def _measure(record: Record, cache: Cache) -> Measure:
    image = np.asarray(cache.image(record.image))
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)]) / image[..., 0].size
    array, alpha = read_pixels(record.image)
    opacity = None
    if alpha:
        top = np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1.0
        opacity = float(array[..., -1].min()), float((array[..., -1] == top).mean())
    found = None if record.masks is None else areas(np.asarray(cache.labels(record.image, record.masks)))[1:]
    channels = array.shape[2] if array.ndim == 3 else 1
    return Measure(
        record.sub_category,
        image.shape[:2],
        counts @ levels,
        counts @ levels**2,
        found,
        f"{array.dtype} x {channels}",
        opacity,
    )


def _areas(measures: Sequence[Measure]) -> NDArray[np.int64]:
    """Areas of all nuclei."""
    return np.concatenate([np.empty(0, np.int64), *(m.areas for m in measures if m.areas is not None)])


def _row(name: str, measures: Sequence[Measure]) -> tuple[str, ...]:
    """A line of the table; a dash where there is nothing to tell."""
    if not measures:
        return name, "0", *["-"] * (len(COLUMNS) - 2)
    mean, std = channel_statistics(measures)
    sizes = Counter(measure.shape for measure in measures).most_common()
    size = f"{sizes[0][0][0]} x {sizes[0][0][1]}" + (f" and {len(sizes) - 1} others" if len(sizes) > 1 else "")
    found = _areas(measures)
    nuclei = ["-"] * 5
    if found.size:
        low, middle, high = np.percentile(found, [10, 50, 90])
        per_image = np.median([len(measure.areas) for measure in measures if measure.areas is not None])
        cover = found.sum() / sum(np.prod(measure.shape) for measure in measures if measure.areas is not None)
        nuclei = [
            f"{found.size}", f"{per_image:g}", f"{middle:.0f}", f"{low:.0f} to {high:.0f}", f"{100 * cover:.0f} %",
        ]  # fmt: skip
    return name, f"{len(measures)}", size, *(f"{m:.2f} ({s:.2f})" for m, s in zip(mean, std, strict=True)), *nuclei
