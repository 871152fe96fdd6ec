"""Compare runs with a baseline, image by image: a row each, and a plot of the differences with their intervals.

    python docs/ablation.py docs/ablation.png runs/baseline runs/strong_colour runs/equal_size

A run is a folder that holds known/iou.csv and unknown/iou.csv, as `valid.py --iou --output` writes them: scores on
kinds of images that were trained on, and on kinds that were not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from score import paired_difference, read_scores

SIDES = ("known", "unknown")


def main(target: str, *folders: str) -> None:
    scores = {folder: [read_scores(Path(folder) / side / "iou.csv") for side in SIDES] for folder in folders}
    base, *others = folders
    figure = Figure((8, 1.5 + 0.4 * len(others)), 110, layout="constrained")
    ax = figure.subplots()
    for folder in folders:
        means = [float(np.mean(list(side.values()))) for side in scores[folder]]
        cells = [f"{mean:.4f}" for mean in means]
        for i, (before, after) in enumerate(zip(scores[base], scores[folder], strict=True)):
            if folder != base:
                mean, low, high = paired_difference(before, after)
                cells[i] += f" ({mean:+.4f}, {low:+.4f} to {high:+.4f})"
                y = others.index(folder) + 0.3 * i
                ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=f"C{i}", capsize=3)
        print(f"| {Path(folder).name} | {' | '.join(cells)} |")
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.set(yticks=np.arange(len(others)) + 0.15, yticklabels=[Path(folder).name for folder in others])
    ax.set(xlabel="mean AP against the baseline; blue: known kinds, orange: unknown")
    ax.invert_yaxis()
    figure.savefig(target)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
