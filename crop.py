"""Cut labelled images into pieces, into DIR_crop.

    python crop.py data/stage1_train --step 200 --width 256                      pieces of 256 x 256, every 200 pixels
    python crop.py data/stage1_train --step 200 --width 256 --csv data/v9.csv    described and booked in another table
    python crop.py data/tissue --step 200 --width 256 --scale 0.5                of images at half their size
    python crop.py data/stage1_train --step 200 --width 256 --only-category HE   of some images; so do the lists in
                                                                                 [dataset]

A piece is named <id>_<x>_<y>. It is booked in the table with the category and the patient of its image, so that no
split parts the two; pieces without a nucleus are left out. An interrupted run goes on when it is started again. The
table is --csv, else [dataset] csv_file, else dataset.csv beside DIR or in the data folder; it is made where there is
none.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config import Config
from helper import make_parser, run_script
from piece import Cut, crop_records, format_tally
from record import load_records, table_path


def run(config: Config, args: argparse.Namespace) -> int:
    if min(args.step, args.width) < 1 or not 0 < args.scale < float("inf"):
        raise ValueError(f"--step {args.step} --width {args.width} --scale {args.scale}: each must be above 0")
    began = time.monotonic()
    whole = Path(os.path.abspath(args.folder))
    source = args.folder if args.folder.name == whole.name else whole  # "." and ".." have no name to add to
    target = source.with_name(f"{source.name}_crop")
    table = table_path(args.data, config.dataset, source)
    records = load_records(args.folder, args.data, config.dataset, source)
    tally = crop_records(records, target, table, Cut(args.step, args.width, args.scale), args.dry_run)
    print(format_tally(tally))
    written, booked = ("to write", "to book") if args.dry_run else ("written", "booked")
    n_pieces = tally.pieces.total()
    print(f"{target}: {n_pieces - tally.n_there} pieces {written}, {tally.n_there} were there already")
    print(f"{tally.n_empty} pieces without a nucleus left out")
    if args.step > args.width:
        print(f"--step {args.step} is larger than --width {args.width}: what lies between the pieces is in none")
    if tally.n_lost:
        print(f"{tally.n_lost} nuclei are too small to be seen at --scale {args.scale}")
    print(f"{table}: {tally.n_booked} pieces {booked}; took {time.monotonic() - began:.1f} s")
    for problem in tally.refused:
        print(f"refused: {problem}", file=sys.stderr)
    return 3 if tally.refused else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="labelled images, in any layout the toolkit reads")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="pixels from one piece to the next")
    parser.add_argument("--width", type=int, required=True, metavar="W", help="side of a piece in pixels")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="enlarge the images first (default: 1)")
    parser.add_argument(
        "--csv", dest="set", action="append", type="dataset.csv_file={}".format, metavar="FILE", help="the table"
    )
    parser.add_argument(
        "--only-category", dest="set", action="append", type="dataset.sub_category={}".format, metavar="NAME",
        help="images of this sub-category alone; of several with commas between",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
