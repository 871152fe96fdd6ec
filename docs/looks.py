"""Score checkpoints on validation images that look as no microscope made them: how much of a score hangs on the look.

    python docs/looks.py DATA CHECKPOINT [CHECKPOINT ...]

DATA is a data folder; its validation images are predicted, which a config.ini in it may name ([dataset] valid_ids). A
look is the same for all checkpoints, and an image keeps its masks.
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
from light import density, intensity
from predict import load_segmenter
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
    """Another stain: hues 28 degrees further to blue, and seven tenths of the saturation."""
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
#: Of coloured images alone.
STAINS: dict[str, Look] = {"stained, as it is": LOOKS["as it is"], "bluer": bluer, "faint": faint}


def is_gray(image: Image) -> bool:
    return not np.ptp(image, axis=2).any()


def main(data: str, checkpoints: list[str]) -> None:
    config = load_config(folder=data)
    segmenters = [load_segmenter([checkpoint], config) for checkpoint in checkpoints]
    scores: dict[str, list[list[float]]] = {look: [] for look in (*LOOKS, *STAINS)}
    for number, record in enumerate(recall_side(Path(data), config, segmenters[0].saved, "valid")):
        assert record.masks is not None
        image = read_image(record.image)
        truth = read_labels(record.masks, image.shape[:2])
        for name, look in (LOOKS if is_gray(image) else LOOKS | STAINS).items():
            changed = np.clip(look(image, np.random.default_rng(number)), 0, 255).astype(np.uint8)
            seen = as_seen(Pixels(changed, False), segmenters[0].config.pre.policy, record.id)
            scores[name].append([score_image(record, truth, each(seen)).mean_precision for each in segmenters])
    titles = ["look", "images", *(Path(checkpoint).name for checkpoint in checkpoints)]
    means = {name: np.mean(found, axis=0) for name, found in scores.items() if found}
    print(align([titles, *([name, len(scores[name]), *(f"{x:.3f}" for x in mean)] for name, mean in means.items())]))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
