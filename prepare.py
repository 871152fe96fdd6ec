"""Prepare data.

python prepare.py demo                           draw a small data set into data/demo
python prepare.py demo --images 40 --seed 7
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from config import Config
from helper import make_parser, run_script
from synthetic import write_dataset


def demo(config: Config, args: argparse.Namespace) -> int:
    """Draw images with exact masks: for training, a quarter as many for validation, and as many without masks."""
    if args.images < 1:
        raise ValueError(f"--images {args.images}: at least one")
    folder, few = args.data / "demo", max(1, args.images // 4)
    sides = (
        ("train", args.images, args.seed, True),
        ("valid", few, args.seed + 1, True),
        ("test", few, args.seed + 2, False),
    )
    for name, n, seed, masks in sides:
        there = set(os.listdir(folder / name)) if (folder / name).is_dir() else set()
        kept = len(there.intersection(write_dataset(folder / name, n, seed, masks=masks)))
        print(f"{folder / name}: {n} images" + (f", {kept} of them there already and kept as they are" if kept else ""))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("task", choices=("demo",))
    parser.add_argument("--images", type=int, default=40, metavar="N", help="images to draw (default: 40)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other images")
    return run_script(demo, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
