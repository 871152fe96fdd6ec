"""Draw the outlines of the nuclei that were drawn worst, of each kind of image: blue true, orange found, yellow both.

    python docs/failures.py docs/failures.png weights/default.pkl DATA

DATA is a data folder; its validation images are predicted, which a config.ini in it may name ([dataset] valid_ids).
Images themselves are not drawn, so that the figure may be published where they may not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import load_config
from division import recall_side
from image import read_image, read_labels
from metric import diagnose
from plot import compare, save, side_by_side
from predict import load_segmenter
from score import score_image

#: Side (px) of what is shown of an image.
WINDOW = 256


def main(target: str, checkpoint: str, data: str) -> None:
    config = load_config(folder=data)
    segmenter = load_segmenter([checkpoint], config)
    records = recall_side(Path(data), config, segmenter.saved, "valid")
    worst: dict[str, tuple[float, str, np.ndarray]] = {}
    for record in records:
        assert record.masks is not None
        image = read_image(record.image, *segmenter.config.pre.policy)
        truth, labels = read_labels(record.masks, image.shape[:2]), segmenter(image)
        score = score_image(record, truth, labels).mean_precision
        if record.sub_category not in worst or score < worst[record.sub_category][0]:
            box = worst_window(truth, labels)
            canvas = compare(np.zeros((*truth[box].shape, 3), np.uint8), labels[box], truth[box])
            worst[record.sub_category] = score, record.id, canvas
    panels = {f"{kind}: {name[:6]}, mAP {score:.2f}": canvas for kind, (score, name, canvas) in sorted(worst.items())}
    save(side_by_side(panels, columns=3), target)


def worst_window(truth: np.ndarray, labels: np.ndarray) -> tuple[slice, slice]:
    """Where in an image most nuclei were not found."""
    height, width = truth.shape
    rows, columns = ([*range(0, max(n - WINDOW, 0), WINDOW // 2), max(n - WINDOW, 0)] for n in (height, width))
    corners = [(y, x) for y in rows for x in columns]
    boxes = [(slice(y, y + WINDOW), slice(x, x + WINDOW)) for y, x in corners]
    return max(boxes, key=lambda box: int((diagnose(truth[box], labels[box]).verdicts != "found").sum()))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
