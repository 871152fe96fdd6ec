"""Change the colours of an image at random, so that a network meets stains, dyes and cameras it has no images of.

Every function takes an (H, W, 3) uint8 RGB image of any content and a random generator, and gives an image of the same
shape and type. Most act only on some of the images: what share is in the first words of each docstring.
"""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from light import DAB, HEMATOXYLIN, density, intensity, is_gray

Image = NDArray[np.uint8]
FloatImage = NDArray[np.float32]
Rng = np.random.Generator

#: Optical density of hematoxylin, eosin and DAB in red, green, blue (Ruifrok and Johnston 2001).
STAINS = np.array([HEMATOXYLIN, (0.07, 0.99, 0.11), DAB])


def equalize(image: Image) -> Image:
    """Contrast limited adaptive histogram equalization of the lightness (Zuiderveld 1994), (H, W, 3) uint8."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(np.ascontiguousarray(lab[..., 0]))
    return _image(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))


def equalize_some(image: Image, rng: Rng) -> Image:
    """Half of the time: `equalize`."""
    return equalize(image) if rng.random() < 0.5 else image


def invert(image: Image, rng: Rng) -> Image:
    """One time in ten: bright becomes dark."""
    return ~image if rng.random() < 0.1 else image


def jitter(image: Image, rng: Rng) -> Image:
    """Always: brightness (by up to 0.1 of the range), contrast (0.70 to 1.42) and gamma (0.61 to 1.65) of all channels,
    through one table."""
    contrast, gamma = np.exp(rng.uniform(-0.35, 0.35)), np.exp(rng.uniform(-0.5, 0.5))
    brightness = rng.uniform(-0.1, 0.1)
    ramp = np.linspace(0, 1, 256) ** gamma
    return _look_up(image, (ramp - ramp.mean()) * contrast + ramp.mean() + brightness)


def shift_lab(image: Image, rng: Rng) -> Image:
    """Half of the time: shift (by up to 18 of 255) and stretch (0.5 to 1.4) a* and b* of CIELAB, so that a stain
    becomes another stain."""
    if rng.random() < 0.5 or is_gray(image):  # a gray image has no stain; it keeps its colour
        return image
    stretch = np.array([1.0, *rng.uniform(0.5, 1.4, 2)])
    shift = np.array([0.0, *rng.uniform(-18, 18, 2)])
    channels = np.arange(256)[:, None]
    center = np.array([0.0, 128, 128])
    table = np.clip((channels - center) * stretch + center + shift, 0, 255)
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    return _image(cv2.cvtColor(cv2.LUT(lab, np.rint(table).astype(np.uint8)[:, None, :]), cv2.COLOR_LAB2RGB))


def shift_stain(image: Image, rng: Rng) -> Image:
    """Half of the time: other amounts of each stain, and stains of a slightly other colour.

    The optical density is taken apart into hematoxylin, eosin and DAB, and put together again from more or less of each
    (Tellez et al. 2018, doi:10.1109/TMI.2018.2820199); their absorption moves too. Gray images have no stain.
    """
    if rng.random() < 0.5 or is_gray(image):
        return image
    amount = np.exp(rng.normal(0, 0.25, 3))
    stains = np.clip(STAINS + rng.normal(0, 0.1, (3, 3)), 0.02, None)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    own = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    mixing = (np.linalg.inv(own) * amount) @ stains
    absorbed = cv2.transform(density(image), mixing.T.astype(np.float32))
    absorbed += rng.normal(0, 0.03, 3).astype(np.float32)
    return _clip(intensity(absorbed))


def shuffle(image: Image, rng: Rng) -> Image:
    """One time in ten: the channels in another order."""
    return np.ascontiguousarray(image[..., rng.permutation(3)]) if rng.random() < 0.1 else image


def gray(image: Image, rng: Rng) -> Image:
    """One time in five: without colour."""
    return _image(cv2.cvtColor(_luminance(image), cv2.COLOR_GRAY2RGB)) if rng.random() < 0.2 else image


def recolor(image: Image, rng: Rng) -> Image:
    """One time in five: by lightness alone, along a ramp of random colours.

    Three colours, in order of lightness or (half of the time) against it: fluorescence becomes a stain on a bright
    ground, tissue a false-colour picture.
    """
    if rng.random() >= 0.2:
        return image
    ends = rng.uniform(0, 1, (3, 3))
    ends = 0.6 * ends + 0.4 * np.array([0.0, 0.5, 1.0])[:, None]
    ends = ends[np.argsort(ends.sum(axis=1))][:: rng.choice([-1, 1])]
    middle = rng.uniform(0.3, 0.7)
    ramp = np.stack([np.interp(np.linspace(0, 1, 256), [0, middle, 1], channel) for channel in ends.T], axis=-1)
    return _look_up(cv2.cvtColor(_luminance(image), cv2.COLOR_GRAY2RGB), ramp)


def blur(image: Image, rng: Rng) -> Image:
    """Three times in ten: out of focus, sharpened, or enlarged from fewer pixels."""
    kind = rng.integers(10)
    if kind == 0:
        return _image(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.6)))
    if kind == 1:
        soft = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.7, 2.0))
        return _image(cv2.addWeighted(image, 1 + (share := rng.uniform(0.3, 1.2)), soft, -share, 0))
    if kind == 2:
        height, width = image.shape[:2]
        factor = rng.uniform(1.3, 2.5)
        small = cv2.resize(
            image, (max(int(width / factor), 1), max(int(height / factor), 1)), interpolation=cv2.INTER_AREA
        )
        return _image(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
    return image


def noise(image: Image, rng: Rng) -> Image:
    """Half of the time: additive Gaussian noise, or multiplied speckle, of up to 8 percent; the same in all channels,
    or, half of the time where there is colour, of each its own."""
    if rng.random() < 0.5:
        return image
    n_channels = 1 if is_gray(image) or rng.random() < 0.5 else 3
    grain = rng.standard_normal((*image.shape[:2], n_channels), np.float32) * np.float32(rng.uniform(0, 0.08))
    speckle = rng.random() < 0.5
    return _clip(image * (1 + grain) if speckle else image + 255 * grain)


def compress(image: Image, rng: Rng) -> Image:
    """One time in five: stored as a JPEG of a quality between 15 and 90, as slides and figures are."""
    if rng.random() >= 0.2:
        return image
    quality = int(rng.integers(15, 91))
    coded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return _image(cv2.cvtColor(cv2.imdecode(coded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))


def illuminate(image: Image, rng: Rng) -> Image:
    """Three times in ten: uneven light, or a haze with a texture of its own.

    Light multiplies by a smooth field; haze adds one, sometimes with finer grain, in a random colour of which gray
    images take the gray.
    """
    if rng.random() >= 0.3:
        return image
    shape = image.shape[:2]
    if rng.random() < 0.5:
        return _clip(image * np.exp(0.25 * _field(shape, rng, 2))[..., None])
    haze = _field(shape, rng, 3) + rng.uniform(0, 1) * _field(shape, rng, int(rng.integers(6, 40)))
    color = np.ones(3) if is_gray(image) else rng.uniform(0.3, 1.0, 3)
    return _clip(image + haze[..., None] * (rng.uniform(4, 16) * color).astype(np.float32))


def fade_nuclei(image: Image, labels: NDArray[np.int32], rng: Rng) -> Image:
    """Three times in ten: each nucleus stands out from what is around it less, or a little more, than it did.

    Dim nuclei beside bright ones are rare in most sets of images, and lost without them. `labels` is (H, W) int32. What
    a nucleus stands out by is multiplied by 0.3 to 1.5.
    """
    inside = labels > 0
    if rng.random() >= 0.3 or not inside.any() or inside.all():
        return image
    ids, index = np.unique(labels, return_inverse=True)
    gain = np.exp(rng.normal(-0.4, 0.5, len(ids))).clip(0.3, 1.5).astype(np.float32)
    gain[ids == 0] = 1
    around = _background(image, ~inside)
    share = cv2.GaussianBlur(gain[index].reshape(labels.shape), (0, 0), 1.0)[..., None]
    return _clip(around + (image - around) * share)


def mix_style(image: Image, other: Image, rng: Rng) -> Image:
    """One time in five: the coarse colours and shading of another image, of the same shape.

    The amplitudes of the lowest spatial frequencies are taken from the other, the phases stay (Yang and Soatto 2020,
    Fourier domain adaptation, doi:10.1109/CVPR42600.2020.00414).
    """
    if rng.random() >= 0.2:
        return image
    reach = int(rng.integers(0, max(min(image.shape[:2]) // 24, 1) + 1))
    share = np.float32(rng.uniform(0.4, 1.0))
    own, style = (np.fft.rfft2(x.astype(np.float32), axes=(0, 1)) for x in (image, other))
    for rows in (slice(0, reach + 1), slice(-reach, None) if reach else slice(0, 0)):
        low = np.s_[rows, : reach + 1]
        amplitude = np.abs(own[low])
        own[low] *= (amplitude + share * (np.abs(style[low]) - amplitude)) / np.maximum(amplitude, 1e-6)
    return _clip(np.fft.irfft2(own, s=image.shape[:2], axes=(0, 1)))


def _background(image: Image, outside: NDArray[np.bool_]) -> FloatImage:
    """What the pixels of the background around each pixel look like, (H, W, 3) float32."""
    known = outside.astype(np.float32)
    quarter = [size // 4 + 1 for size in image.shape[1::-1]]
    # Blurred at a quarter of the size: nothing in it is finer than the nuclei it reaches across.
    weight = cv2.resize(known, quarter, interpolation=cv2.INTER_AREA)
    value = cv2.resize(image * known[..., None], quarter, interpolation=cv2.INTER_AREA)
    weight, value = cv2.GaussianBlur(weight, (0, 0), 4) + 1e-4, cv2.GaussianBlur(value, (0, 0), 4)
    mean = image[outside].mean(axis=0, dtype=np.float64).astype(np.float32)
    local = (value + 1e-4 * mean) / weight[..., None]
    return cast(FloatImage, cv2.resize(local, image.shape[1::-1], interpolation=cv2.INTER_LINEAR))


def _field(shape: tuple[int, int], rng: Rng, knots: int) -> FloatImage:
    """A smooth random field of unit deviation at its knots, (H, W) float32."""
    coarse = rng.standard_normal((knots + 1, knots + 1)).astype(np.float32)
    return cast(FloatImage, cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC))


def _luminance(image: Image) -> Image:
    return _image(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def _look_up(image: Image, curve: NDArray[np.float64]) -> Image:
    """Each intensity, or each of each channel, through a curve of 256 numbers in [0, 1], (256,) or (256, 3)."""
    table = np.rint(np.clip(curve, 0, 1) * 255).astype(np.uint8)
    return _image(cv2.LUT(image, table if table.ndim == 1 else table[:, None, :]))


def _clip(image: NDArray) -> Image:
    return _image(cv2.convertScaleAbs(np.maximum(image, 0)))  # rounds, and saturates at 255


def _image(array: object) -> Image:
    """OpenCV's stubs know arrays of any type; these are (H, W[, 3]) uint8."""
    return cast(Image, array)
