"""Light and stain: how nuclei look to a microscope, given where they are.

Every painter takes random numbers, labels (H, W) int32 and the flow of `draw_flow`, and gives the image, (H, W, 3)
float, about [0, 1].
"""

from __future__ import annotations

from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage as ndi

from labels import depth
from light import DAB, HEMATOXYLIN

Map = NDArray[np.floating]

# Optical densities (red, green, blue) of one unit of further stains, chosen to look like the slides they stand for.
EOSIN = (0.10, 0.80, 0.30)
THIONIN = (0.62, 1.05, 0.17)  # violet sections
GIEMSA = (0.48, 1.05, 0.30)  # purple smears of blood and marrow
ALUM = (0.63, 0.78, 0.36)  # hematoxylin as scanned slides of many laboratories show it, more violet
GRAY = (1.0, 1.0, 1.0)


def draw_flow(rng: np.random.Generator, shape: tuple[int, int]) -> Map:
    """Direction of the fibres: (2, H, W), the y and x of unit vectors that turn slowly across the image."""
    angle = rng.uniform(-np.pi, np.pi) + 0.7 * _noise(rng, shape, 90)
    return np.stack([np.sin(angle), np.cos(angle)]).astype(np.float32)


def paint_fluorescence(
    rng: np.random.Generator,
    labels: NDArray[np.int32],
    flow: Map,
    blur: tuple[float, float] = (0.7, 1.3),
    glow: tuple[float, float] = (0.05, 0.25),
    spots: float = 0.0,
    ghosts: float = 0.0,
) -> Map:
    """Glowing nuclei, dim to bright, seen through a lens that blurs and a camera that counts photons.

    `blur` (pixels) and `glow` (share of the light that is spread far around) are drawn between two values: thick tissue
    is never all in focus. Up to `spots`, chromatin lies in bright grains and rims; up to `ghosts`, nuclei above and
    below shine through, out of focus and not labelled.
    """
    deep = depth(labels)
    bright = np.clip(np.exp(rng.normal(-0.6, 0.45, labels.max() + 1)), 0.12, 1.3).astype(np.float32)
    grain = 0.16 * _noise(rng, labels.shape, 2.2) + 0.12 * _noise(rng, labels.shape, 5)
    nucleoli = np.clip(_noise(rng, labels.shape, 5) - 1.2, 0, 1)
    dome = 1 - 0.45 * np.exp(-deep / 2.5)
    if spots:
        dome += spots * rng.uniform(0, 1.2) * np.clip(_noise(rng, labels.shape, 3.5) - 1, 0, 2)
        dome += spots * rng.uniform(-0.3, 0.8) * np.exp(-((deep - 1.5) ** 2) / 2)
    light = np.where(labels > 0, bright[labels] * dome * np.maximum(1 + grain - 0.5 * nucleoli, 0.2), 0)
    if ghosts:
        behind = ghosts * rng.uniform(0, 0.35) * _drops(rng, labels.shape, 0.006 * rng.random(), (7, 13))
        light += cv2.GaussianBlur(behind, (0, 0), rng.uniform(2.5, 6))
    haze = cv2.GaussianBlur(light, (0, 0), 14) * rng.uniform(*glow)
    light = cv2.GaussianBlur(light, (0, 0), rng.uniform(*blur)) + haze
    light *= rng.uniform(0.25, 0.95) * (1 + 0.06 * _noise(rng, labels.shape, 120))
    light += rng.uniform(0.015, 0.05)
    photons = rng.uniform(150, 900)
    light = rng.poisson(np.maximum(light, 0) * photons) / photons + rng.normal(0, 0.004, labels.shape)
    return np.repeat(light.astype(np.float32)[..., None], 3, axis=2)


#: Thick tissue, never all in focus.
paint_thick = partial(paint_fluorescence, blur=(1.1, 2.2), glow=(0.3, 0.9))
#: A layer of cells that others lie above and below, chromatin in grains and rims.
paint_layer = partial(paint_fluorescence, blur=(0.6, 1.8), glow=(0.1, 0.5), spots=1.0, ghosts=1.0)


