"""Augment a sample: an image with its label map, moved and coloured at random.

All warps of the table only describe where the pixels of the crop come from; the image and its labels are then read
once, through one `Warp`, whatever the number of rows. Rows that add nuclei, colour them, and the image, follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

import collage
import color
from color import Image, Rng
from config import Pre
from labels import split_fragments

#: Most that a training image is reduced and enlarged to bring its nuclei to one size.
EQUAL_RANGE = (0.4, 3.0)


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
    style : (H', W', 3) uint8, optional
        Another image, whose style it may take; of any size.
    diameter : float
        Of its typical nucleus, in pixels; 0 where there is none, or nobody asks.
    """

    image: Image
    labels: NDArray[np.int32]
    id: str = ""
    group: str = ""
    diameter: float = 0.0
    style: Image | None = None


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
        """Read the crop; what lies outside the source is its mirror image, and a nucleus there one of its own.

        Parameters
        ----------
        precise : bool
            Move each nucleus as a mask of its own with linear interpolation, then compose; else all by nearest
            neighbour.
        """
        xy = self.coordinates()
        # Only the part of the source that is needed: it may be a memory map of a large image.
        height, width = self.source_shape
        x, y = xy[..., 0], xy[..., 1]  # one by one: numpy is slow along an axis of two
        low = np.floor([x.min(), y.min()]).astype(int) - 2
        high = np.ceil([x.max(), y.max()]).astype(int) + 3
        inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
        x0, y0 = np.clip(low, 0, [max(width - 2, 0), max(height - 2, 0)])
        x1, y1 = np.clip(high, [x0 + 1, y0 + 1], [width, height])
        xy -= np.array([x0, y0], np.float32)
        image = _smooth(np.ascontiguousarray(sample.image[y0:y1, x0:x1]), abs(np.linalg.det(self.linear)) ** 0.5)
        labels = np.ascontiguousarray(sample.labels[y0:y1, x0:x1])
        labels = _warp_each(labels, xy) if precise else _warp_nearest(labels, xy)
        return replace(
            sample,
            image=cv2.remap(image, xy, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101),
            labels=labels if inside.all() else _number_copies(labels, inside),
        )


