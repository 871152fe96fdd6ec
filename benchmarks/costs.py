"""How the cost of a prediction grows: with pixels, nuclei, views, networks and processes; as a table and a figure.

    python benchmarks/costs.py                          the table, in Markdown
    python benchmarks/costs.py --figure docs/costs.png  and drawn

With the weights that ship and drawn images, on all cores that OMP_NUM_THREADS allows; of each the faster
of two turns, of whole commands one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import valid
from benchmarks.machine import least
from config import load_config
from helper import DEFAULT_WEIGHTS, prepare_process
from image import Pixels, write_pixels
from plot import save
from predict import Segmenter, load_segmenter
from synthetic import draw_sample
from view import combine

SIDES, SIDE = (256, 512, 1024, 2048), 512
NUCLEI = (25, 100, 400, 1600)
VIEWS = ("none", "flips", "dihedral", "dihedral, scales")
NETWORKS = (1, 2, 3)
#: Images that one and two processes share.
N_SHARED, N_TURNS = 40, 2

#: What grows, its unit, and (value, seconds) by name of a line.
Curve = tuple[str, dict[str, list[tuple[float, float]]]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves, as PNG")
    args = parser.parse_args(argv)
    prepare_process()
    curves = [pixels(), nuclei(), views(), networks(), processes()]
    print("| what grows | line | value: seconds |\n|---|---|---|")
    for title, lines in curves:
        for name, points in lines.items():
            print(f"| {title} | {name} | {'; '.join(f'{x:g}: {y:.2f}' for x, y in points)} |")
    if args.figure:
        save(draw(curves), args.figure)
    return 0


def pixels() -> Curve:
    lines: dict[str, list[tuple[float, float]]] = {}
    for view in ("none", "flips"):
        segmenter = ready(view)
        for side in SIDES:
            image = draw_sample(1, (side, side), "fluorescence")[0]
            seconds = least(partial(segmenter, image), N_TURNS)
            lines.setdefault(f"{view}: whole prediction", []).append((side**2 / 1e6, seconds))
    return "megapixels of an image", lines


def nuclei() -> Curve:
    """On an image of four times `SIDE` squared pixels: the network costs the same whatever it sees."""
    segmenter, shape = ready("none"), (2 * SIDE, 2 * SIDE)
    lines: dict[str, list[tuple[float, float]]] = {"network": [], "separation": []}
    for wanted in NUCLEI:
        image, labels = draw_sample(2, shape, "dense", wanted)
        probs = segmenter.probs(image)
        n = float(labels.max())
        lines["network"].append((n, least(partial(segmenter.probs, image), N_TURNS)))
        lines["separation"].append((n, least(partial(segmenter.separate, probs), N_TURNS)))
    return "nuclei in an image of 1,024 px", lines


def views() -> Curve:
    image, points = draw_sample(3, (SIDE, SIDE), "tissue")[0], []
    for names in VIEWS:
        segmenter = ready(names)
        n = sum(view.zoom**2 for view in combine(segmenter.config.valid.test_time_augment))
        points.append((n, least(partial(segmenter, image), N_TURNS)))
    return "views of an image of 512 px, by their pixels", {"whole prediction": points}


def networks() -> Curve:
    image = draw_sample(3, (SIDE, SIDE), "tissue")[0]
    points = []
    for n in NETWORKS:
        segmenter = ready("flips", n)
        points.append((float(n), least(partial(segmenter, image), N_TURNS)))
    return "networks of an ensemble, 512 px, flips", {"whole prediction": points}


def processes() -> Curve:
    """Whole commands, with their start, one thread a process."""
    points = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(N_SHARED):
            write_pixels(folder, str(i), Pixels(draw_sample(i, (SIDE, SIDE), "fluorescence")[0], False))
        for n in (1, 2):
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), valid.__file__]
            command += [str(DEFAULT_WEIGHTS), "--input", str(folder), "--csv", "--output", str(folder / f"out{n}")]
            start = time.perf_counter()
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
            points.append((float(n), time.perf_counter() - start))
    return f"processes, {N_SHARED} images of 512 px", {"whole command": points}


def ready(views: str, n_networks: int = 1) -> Segmenter:
    """The weights that ship, so many times, at the size the image has: the zoom would blur what grows."""
    settings = [f"valid.test_time_augment={views}", "pre.nucleus_diameter=0"]
    return load_segmenter([DEFAULT_WEIGHTS] * n_networks, load_config(None, settings))


def draw(curves: Sequence[Curve]) -> Figure:
    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(curves))
    for ax, (title, lines) in zip(axes, curves, strict=True):
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), "o-", label=name)
        ax.set(xlabel=title, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    sys.exit(main())