def paint_tissue(rng: np.random.Generator, labels: NDArray[np.int32], flow: Map) -> Map:
    """Hematoxylin and eosin: purple nuclei among wavy pink fibres, with a pale rift here and there."""
    shape = labels.shape
    fibres = 0.6 * _fibres(rng, flow) + 0.5 * _noise(rng, shape, 9) + 0.5 * _noise(rng, shape, 40)
    rift = _smoothstep(_noise(rng, shape, 50) + 0.15 * fibres, 1.1, 1.35)
    rift *= 1 - np.exp(-((_distance(labels == 0) / 7) ** 2))  # nuclei keep some tissue around them
    eosin = rng.uniform(0.4, 0.65) * np.maximum(1 + 0.32 * fibres, 0.15) + 0.04 * _noise(rng, shape, 2)
    haze = 0.10 * np.maximum(1 + 0.6 * _noise(rng, shape, 18), 0)
    nuclei = rng.uniform(0.85, 1.25) * _chromatin(rng, labels)
    return _transmit(rng, [(nuclei + haze * (1 - rift), HEMATOXYLIN), (eosin * (1 - 0.95 * rift), EOSIN)])


def paint_cells(rng: np.random.Generator, labels: NDArray[np.int32], flow: Map) -> Map:
    """Hematoxylin and eosin again, of organs rather than fibres, and no two images stained alike.

    Nuclei sit in cells that border on each other, their bodies empty, pink or bluish and their walls dark, pale or not
    to be seen; between the cells run strands of fibre, blood lies in drops, and a lumen is white. What looks like a
    nucleus and is none, red cells, vacuoles and smudges, is not labelled.
    """
    shape, outside = labels.shape, labels == 0
    strand = _smoothstep(_noise(rng, shape, 60) + 0.3 * _noise(rng, shape, 15), rng.uniform(0.2, 1.6), 1.8)
    lumen = _smoothstep(_noise(rng, shape, 55) + 0.2 * _noise(rng, shape, 8), rng.uniform(0.9, 2.2), 2.4)
    lumen *= 1 - np.exp(-((_distance(outside) / rng.uniform(4, 12)) ** 2))
    vacuoles = _drops(rng, shape, 0.003 * rng.random() ** 3, (3, 14)) * outside
    tissue = (1 - lumen) * (1 - rng.uniform(0.5, 1) * vacuoles)
    body, wall = _bodies(rng, labels)
    grain = 1 + rng.uniform(0.05, 0.3) * _noise(rng, shape, 3) + rng.uniform(0.05, 0.45) * _noise(rng, shape, 8)
    pink, blue = rng.uniform(0.03, 0.75), rng.uniform(0, 0.65) ** 2
    fibre = rng.uniform(0.4, 1.0) * np.maximum(1 + 0.3 * _fibres(rng, flow), 0.1)
    eosin = (pink * body * (1 - strand) + fibre * strand) * np.maximum(grain, 0.1)
    eosin += rng.uniform(-0.6, 0.7) * wall * outside * (1 - strand) * min(1.0, pink + 0.3)
    haze = blue * body * np.maximum(grain + 0.3 * _noise(rng, shape, 14), 0) + 0.5 * blue * strand
    red = _drops(rng, shape, 0.004 * rng.random() ** 2, (3.5, 6.5)) * outside
    smudge = cv2.GaussianBlur(_drops(rng, shape, 0.003 * rng.random() ** 2, (4, 10)), (0, 0), rng.uniform(2, 4))
    # The more hematoxylin the bodies take up, the more the nuclei do.
    chromatin = _chromatin(rng, labels, openness=rng.uniform(0.2, 5), pale=rng.uniform(0.5, 0.85))
    nuclei = (0.8 * blue + rng.uniform(0.45, 1.3)) * chromatin
    nuclei = cv2.GaussianBlur(nuclei, (0, 0), rng.uniform(0.3, 1.1))
    haze = np.maximum(haze, 0.5 * smudge) * tissue
    eosin = np.maximum(np.maximum(eosin * tissue * np.where(outside, 1.0, rng.uniform(0.2, 0.8)), 0.9 * red), 0)
    image = _transmit(rng, [(np.maximum(nuclei + 0.5 * haze, haze), _vary(rng, ALUM)), (eosin, _vary(rng, EOSIN))])
    sharper = image + rng.uniform(0, 0.8) * (image - cv2.GaussianBlur(image, (0, 0), 1.5))  # as scanners do
    return sharper * rng.uniform(0.85, 1.0, 3).astype(np.float32)


def paint_counterstain(rng: np.random.Generator, labels: NDArray[np.int32], flow: Map) -> Map:
    """Immunohistochemistry: blue nuclei, pale to dark, among grayish fibres; patches of tissue are marked brown."""
    shape = labels.shape
    fibres = 0.5 * _fibres(rng, flow) + 0.4 * _noise(rng, shape, 9)
    marked = _smoothstep(_noise(rng, shape, 45) + 0.2 * fibres, rng.uniform(-0.3, 0.8), 1.6)
    brown = rng.uniform(0.2, 0.7) * marked * np.maximum(1 + 0.3 * fibres, 0.1) * np.where(labels > 0, 0.4, 1)
    haze = rng.uniform(0.08, 0.25) * np.maximum(1 + 0.4 * fibres, 0)
    nuclei = rng.uniform(0.5, 1.1) * _chromatin(rng, labels)
    return _transmit(rng, [(np.maximum(nuclei, haze), HEMATOXYLIN), (brown, DAB)])