def _number_copies(labels: NDArray[np.int32], inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """What lies in the mirror images alone gets ids that nothing else in the crop has, piece by piece; (H, W) both.

    A nucleus that the border of the source cuts stays one with its mirror image, which it is joined to.
    """
    pieces = split_fragments(labels, connectivity=2)
    ids = np.zeros(pieces.max() + 1, np.int32)
    ids[pieces] = labels
    copies = ids > 0
    copies[pieces[inside]] = False
    ids[copies] = ids.max() + 1 + np.arange(copies.sum())
    return ids[pieces]


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


# Warps: they turn and stretch the warp, or choose its place.


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


def _cut(image: Image, width: int, rng: Rng) -> Image:
    """A square of `width` from anywhere in an image; one that is smaller is enlarged first."""
    height, across = image.shape[:2]
    if (factor := width / min(height, across)) > 1:
        height, across = max(round(height * factor), width), max(round(across * factor), width)
        image = np.asarray(cv2.resize(image, (across, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    y, x = rng.integers(height - width + 1), rng.integers(across - width + 1)
    return image[y : y + width, x : x + width]


@dataclass(frozen=True)
class Augmentation:
    """One row: what runs, on what, and which switch of ``[pre]`` wants it.

    Attributes
    ----------
    run : callable
        ``run(warp, rng, pre)``, ``run(image, labels, rng)`` (stages sample and nuclei), ``run(image, style, rng)`` or
        ``run(image, rng)``, by `stage`.
    stage : {'warp', 'sample', 'nuclei', 'style', 'image'}
        What it returns: a warp, (image, labels), or an image.
    switch : str
    rgb : bool
        Whether it knows red, green and blue alone; it is left out where ``[pre] color_space`` is another.
    light : bool
        Whether it changes the light, and in CIELAB the lightness alone.
    """

    run: Callable
    stage: str
    switch: str
    rgb: bool = False
    light: bool = False


#: In the order they are applied; the crop comes last of the warps, when the reach of the crop is known.
AUGMENTATIONS: dict[str, Augmentation] = {
    "scale": Augmentation(_scale, "warp", "random_crop"),
    "rotate": Augmentation(_rotate, "warp", "rotate"),
    "flip": Augmentation(_flip, "warp", "flip"),
    "elastic_distortion": Augmentation(_elastic, "warp", "elastic_distortion"),
    "random_crop": Augmentation(_crop, "warp", "random_crop"),
    "paste_nuclei": Augmentation(collage.paste_some, "sample", "paste_nuclei"),
    "fade_nuclei": Augmentation(color.fade_nuclei, "nuclei", "fade_nuclei"),
    "style_mix": Augmentation(color.mix_style, "style", "style_mix"),
    "color_equalize": Augmentation(color.equalize_some, "image", "color_equalize", rgb=True),
    "color_jitter": Augmentation(color.jitter, "image", "color_jitter", light=True),
    "stain_shift": Augmentation(color.shift_stain, "image", "stain_shift", rgb=True),
    "color_space_shift": Augmentation(color.shift_lab, "image", "color_space_shift", rgb=True),
    "channel_shuffle": Augmentation(color.shuffle, "image", "channel_shuffle", rgb=True),
    "gray": Augmentation(color.gray, "image", "gray", rgb=True),
    "recolor": Augmentation(color.recolor, "image", "recolor", rgb=True),
    "color_invert": Augmentation(color.invert, "image", "color_invert", rgb=True),
    "illumination": Augmentation(color.illuminate, "image", "illumination", light=True),
    "blur": Augmentation(color.blur, "image", "blur"),
    "add_noise": Augmentation(color.noise, "image", "add_noise", light=True),
    "compress": Augmentation(color.compress, "image", "compress", rgb=True),
}


#: What is off in the last epochs ([train] calm_share): what it teaches stays, and images look again as they do.
CALMED = ("fade_nuclei", "channel_shuffle", "color_space_shift", "color_invert", "blur", "add_noise", "compress")


def calm(pre: Pre) -> Pre:
    """The settings with which images are changed less, see `CALMED`."""
    return pre.model_copy(update=dict.fromkeys(CALMED, False))


def _on_lightness(run: Callable[[Image, Rng], Image]) -> Callable[[Image, Rng], Image]:
    """The same for the first of three channels, the lightness, and nothing for the two of colour."""

    def changed(image: Image, rng: Rng) -> Image:
        light = run(np.repeat(image[..., :1], 3, axis=-1), rng)
        return np.concatenate([light[..., :1], image[..., 1:]], axis=-1)

    return changed


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
    Labels keep their ids; those that fall outside are gone, and mirror images and nuclei that are pasted get new ones.
    """
    fitting = [row for row in AUGMENTATIONS.values() if pre.color_space == "rgb" or not row.rgb]
    if pre.color_space == "lab":
        fitting = [replace(row, run=_on_lightness(row.run)) if row.light else row for row in fitting]
    rows = [row for row in fitting if getattr(pre, row.switch)]
    stages = ("warp", "sample", "nuclei", "style", "image")
    warps, samples, nuclei, styles, images = ([row.run for row in rows if row.stage == stage] for stage in stages)

    def transform(sample: Sample, rng: Rng) -> Sample:
        warp = Warp.centered(sample.labels.shape, (width, width))
        if not pre.random_crop:
            warp.linear = np.diag(np.array(warp.source_shape[::-1]) / width)
        elif pre.equal_size and pre.nucleus_diameter and sample.diameter:
            warp.linear /= np.clip(pre.nucleus_diameter / sample.diameter, *EQUAL_RANGE)
        for run in warps:
            warp = run(warp, rng, pre)
        sample = warp.apply(sample, precise)
        image, labels = sample.image, sample.labels
        for run in samples:
            image, labels = run(image, labels, rng)
        for run in nuclei:
            image = run(image, labels, rng)
        if sample.style is not None:
            for run in styles:
                image = run(image, _cut(sample.style, width, rng), rng)
        for run in images:
            image = run(image, rng)
        return replace(sample, image=image, labels=labels)

    return transform
