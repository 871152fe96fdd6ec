"""Augment a sample: an image with its label map, moved and coloured at random.

All geometric rows of the table only describe where the pixels of the crop come from; the image and its labels are
then read once, through one `Warp`, whatever the number of rows. Colour rows follow and touch the image alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from config import Pre

Image = NDArray[np.uint8]
Rng = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """An image and its nuclei.

    Attributes
    ----------
    image : (H, W, 3) uint8
    labels : (H, W) int32
        0 is background.
    id : str
    group : str
        Kind of image, for balance and per-category scores.
    """

    image: Image
    labels: NDArray[np.int32]
    id: str = ""
    group: str = ""


@dataclass
class Warp:
    """Where the pixels of a crop come from: ``source = center + linear @ (target - middle of the crop + field)``.

    Attributes
    ----------
    source_shape, shape : (int, int)
        (height, width) of the source and of the crop.
    center : (2,) float64
        The source point (x, y) that lands in the middle of the crop.
    linear : (2, 2) float64
        Source pixels per crop pixel, with rotation and flip.
    field : (H, W, 2) float32 or None
        Displacement (x, y) in crop pixels.
    """

    source_shape: tuple[int, int]
    shape: tuple[int, int]
    center: NDArray[np.float64]
    linear: NDArray[np.float64]
    field: NDArray[np.float32] | None = None

    @classmethod
    def centered(cls, source_shape: tuple[int, int], shape: tuple[int, int]) -> Warp:
        """The middle of the source, pixel by pixel."""
        height, width = source_shape
        return cls(source_shape, shape, np.array([width - 1, height - 1]) / 2, np.eye(2))

    def coordinates(self) -> NDArray[np.float32]:
        """Source (x, y) of each pixel of the crop, (H, W, 2) float32."""
        height, width = self.shape
        y, x = np.mgrid[:height, :width].astype(np.float32)
        target = np.stack([x - (width - 1) / 2, y - (height - 1) / 2], axis=-1)
        if self.field is not None:
            target += self.field
        return target @ self.linear.T.astype(np.float32) + self.center.astype(np.float32)

    def apply(self, sample: Sample, precise: bool = False) -> Sample:
        """Read the crop; what lies outside the source is its mirror image.

        Parameters
        ----------
        precise : bool
            Move each nucleus as a mask of its own with linear interpolation, then compose; else all by nearest
            neighbour.
        """
        xy = self.coordinates()
        # Only the part of the source that is needed: it may be a memory map of a large image.
        height, width = self.source_shape
        low = np.floor(xy.min(axis=(0, 1))).astype(int) - 2
        high = np.ceil(xy.max(axis=(0, 1))).astype(int) + 3
        x0, y0 = np.clip(low, 0, [max(width - 2, 0), max(height - 2, 0)])
        x1, y1 = np.clip(high, [x0 + 1, y0 + 1], [width, height])
        xy -= np.array([x0, y0], np.float32)
        image = _smooth(np.ascontiguousarray(sample.image[y0:y1, x0:x1]), abs(np.linalg.det(self.linear)) ** 0.5)
        labels = np.ascontiguousarray(sample.labels[y0:y1, x0:x1])
        return replace(
            sample,
            image=cv2.remap(image, xy, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101),
            labels=_warp_each(labels, xy) if precise else _warp_nearest(labels, xy),
        )


def _smooth(image: Image, step: float) -> Image:
    """Take out what would alias when every crop pixel steps over `step` source pixels."""
    return image if step < 1.25 else cv2.GaussianBlur(image, (0, 0), 0.45 * np.sqrt(step**2 - 1))


def _warp_nearest(labels: NDArray[np.int32], xy: NDArray[np.float32]) -> NDArray[np.int32]:
    # OpenCV knows no int32, but nearest neighbour only moves bytes: four channels of uint8 are the same thing.
    four = labels.view(np.uint8).reshape(*labels.shape, 4)
    moved = cv2.remap(four, xy, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
    return moved.reshape(xy.shape[0], -1).view(np.int32)


def _warp_each(labels: NDArray[np.int32], xy: NDArray[np.float32]) -> NDArray[np.int32]:
    best = np.full(xy.shape[:2], 127, np.uint8)
    composed = np.zeros(xy.shape[:2], np.int32)
    for label in np.unique(labels[labels > 0]):
        mask = (labels == label).astype(np.uint8) * np.uint8(255)
        moved = cv2.remap(mask, xy, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        composed[moved > best] = label
        np.maximum(best, moved, out=best)
    return composed


# Geometric rows: they turn and stretch the warp, or choose its place.


def _scale(warp: Warp, rng: Rng, pre: Pre) -> Warp:
    """Zoom between min_scale and max_scale, evenly in the logarithm; height and width differ by up to `aspect`."""
    zoom = np.exp(rng.uniform(np.log(pre.min_scale), np.log(pre.max_scale)))
    stretch = np.exp(rng.uniform(-1, 1) * np.log1p(pre.aspect) / 2)
    return replace(warp, linear=warp.linear @ np.diag([1 / (zoom * stretch), stretch / zoom]))


def _rotate(warp: Warp, rng: Rng, pre: Pre) -> Warp:
    """By a quarter turn, or half of the time by any angle."""
    angle = rng.uniform(0, 2 * np.pi) if rng.random() < 0.5 else rng.integers(4) * np.pi / 2
    cos, sin = np.cos(angle), np.sin(angle)
    return replace(warp, linear=warp.linear @ np.array([[cos, -sin], [sin, cos]]))


def _flip(warp: Warp, rng: Rng, pre: Pre) -> Warp:
    """Left-right and up-down, each half of the time."""
    return replace(warp, linear=warp.linear @ np.diag(rng.choice([-1.0, 1.0], 2)))


def _elastic(warp: Warp, rng: Rng, pre: Pre) -> Warp:
    """Half of the time: a smooth random displacement of 3 px (Simard et al. 2003, doi:10.1109/ICDAR.2003.1227801)."""
    if rng.random() < 0.5:
        return warp
    height, width = warp.shape
    coarse = rng.normal(0, 3, (height // 32 + 3, width // 32 + 3, 2)).astype(np.float32)
    return replace(warp, field=cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def _crop(warp: Warp, rng: Rng, pre: Pre) -> Warp:
    """Anywhere, as long as the crop stays inside the source where it can."""
    reach = np.abs(warp.linear) @ np.array(warp.shape[::-1]) / 2
    size = np.array(warp.source_shape[::-1], float)
    low = np.minimum(reach, size / 2)
    return replace(warp, center=rng.uniform(low, size - low) - 0.5)


# Colour rows: image in, image out, 8-bit RGB.


def _invert(image: Image, rng: Rng, pre: Pre) -> Image:
    return ~image if rng.random() < 0.5 else image


def _jitter(image: Image, rng: Rng, pre: Pre) -> Image:
    """Brightness, contrast and gamma of all channels, through one table."""
    contrast, gamma = np.exp(rng.uniform(-0.35, 0.35)), np.exp(rng.uniform(-0.5, 0.5))
    brightness = rng.uniform(-0.1, 0.1)
    ramp = np.linspace(0, 1, 256) ** gamma
    table = (ramp - ramp.mean()) * contrast + ramp.mean() + brightness
    return cv2.LUT(image, np.rint(np.clip(table, 0, 1) * 255).astype(np.uint8))


def _color_space(image: Image, rng: Rng, pre: Pre) -> Image:
    """Half of the time: shift and stretch the colours in CIELAB, so that a stain becomes another stain."""
    gray = (image.max(axis=-1) == image.min(axis=-1)).mean() > 0.99
    if gray or rng.random() < 0.5:  # a gray image has no stain; it keeps its colour
        return image
    stretch = np.array([1.0, *rng.uniform(0.5, 1.4, 2)])
    shift = np.array([0.0, *rng.uniform(-18, 18, 2)])
    channels = np.arange(256)[:, None]
    center = np.array([0.0, 128, 128])
    table = np.clip((channels - center) * stretch + center + shift, 0, 255)
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    return cv2.cvtColor(cv2.LUT(lab, np.rint(table).astype(np.uint8)[:, None, :]), cv2.COLOR_LAB2RGB)


def _shuffle(image: Image, rng: Rng, pre: Pre) -> Image:
    """One time in ten: the channels in another order."""
    return np.ascontiguousarray(image[..., rng.permutation(3)]) if rng.random() < 0.1 else image


def _gray(image: Image, rng: Rng, pre: Pre) -> Image:
    """One time in five: without colour."""
    if rng.random() >= 0.2:
        return image
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _equalize(image: Image, rng: Rng, pre: Pre) -> Image:
    return equalize(image) if rng.random() < 0.5 else image


def _noise(image: Image, rng: Rng, pre: Pre) -> Image:
    """Half of the time: additive Gaussian noise, or multiplied speckle, of up to 8 percent."""
    if rng.random() < 0.5:
        return image
    noise = rng.standard_normal(image.shape[:2], np.float32)[..., None] * np.float32(rng.uniform(0, 0.08))
    speckle = rng.random() < 0.5
    noisy = image * (1 + noise) if speckle else image + 255 * noise
    return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)


def equalize(image: Image) -> Image:
    """Contrast limited adaptive histogram equalization of the lightness (Zuiderveld 1994), (H, W, 3) uint8."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(np.ascontiguousarray(lab[..., 0]))
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