def paint_purple(rng: np.random.Generator, labels: NDArray[np.int32], flow: Map) -> Map:
    """One purple stain, anywhere between a smear on near-white and a section on lilac ground."""
    section = rng.random()
    stain = tuple(np.array(GIEMSA) * (1 - section) + np.array(THIONIN) * section)
    shape = labels.shape
    uneven = 0.08 * _fibres(rng, flow) + 0.2 * _noise(rng, shape, 50) + 0.06 * _noise(rng, shape, 5)
    ground = (0.05 + 0.3 * section) * np.maximum(1 + uneven, 0)
    cytoplasm = 0.14 * (1 - section) * cv2.GaussianBlur(_cells(rng, labels, reach=7), (0, 0), 2)
    nuclei = rng.uniform(1.0, 1.5) * _chromatin(rng, labels)
    dust = np.full(shape, 0.06, np.float32)
    return _transmit(rng, [(np.maximum(nuclei, ground + cytoplasm), stain), (dust, GRAY)])


def paint_brightfield(rng: np.random.Generator, labels: NDArray[np.int32], flow: Map) -> Map:
    """Gray smear: dark nuclei inside faint, folded cell bodies on light, unevenly lit ground."""
    shape = labels.shape
    folds = 0.1 * _fibres(rng, flow) + 0.14 * _noise(rng, shape, 4) + 0.18 * _noise(rng, shape, 12)
    cells = _cells(rng, labels, reach=rng.uniform(14, 24))
    body = rng.uniform(0.18, 0.4) * cells * np.maximum(1 + folds, 0.1)
    ground = rng.uniform(0.06, 0.2) + 0.02 * _noise(rng, shape, 100) + 0.006 * _noise(rng, shape, 2)
    nuclei = rng.uniform(0.7, 1.1) * _chromatin(rng, labels)
    gray = _transmit(rng, [(ground + body + nuclei, (1.0,))])
    return np.repeat(gray, 3, axis=2)


def _bodies(rng: np.random.Generator, labels: NDArray[np.int32]) -> tuple[Map, Map]:
    """The cells around nuclei, each of a stain of its own: (H, W), about 1; and the walls between them, in [0, 1]."""
    if not labels.any():
        return np.ones(labels.shape, np.float32), np.zeros(labels.shape, np.float32)
    nearest = ndi.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    cell = labels[tuple(nearest)].astype(np.float32)
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]].astype(np.float32)
    bend = rng.uniform(0.5, 3)
    x, y = x + bend * _noise(rng, labels.shape, 14), y + bend * _noise(rng, labels.shape, 14)
    cell = cv2.remap(cell, x, y, cv2.INTER_NEAREST, None, cv2.BORDER_REPLICATE)
    own = np.exp(rng.normal(0, rng.uniform(0, 0.4), labels.max() + 1)).astype(np.float32)
    ring = np.ones((3, 3), np.uint8)
    wall = (cv2.dilate(cell, ring) != cv2.erode(cell, ring)).astype(np.float32)
    width = rng.uniform(0.6, 1.8)
    wall = np.minimum(2 * width * cv2.GaussianBlur(wall, (0, 0), width), 1)
    return cv2.GaussianBlur(own[cell.astype(np.int32)], (0, 0), 1.5), wall


def _drops(rng: np.random.Generator, shape: tuple[int, ...], density: float, radius: tuple[float, float]) -> Map:
    """Round drops in heaps, `density` of them a pixel of a heap: (H, W), 1 inside and 0 outside.

    `radius` (pixels) is drawn between two values once, and varies around it by 15 percent.
    """
    drops = np.zeros(shape, np.uint8)
    heap = _noise(rng, shape, 40) > 0.5
    size = rng.uniform(*radius)
    for y, x in rng.uniform(0, 1, (rng.poisson(density * drops.size), 2)) * shape:
        if heap[int(y), int(x)]:
            center, r = (int(x * 16), int(y * 16)), int(16 * size * rng.uniform(0.85, 1.15))
            cv2.circle(drops, center, r, 1, cv2.FILLED, shift=4)
    return drops.astype(np.float32)


