"""Make images of touching and overlapping nuclei from labelled ones.

    python stitch.py data/stage1_train --images 60                    into data/stage1_train_stitch, kinds in turn
    python stitch.py data/train --images 60 --output data/train       straight among the training images
    python stitch.py data/train --worst iou.csv --keep 20             from the 20 images that were predicted worst
    python stitch.py data/train --width 512                           small images continued by their mirror images
    python stitch.py data/train --images 60 --dry-run                 say what would be made

An image smaller than --width is continued by its mirror images, a larger one is cut. Then nuclei are cut out and
pasted, turned, against others. A new image is made of images of one patient, and is booked in the CSV of the data set
as that patient's; --mix takes nuclei from other patients of the same kind as well, which ties those together in a
split. Run it again to go on where it was interrupted: images that are there stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from config import Config
from division import training_records
from helper import make_parser, run_script
from image import ImageError
from record import Record, book_records, format_counts, table_path
from stitching import Plan, Summary, format_summaries, make_stitch, pick_worst, plan_stitches, write_stitch


def run(config: Config, args: argparse.Namespace) -> int:
    args.width = config.width if args.width is None else args.width
    for name, least in (("images", 1), ("keep", 1), ("width", 64), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: at least {least}")
    material, refused = choose_material(config, args)
    plans = plan_stitches(material, args.images, args.width, args.seed, args.mix)
    folder = args.folder.absolute()
    target = args.output or folder.with_name(f"{folder.name or folder.resolve().name}_stitch")
    todo = [plan for plan in plans if not (target / plan.id).exists()]
    kinds = f" ({format_counts(plan.base for plan in todo)})" if todo else ""
    print(f"{target}: {len(todo)} images to make{kinds}, {len(plans) - len(todo)} there already")
    if not args.dry_run:
        # Booked before they are made: a run that is cut off leaves rows without images, never an image without its
        # patient.
        table = args.csv or table_path(args.data, config.dataset)
        print(f"{table}: {book_records(table, [plan.record for plan in plans])} new rows")
        refused += make(todo, target, config)
    for problem in dict.fromkeys(refused):
        print(f"refused: {problem}", file=sys.stderr)
    return 3 if refused else 0


def choose_material(config: Config, args: argparse.Namespace) -> tuple[list[Record], list[str]]:
    """The images to take nuclei from, none that validates and the worst alone where wanted, and what is none."""
    records, held = training_records(args.folder, args.data, config.dataset)
    if held:
        print(f"{len(held)} images that validate, or are kin of such, are left out")
    if not records:
        raise ValueError(f"{args.folder}: all {len(held)} images validate, or are kin of such; none is left")
    refused = [r.problem or f"{r.image}: has no masks" for r in records if r.problem or r.masks is None]
    records = [record for record in records if not record.problem and record.masks is not None]
    if args.worst:
        records = pick_worst(args.worst, records, args.keep)
        print(f"{args.worst}: the {len(records)} worst ({format_counts(records)})")
    return records, refused


def make(plans: Sequence[Plan], target: Path, config: Config) -> list[str]:
    """Make the images, and say why one could not be made."""
    made: list[Summary] = []
    refused: list[str] = []
    for plan in tqdm(plans, unit="image", disable=None):
        try:
            stitch = make_stitch(plan, config.pre.policy.stored)
        except ImageError as error:
            refused.append(str(error))
            continue
        write_stitch(target, stitch)
        made.append(stitch.summary)
    if made:
        print(format_summaries(made))
    return refused


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="labelled images, in any layout the toolkit reads")
    parser.add_argument("--images", type=int, default=60, metavar="N", help="images to make (default: 60)")
    parser.add_argument("--width", type=int, metavar="W", help="their side in pixels (default: [DEFAULT] width)")
    parser.add_argument("--worst", type=Path, metavar="CSV", help="take the images that this iou.csv scores lowest")
    parser.add_argument("--keep", type=int, default=20, metavar="N", help="how many of the worst (default: 20)")
    parser.add_argument("--mix", action="store_true", help="take nuclei from other patients of the same kind, too")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other images")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where images go (default: DIR_stitch)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where they are booked (default: the data set's CSV)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and write nothing")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
