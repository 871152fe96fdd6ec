"""Draw the learning curves of several runs side by side, from their TensorBoard logs.

python docs/curves.py docs/curves.png checkpoint/dcan checkpoint/msdnet
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

#: Logged scalar -> what its panel is called, and whether each curve is divided by its first value.
PANELS = {
    "train/loss": ("loss of an epoch, relative to the first", True),
    "train/iou/semantic": ("pixel IoU of the semantic head, training crops", False),
}


def main(target: str, *folders: str) -> None:
    figure = Figure((11, 4), 110, layout="constrained")
    for ax, (tag, (title, relative)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for i, folder in enumerate(folders):
            events = EventAccumulator(str(Path(folder) / "log"))
            events.Reload()
            if tag not in events.Tags()["scalars"]:
                continue  # a detector has no semantic head
            points = events.Scalars(tag)
            values = [point.value / (points[0].value if relative else 1) for point in points]
            minutes = [(point.wall_time - events.FirstEventTimestamp()) / 60 for point in points]
            ax.plot(minutes, values, marker=".", color=f"C{i}", label=Path(folder).name)
        ax.set(title=title, xlabel="minutes")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(target)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