def _vary(rng: np.random.Generator, stain: tuple[float, ...]) -> tuple[float, ...]:
    """A stain as another laboratory has it: other optical densities, and more or less of all of them."""
    return tuple(np.maximum(np.array(stain) + rng.normal(0, 0.08, 3), 0.03) * rng.uniform(0.8, 1.25))


def _transmit(rng: np.random.Generator, layers: list[tuple[Map, tuple[float, ...]]]) -> Map:
    """Send white light through stains (Beer-Lambert), a lens and a camera.

    `layers` pairs an amount of stain, (H, W), with its C optical densities. Returns (H, W, C), about [0, 1].
    """
    density = np.zeros((*layers[0][0].shape, len(layers[0][1])), np.float32)
    for amount, stain in layers:
        density += amount[..., None] * np.array(stain, np.float32)
    image = cv2.GaussianBlur(np.exp(-density), (0, 0), 0.85)
    image = image.reshape(density.shape)  # OpenCV drops a lone channel
    return image + 0.008 * rng.standard_normal(image.shape, np.float32)


def _chromatin(rng: np.random.Generator, labels: NDArray[np.int32], openness: float = 1.2, pale: float = 0.55) -> Map:
    """Stain taken up by nuclei, (H, W), about 1 inside and 0 outside.

    Each is somewhere between dense (dark throughout) and vesicular (by `pale` lighter, clumped, with dark rim and
    nucleolus), the more of them the latter the greater the `openness`.
    """
    n, deep = labels.max() + 1, depth(labels)
    open_ = (rng.beta(openness, 1.6, n).astype(np.float32))[labels]
    strength = np.clip(rng.normal(1, 0.16, n), 0.6, 1.5).astype(np.float32)[labels]
    clumps = 0.7 * _noise(rng, labels.shape, 2.5) + 0.5 * _noise(rng, labels.shape, 5)
    nucleoli = np.clip(_noise(rng, labels.shape, 5) - 1.3, 0, 1)
    rim = np.exp(-((deep - 1) ** 2) / 2.5)
    inside = 1.15 - pale * open_ + (0.08 + 0.22 * open_) * clumps + (pale - 0.15) * open_ * rim
    inside += 1.45 * pale * open_ * nucleoli
    edge = np.where(deep <= 1, 0.8, 1.0)  # seen slantwise, so that touching nuclei show a seam
    return np.where(labels > 0, strength * np.maximum(inside, 0.15) * edge, 0).astype(np.float32)


def _cells(rng: np.random.Generator, labels: NDArray[np.int32], reach: float) -> Map:
    """Ragged cell bodies about `reach` pixels around nuclei: (H, W) in [0, 1], a little darker at the rim."""
    ragged = 0.3 * _noise(rng, labels.shape, 22) + 0.06 * _noise(rng, labels.shape, 6)
    far = _distance(labels == 0) + reach * ragged
    inside = _smoothstep(-far, -reach - 1, -reach + 1)
    return inside * (0.8 + 0.2 * np.exp(-(((far - reach) / 2) ** 2)))


def _distance(mask: NDArray[np.bool_]) -> Map:
    """Distance of each True pixel to the nearest False one; bounded where there is none."""
    far = np.float32(sum(mask.shape))
    return np.minimum(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5), far)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Map:
    """Smooth noise, (H, W) of mean 0 and variance about 1, whose bumps are about `scale` pixels wide."""
    height, width = (int(np.ceil(size / scale)) + 1 for size in shape)
    coarse = rng.standard_normal((height, width), np.float32)
    fine = cv2.resize(coarse, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    top, left = (int(rng.integers(0, max(int(scale), 1))) for _ in range(2))
    return 1.2 * fine[top : top + shape[0], left : left + shape[1]]


def _fibres(rng: np.random.Generator, flow: Map) -> Map:
    """Streaks along `flow`: noise averaged along the stream lines, (H, W), mean 0 and variance 1.

    Line integral convolution (Cabral & Leedom 1993, doi:10.1145/166117.166151) by doubling: each pass
    reaches twice as far as the one before, so four of them smear over some 30 pixels.
    """
    y, x = np.mgrid[: flow.shape[1], : flow.shape[2]].astype(np.float32)
    streaks = _noise(rng, flow.shape[1:], 3)
    for step in (1, 2, 4, 8):
        ends = [
            cv2.remap(streaks, x + s * flow[1], y + s * flow[0], cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)
            for s in (-step, step)
        ]
        streaks = (streaks + ends[0] + ends[1]) / 3
    return (streaks - streaks.mean()) / max(streaks.std(), 1e-6)


def _smoothstep(values: Map, low: float, high: float) -> Map:
    part = np.clip((values - low) / (high - low), 0, 1)
    return part * part * (3 - 2 * part)
