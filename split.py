"""Divide a folder of labelled images into data/train and data/valid.

    python split.py data/stage1_train                                  a tenth of the patients for validation
    python split.py data/stage1_train --set dataset.cv_ratio=0.2       another share
    python split.py data/stage1_train --set dataset.valid_ids=ids.txt  a fixed list
    python split.py data/stage1_train --oversample --set dataset.sub_category=HE
                                                                       one more copy of these in data/train

Files are hard links: they take no space, and deleting data/train and data/valid harms nothing. Across drives they are
copies. --oversample adds to what is there: an image that data/train has gets one more name, <id>_copy<n>, at each run;
a new one joins its patient's side; one that validates is left alone. Copies are booked in the table with their patient.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from config import Config
from division import divide_records, join_records
from files import is_filled, replacing
from helper import make_parser, run_script
from link import add_links, finish_links, link_record
from record import (
    Record,
    book_records,
    copy_records,
    describe_records,
    find_records,
    format_counts,
    load_records,
    read_table,
    table_path,
)


def run(config: Config, args: argparse.Namespace) -> int:
    sides = {name: args.data / name for name in ("train", "valid")}
    if not args.dry_run and (moved := sum(finish_links(folder) for folder in sides.values())):
        print(f"{moved} copies of an interrupted run were put into place; run again for more")
        return 0
    records = load_records(args.folder, args.data, config.dataset)
    broken = [record.problem for record in records if record.problem]
    records = [record for record in records if not record.problem]
    if not records:
        raise ValueError(f"{broken[0]}; {args.folder} has no other image")
    copied = (oversample if args.oversample else divide)(records, sides, config, args)
    if copied:
        print(f"{copied} files were copied: {args.folder} and {args.data} do not share a drive that can link")
    for problem in broken:
        print(f"refused: {problem}", file=sys.stderr)
    return 3 if broken else 0


def divide(records: list[Record], sides: dict[str, Path], config: Config, args: argparse.Namespace) -> int:
    """Fill two empty folders; how many files had to be copied."""
    for folder in sides.values():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty; delete it first (hard links: the originals stay), or add by --oversample"
            )
    copied, divided = 0, list(zip(sides.values(), divide_records(records, config.dataset), strict=True))
    with ExitStack() as stack:  # both are complete before either appears
        for folder, members in divided:
            if members and not args.dry_run:
                stage = stack.enter_context(replacing(folder))
                copied += sum(link_record(record, args.folder, stage) for record in members)
    for folder, members in divided:
        print(f"{folder}: {len(members)} images ({format_counts(members)})" if members else f"{folder}: none")
    return copied


def oversample(records: list[Record], sides: dict[str, Path], config: Config, args: argparse.Namespace) -> int:
    """Add to what is there; how many files had to be copied."""
    path = table_path(args.data, config.dataset)
    table = read_table(path) if path.is_file() else {}
    train, valid = (describe_records(find_records(f), table) if is_filled(f) else [] for f in sides.values())
    if (train or valid) and (sides["train"] / "images").is_dir() != (args.folder / "images").is_dir():
        raise ValueError(f"{args.folder} and {sides['train']} are of different layouts; only the same can be joined")
    more, held = join_records(records, train, valid, config.dataset)
    there = {record.id for record in train}
    again = [record for record in records if record.id in there]
    copies = copy_records(again, there | {record.id for record in valid})
    n_booked = book_records(path, copies, args.dry_run)
    linked = {
        "train": [*((r, r.id) for r in more), *((r, copy.id) for r, copy in zip(again, copies, strict=True))],
        "valid": [(r, r.id) for r in held],
    }
    pending = {} if args.dry_run else {sides[name]: pairs for name, pairs in linked.items() if pairs}
    copied = sum(add_links(pairs, args.folder, folder) for folder, pairs in pending.items())
    print(f"{sides['train']}: {len(copies)} copies ({format_counts(copies) or 'none'}), {len(more)} new images")
    print(f"{sides['valid']}: {len(held)} new images; {len(records) - len(more) - len(held) - len(again)} left alone")
    print(f"{path}: {n_booked} copies {'to book' if args.dry_run else 'booked'}")
    return copied


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="labelled images, in any layout the toolkit reads")
    parser.add_argument("--oversample", action="store_true", help="add one more copy of each image to data/train")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
