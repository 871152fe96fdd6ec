"""What each part of the augmentation adds, of eleven at once, by twelve trainings and not by two for each.

    python docs/factorial.py                                   the settings of each training, a line each
    python docs/factorial.py docs/factorial.png runs/factor    the effects, where their scores lie in runs/factor0 to 11

A part is on in six of the trainings and off in the others; its effect is the mean score of the ones less that of the
others, and every other part is on in three of each (Plackett and Burman 1946, doi:10.1093/biomet/33.4.305). Every
training has a seed of its own, so the chance in a training is averaged out with the rest. How large an effect chance
makes is read off the effects themselves (Lenth 1989, doi:10.1080/00401706.1989.10490595).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablation import SIDES, draw

from score import read_scores


def switch(*names: str) -> tuple[tuple[str, ...], ...]:
    """The settings that turn parts of [pre] off, and those that turn them on."""
    return tuple(tuple(f"pre.{name}={use}" for name in names) for use in (False, True))


#: Part -> its settings when it is off, and when it is on.
PARTS = {
    "stain_shift": switch("stain_shift"),
    "color_space_shift, channel_shuffle": switch("color_space_shift", "channel_shuffle"),
    "recolor": switch("recolor"),
    "gray": switch("gray"),
    "color_invert": switch("color_invert"),
    "blur, add_noise": switch("blur", "add_noise"),
    "illumination": switch("illumination"),
    "fade_nuclei": switch("fade_nuclei"),
    "style_mix": switch("style_mix"),
    "paste_nuclei": switch("paste_nuclei"),
    "zoom 0.55 to 2, not 0.8 to 1.25": (
        ("pre.min_scale=0.8", "pre.max_scale=1.25"),
        ("pre.min_scale=0.55", "pre.max_scale=2.0"),
    ),
}
#: Which parts of the first training are on; the next one's are moved on by one, the last training has none.
FIRST = "++-+++---+-"


def make_design() -> NDArray[np.bool_]:
    """Whether a part is on, (trainings, parts)."""
    first = np.array([sign == "+" for sign in FIRST])
    return np.stack([*(np.roll(first, i) for i in range(len(first))), np.zeros_like(first)])


def print_settings() -> None:
    for number, row in enumerate(make_design()):
        chosen = [setting for part, use in zip(PARTS.values(), row, strict=True) for setting in part[int(use)]]
        print(number, *(f"--set {setting}" for setting in (f"train.seed={number + 1}", *chosen)))


def find_margin(effects: NDArray[np.float64]) -> float:
    """How large an effect must be for chance to make it in one of twenty, most of the effects being none."""
    rough = 1.5 * np.median(np.abs(effects))
    error = 1.5 * np.median(np.abs(effects)[np.abs(effects) < 2.5 * rough])
    return float(t.ppf(0.975, len(effects) / 3) * error)


def main(target: str, prefix: str) -> None:
    design = make_design()
    columns, intervals = [], []
    for side in SIDES:
        tables = [read_scores(Path(f"{prefix}{number}") / side / "iou.csv") for number in range(len(design))]
        means = np.array([np.mean(list(scores.values())) for scores in tables])
        effects = np.array([means[on].mean() - means[~on].mean() for on in design.T])
        margin = find_margin(effects)
        print(f"{side}: trainings {means.min():.4f} to {means.max():.4f}, margin {margin:.4f}")
        columns.append([f"{effect:+.4f}" for effect in effects])
        intervals.append(np.stack([effects, effects - margin, effects + margin], axis=1))
    for part, *cells in zip(PARTS, *columns, strict=True):
        print(f"| {part} | {' | '.join(cells)} |")
    draw(target, list(PARTS), intervals, (8, 5), "mean AP with it, less without")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print_settings()
    elif len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
