"""Compare runs with a baseline, image by image: a row each, and a plot of the differences with their intervals.

    python docs/ablation.py docs/ablation.png runs/baseline runs/strong_colour runs/equal_size

A run is a folder that holds known/iou.csv and unknown/iou.csv, as `valid.py --iou --output` writes them: scores on
kinds of images that were trained on, and on kinds that were not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from score import paired_difference, read_scores

SIDES = ("known", "unknown")


def draw(
    target: str, rows: Sequence[str], intervals: Sequence[NDArray[np.float64]], size: tuple[float, float], what: str
) -> None:
    """A plot of differences, a row each: of every side (rows, 3) of mean, low and high."""
    figure = Figure(size, 110, layout="constrained")
    ax = figure.subplots()
    for i, (mean, low, high) in enumerate(side.T for side in intervals):
        y = np.arange(len(rows)) + 0.3 * i
        ax.errorbar(mean, y, xerr=[mean - low, high - mean], fmt="o", color=f"C{i}", capsize=3)
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.set(yticks=np.arange(len(rows)) + 0.15, yticklabels=rows)
    ax.set(xlabel=f"{what}; blue: known kinds, orange: unknown")
    ax.invert_yaxis()
    figure.savefig(target)


def main(target: str, *folders: str) -> None:
    scores = [[read_scores(Path(folder) / side / "iou.csv") for side in SIDES] for folder in folders]
    intervals = []
    for folder, sides in zip(folders, scores, strict=True):
        cells = [f"{np.mean(list(side.values())):.4f}" for side in sides]
        if sides is not scores[0]:
            found = [paired_difference(before, after) for before, after in zip(scores[0], sides, strict=True)]
            cells = [
                f"{cell} ({m:+.4f}, {low:+.4f} to {high:+.4f})"
                for cell, (m, low, high) in zip(cells, found, strict=True)
            ]
            intervals.append(found)
        print(f"| {Path(folder).name} | {' | '.join(cells)} |")
    rows = [Path(folder).name for folder in folders[1:]]
    size = (8, 1.5 + 0.4 * len(rows))
    draw(target, rows, np.array(intervals).swapaxes(0, 1), size, "mean AP against the baseline")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
