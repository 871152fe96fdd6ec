"""Score checkpoints on validation images with noise, blur, uneven light or another stain, the masks as they are.

    python docs/looks.py DATA CHECKPOINT [CHECKPOINT ...]

DATA is a data folder; its validation images are predicted, those of the first checkpoint, which a config.ini in the
folder may name ([dataset] valid_ids). A look is the same for all checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from columns import align
from config import load_config
from division import recall_side
from image import Pixels, as_seen, read_image, read_labels
from light import density, intensity, is_gray
from predict import Segmenter, load_segmenter
from score import score_image

Image = NDArray[np.uint8]
Look = Callable[[Image, np.random.Generator], NDArray]


def noisy(image: Image, rng: np.random.Generator) -> NDArray:
    """Noise of 6 percent of the image's range; the same in all channels of a gray one."""
    low, high = np.percentile(image, (0.1, 99.9))
    shape = (*image.shape[:2], 1 if is_gray(image) else 3)
    return image + 0.06 * max(high - low, 1) * rng.standard_normal(shape)


def blurred(image: Image, rng: np.random.Generator) -> NDArray:
    """Out of focus, by a Gaussian of 1.5 pixels."""
    return cv2.GaussianBlur(image, (0, 0), 1.5)


def jpeg(image: Image, rng: np.random.Generator) -> NDArray:
    """As a JPEG of quality 20."""
    coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 20])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))[..., ::-1]


def fading(image: Image, rng: np.random.Generator) -> NDArray:
    """Lit from the right: at the left edge three tenths of the light, above the darkest where the image is dark."""
    dark = np.percentile(image, 1) if is_gray(image) and image.mean() < 127 else 0
    return dark + (image - dark) * np.linspace(0.3, 1, image.shape[1])[:, None]


def bluer(image: Image, rng: np.random.Generator) -> NDArray:
    """Another stain, of what is pink or purple: hues 28 degrees further to blue, seven tenths of the saturation."""
    colors = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.int16)
    colors[..., 0] = (colors[..., 0] - 14) % 180
    colors[..., 1] = 0.7 * colors[..., 1]
    return cv2.cvtColor(colors.astype(np.uint8), cv2.COLOR_HSV2RGB)


def faint(image: Image, rng: np.random.Generator) -> NDArray:
    """Half of the stain."""
    return intensity(density(image) / 2)


LOOKS: dict[str, Look] = {
    "as it is": lambda image, rng: image,
    "noisy": noisy,
    "blurred": blurred,
    "JPEG": jpeg,
    "fading light": fading,
}
#: Of coloured images alone, which are of stained cells on white.
STAINS: dict[str, Look] = {"stained, as it is": LOOKS["as it is"], "bluer": bluer, "faint": faint}


def main(data: str, checkpoints: list[str]) -> None:
    config = load_config(folder=data)
    segmenters = [load_segmenter([checkpoint], config).for_labels() for checkpoint in checkpoints]
    records = recall_side(Path(data), config, segmenters[0].saved, "valid")
    segmenters = [segmenter.for_many(len(records)) for segmenter in segmenters]
    scores: dict[str, list[list[float]]] = {look: [] for look in (*LOOKS, *STAINS)}
    for number, record in enumerate(records):
        if record.masks is None:
            raise ValueError(f"{record.id} has no masks")
        image = read_image(record.image, *segmenters[0].config.pre.policy.stored)
        truth = read_labels(record.masks, image.shape[:2])
        for name, look in (LOOKS if is_gray(image) else LOOKS | STAINS).items():
            changed = np.rint(np.clip(look(image, np.random.default_rng(number)), 0, 255)).astype(np.uint8)
            found = [each(see(changed, each, record.id)) for each in segmenters]
            scores[name].append([score_image(record, truth, labels).mean_precision for labels in found])
    titles = ["look", "images", *(Path(checkpoint).name for checkpoint in checkpoints)]
    means = {name: np.mean(found, axis=0) for name, found in scores.items() if found}
    print(align([titles, *([name, len(scores[name]), *(f"{x:.3f}" for x in mean)] for name, mean in means.items())]))


def see(image: Image, segmenter: Segmenter, name: str) -> Image:
    """What the networks see of it; its channels are chosen already."""
    return as_seen(Pixels(image, False), segmenter.config.pre.policy._replace(channels=()), name)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