@dataclass(frozen=True)
class Augmentation:
    """One row: `run(warp or image, rng, pre)`, and whether the settings want it."""

    run: Callable
    geometric: bool
    wanted: Callable[[Pre], bool]


#: In the order they are applied; the crop comes last of the geometric rows, when the reach of the crop is known.
AUGMENTATIONS: dict[str, Augmentation] = {
    "scale": Augmentation(_scale, True, lambda pre: pre.random_crop),
    "rotate": Augmentation(_rotate, True, lambda pre: pre.rotate),
    "flip": Augmentation(_flip, True, lambda pre: pre.flip),
    "elastic_distortion": Augmentation(_elastic, True, lambda pre: pre.elastic_distortion),
    "random_crop": Augmentation(_crop, True, lambda pre: pre.random_crop),
    "color_equalize": Augmentation(_equalize, False, lambda pre: pre.color_equalize),
    "color_jitter": Augmentation(_jitter, False, lambda pre: pre.color_jitter),
    "color_space_shift": Augmentation(_color_space, False, lambda pre: pre.color_space_shift),
    "channel_shuffle": Augmentation(_shuffle, False, lambda pre: pre.channel_shuffle),
    "gray": Augmentation(_gray, False, lambda pre: pre.gray),
    "color_invert": Augmentation(_invert, False, lambda pre: pre.color_invert),
    "add_noise": Augmentation(_noise, False, lambda pre: pre.add_noise),
}


def build_transform(pre: Pre, width: int, precise: bool = False) -> Callable[[Sample, Rng], Sample]:
    """Compose the rows that the settings want into one function of a sample and a random generator.

    Parameters
    ----------
    pre : Pre
        Switches and ranges.
    width : int
        Side of the square that comes out.
    precise : bool
        See `Warp.apply`.

    Notes
    -----
    Without ``random_crop`` the whole image is squeezed into the square, as a network of fixed input size needs it.
    Labels keep their ids; those that fall outside are gone.
    """
    rows = [row for row in AUGMENTATIONS.values() if row.wanted(pre)]

    def transform(sample: Sample, rng: Rng) -> Sample:
        warp = Warp.centered(sample.labels.shape, (width, width))
        if not pre.random_crop:
            warp.linear = np.diag(np.array(warp.source_shape[::-1]) / width)
        for row in rows:
            if row.geometric:
                warp = row.run(warp, rng, pre)
        sample = warp.apply(sample, precise)
        image = sample.image
        for row in rows:
            if not row.geometric:
                image = row.run(image, rng, pre)
        return replace(sample, image=image)

    return transform
