"""The colours in which a network sees an image: stains brought to one look, and the colour space.

Every function takes an (H, W, 3) uint8 RGB image and gives an array of the same shape and type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2hed

from light import density, intensity, is_gray

Image = NDArray[np.uint8]

#: What a stain of full strength is in units of scikit-image; 99 percent of the pixels of stained tissue lie below.
FULL_STAIN = 0.3
#: Optical density (red, green, blue) of hematoxylin and of eosin, and how much of each there is in the strongest
#: hundredth of the pixels: the reference of Macenko's method as its implementations share it.
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
AMOUNTS = np.array([1.9705, 1.0308])
#: Mean and deviation of CIELAB over the tissue of 13 slides in hematoxylin and eosin (TCGA), stretched.
LAB_MEAN, LAB_STD = np.array([50.1, 31.5, -13.8]), np.array([17.0, 7.2, 8.2])

#: Optical density, of the natural logarithm, below which a pixel is no tissue, and above which it is clipped.
MIN_DENSITY, MAX_DENSITY = 0.15, 3.0
MIN_TISSUE = 100  # pixels from which stains can be told
MIN_LIKENESS = 0.94  # cosine between a stain and that of the reference; below it, it is another dye
MIN_ANGLE = 0.2  # radians between two stains; below it there is one


def see(image: Image, space: str = "rgb", normalize: str = "none") -> Image:
    """An image as a network is to see it: `NORMALIZERS` of `normalize`, then `SPACES` of `space`.

    Gray images have no stain; they are not normalized.
    """
    if normalize != "none" and not is_gray(image):
        image = NORMALIZERS[normalize](image)
    return SPACES[space](image)


def normalize_macenko(image: Image) -> Image:
    """Give the two stains of an image the colours and the strength of the reference.

    The stains are the outermost directions of the optical density, in the plane in which it varies most. An image with
    too little tissue to tell them, with one stain, or with other dyes than hematoxylin and eosin, stays as it is:
    spread over two stains that it has not, it would be noise.

    References
    ----------
    M. Macenko et al., A method for normalizing histology slides for quantitative analysis, 2009,
    doi:10.1109/ISBI.2009.5193250
    """
    absorbed = density(image).reshape(-1, 3).astype(np.float64)
    tissue = absorbed[((absorbed > MIN_DENSITY) & (absorbed < MAX_DENSITY)).all(axis=1)]
    stains = _find_stains(tissue) if len(tissue) >= MIN_TISSUE else None
    if stains is None:
        return image
    amounts = absorbed @ np.linalg.pinv(stains)
    strongest = np.maximum(np.percentile(amounts, 99, axis=0), 1e-3)
    normal = (amounts * (AMOUNTS / strongest)) @ STAINS
    return _to_image(intensity(normal), image.shape)


def normalize_reinhard(image: Image) -> Image:
    """Give the colours of the tissue the mean and the deviation of the reference, each channel by itself.

    What is bright has no stain and keeps its colour, or empty glass would be tinted by whatever lies beside it.

    References
    ----------
    E. Reinhard et al., Color transfer between images, 2001, doi:10.1109/38.946629; in CIELAB, in place of their space.
    """
    stained = np.clip(density(image).max(axis=-1) / (2 * MIN_DENSITY), 0, 1)[..., None]
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    tissue = lab[stained[..., 0] == 1]
    if len(tissue) < MIN_TISSUE:
        return image
    moved = (lab - tissue.mean(axis=0)) * (LAB_STD / np.maximum(tissue.std(axis=0), 1)) + LAB_MEAN
    moved[..., 0] = np.clip(moved[..., 0], 0, 100)
    normal = 255 * cv2.cvtColor(moved.astype(np.float32), cv2.COLOR_LAB2RGB)
    return _to_image(image + stained * (normal - image), image.shape)


def to_lab(image: Image) -> Image:
    """CIELAB: lightness of 0 to 100 as 0 to 255, and the two colour axes with 128 for none."""
    return cast(Image, cv2.cvtColor(image, cv2.COLOR_RGB2LAB))


def to_hed(image: Image) -> Image:
    """How much hematoxylin, eosin and DAB there is, 0 to `FULL_STAIN` as 0 to 255.

    References
    ----------
    A. C. Ruifrok and D. A. Johnston, Quantification of histochemical staining by color deconvolution, Anal Quant Cytol
    Histol 23 (2001) 291-299
    """
    # A pixel of intensity 0 would be as dense as nothing is.
    return _to_image(255 / FULL_STAIN * rgb2hed(np.maximum(image, 1)), image.shape)


def to_gray(image: Image) -> Image:
    """The luminance, in three equal channels."""
    return cast(Image, cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _find_stains(tissue: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Optical density of hematoxylin and of eosin, (2, 3), from (N, 3); None where these two are not the stains."""
    plane = np.linalg.eigh(np.cov(tissue.T))[1][:, :0:-1]
    plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)
    along, across = (tissue @ plane).T
    angles = np.percentile(np.arctan2(across, along), (1, 99))
    if angles[1] - angles[0] < MIN_ANGLE:
        return None
    stains = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T
    stains = stains[np.argsort(-stains[:, 0])]  # hematoxylin takes more of the red
    likeness = (stains * STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)).sum(axis=1)
    return stains if likeness.min() >= MIN_LIKENESS else None


def _to_image(values: NDArray[np.floating], shape: tuple[int, ...]) -> Image:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8).reshape(shape)


NORMALIZERS: dict[str, Callable[[Image], Image]] = {
    "none": lambda image: image,
    "macenko": normalize_macenko,
    "reinhard": normalize_reinhard,
}
"""``[pre] stain_normalize`` -> function."""

SPACES: dict[str, Callable[[Image], Image]] = {
    "rgb": lambda image: image,
    "lab": to_lab,
    "hed": to_hed,
    "gray": to_gray,
}
"""``[pre] color_space`` -> function."""
