"""Rows: the maps a crop is trained on, and a whole training sample."""

from __future__ import annotations

import os
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks import plain_targets
from benchmarks.inputs import Inputs, Labels
from benchmarks.row import Floor, Job, Row, optional
from config import Contour, Pre
from image import read_image
from target import make_targets, plan_targets
from transform import AUGMENTATIONS, Sample, Warp, build_transform

HEADS, WEIGHT, WIDTH = ("semantic", "contour", "marker"), "border", 256
PLAN = plan_targets(HEADS, Pre(), Contour())
#: One float32 map of 256 px is 256 kB.
MAP_BYTES = 4 * WIDTH * WIDTH
#: All that the row is about, and nothing else.
STEPS = ("random_crop", "color_jitter", "elastic_distortion")
PRE = Pre(**{row.switch: row.switch in STEPS for row in AUGMENTATIONS.values()}, min_scale=0.9, max_scale=1.2)
#: With this seed the crop is distorted, as it is half of the time.
SEED = 3

Maps = dict[str, NDArray[np.float32]]


def targets(inputs: Inputs) -> Row:
    labels = inputs.crop
    n_nuclei = np.count_nonzero(np.unique(labels))
    return Row(
        f"targets ({', '.join(HEADS)}) and weight map ({WEIGHT}) of a crop of {WIDTH} px with {n_nuclei} nuclei",
        plain=lambda: loop_targets(labels),
        ours=lambda: make_targets(labels, PLAN, WEIGHT),
        agree=same_maps,
        wanted=20.0,
        same=0.97,
        floor=Floor(n_bytes=(1 + len(HEADS) + 1) * MAP_BYTES),
        note="distances are a 5 x 5 chamfer's, true to 2 percent: same is the share of pixels within 6 percent",
    )


def sample(inputs: Inputs) -> Row:
    index = int(np.argmin([abs(min(labels.shape) - 512) for labels in inputs.labels]))
    source = Sample(read_image(inputs.records[index].image), inputs.labels[index])
    transform = build_transform(PRE, WIDTH)

    def ours() -> tuple[NDArray[np.uint8], Maps]:
        found = transform(source, np.random.default_rng(SEED))
        return found.image, make_targets(found.labels, PLAN, WEIGHT)

    return Row(
        f"a sample of {WIDTH} px (crop, scale, elastic, colour, targets) from an image of "
        f"{source.labels.shape[0]} x {source.labels.shape[1]} px",
        plain=lambda: _plain_sample(source),
        ours=ours,
        agree=_same_sample,
        wanted=8.0,
        same=0.97,
        libraries={
            "opencv": lambda: _opencv_sample(source),
            "albumentations": optional("albumentations", lambda library: _albumentations(library, source)),
        },
        library_same=0.0,
        floor=Floor(n_bytes=(6 + 8) * WIDTH * WIDTH + (1 + len(HEADS)) * MAP_BYTES),
        note="libraries make the elastic crop and its colours their own way, with random numbers of their own and the "
        "same targets, so their answers are not compared",
    )


def loop_targets(labels: Labels) -> Maps:
    """The maps of `HEADS` and the weight map, a nucleus at a time."""
    maps = {head: plain_targets.LOOPS[PLAN[head]](labels) for head in HEADS}
    maps["weight"] = plain_targets.WEIGHT_LOOPS[WEIGHT](labels)
    return {name: np.asarray(value, np.float32)[None] for name, value in maps.items()}


def same_maps(theirs: Maps, ours: Maps) -> float:
    """Share of the pixels that differ by less than 6 percent or 0.05, of the map where it is least."""
    return min(float(np.isclose(ours[name], theirs[name], rtol=0.06, atol=0.05).mean()) for name in ours)


def _same_sample(theirs: tuple[NDArray[np.uint8], Maps], ours: tuple[NDArray[np.uint8], Maps]) -> float:
    """As `same_maps`, and the image within two gray levels."""
    near = np.abs(theirs[0].astype(int) - ours[0]) <= 2
    return min(float(near.mean()), same_maps(theirs[1], ours[1]))


def _plain_sample(source: Sample) -> tuple[NDArray[np.uint8], Maps]:
    """The same random numbers, every pixel of image and labels by scipy, colours by Pillow, targets by the loops."""
    rng = np.random.default_rng(SEED)
    height, width = source.labels.shape
    warp = Warp.centered((height, width), (WIDTH, WIDTH))
    for name in ("scale", "elastic_distortion", "random_crop"):
        warp = AUGMENTATIONS[name].run(warp, rng, PRE)
    x, y = np.moveaxis(warp.coordinates(), -1, 0)
    channels = [
        ndimage.map_coordinates(channel, [y, x], order=1, mode="mirror") for channel in source.image.T.swapaxes(1, 2)
    ]
    labels = ndimage.map_coordinates(source.labels, [y, x], order=0, mode="mirror")
    inside = (np.abs(y - (height - 1) / 2) <= height / 2) & (np.abs(x - (width - 1) / 2) <= width / 2)
    labels = _number_copies(labels, inside)
    curve = AUGMENTATIONS["color_jitter"].run(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2), rng)
    image = Image.fromarray(np.stack(channels, axis=-1)).point(curve[0].T.ravel().tolist())
    return np.asarray(image), loop_targets(labels)


def _number_copies(labels: NDArray[np.int32], inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Pieces of a nucleus that lie in the mirror image alone are nuclei of their own; a loop over all."""
    found, fresh = labels.copy(), int(labels.max()) + 1
    for number in np.unique(labels[labels > 0]):
        pieces, n = ndimage.label(labels == number, np.ones((3, 3)))
        for piece in (pieces == i for i in range(1, n + 1)):
            if not inside[piece].any():
                found[piece], fresh = fresh, fresh + 1
    return found


def _opencv_sample(source: Sample) -> tuple[NDArray[np.uint8], Maps]:
    """The usual recipe, a blurred field of noise (Simard et al. 2003) and remap, of the crop alone."""
    rng = np.random.default_rng(SEED)
    height, width = source.labels.shape
    zoom = rng.uniform(PRE.min_scale, PRE.max_scale)
    noise = rng.uniform(-1, 1, (WIDTH, WIDTH, 2)).astype(np.float32)
    field = cv2.GaussianBlur(noise, (0, 0), 10) * 30
    top, left = rng.integers(height - WIDTH + 1), rng.integers(width - WIDTH + 1)
    y, x = np.mgrid[top : top + WIDTH, left : left + WIDTH].astype(np.float32)
    xy = np.stack([x, y], axis=-1) / np.float32(zoom) + field
    image = cv2.remap(source.image, xy, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    labels = cv2.remap(source.labels.astype(np.float32), xy, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
    image = AUGMENTATIONS["color_jitter"].run(image, rng)
    return image, make_targets(labels.astype(np.int32), PLAN, WEIGHT)


def _albumentations(library: Any, source: Sample) -> Job:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    compose = library.Compose(
        [
            library.RandomScale((PRE.min_scale - 1, PRE.max_scale - 1), p=1),
            library.RandomCrop(WIDTH, WIDTH, pad_if_needed=True),
            library.ElasticTransform(alpha=30, sigma=10, p=1),
            library.RandomBrightnessContrast(p=1),
        ]
    )

    def run() -> tuple[NDArray[np.uint8], Maps]:
        found = compose(image=source.image, mask=source.labels.astype(np.float32))
        return found["image"], make_targets(found["mask"].astype(np.int32), PLAN, WEIGHT)

    return run
