"""Divide a folder of labelled images into data/train and data/valid.

    python split.py data/stage1_train                                  a tenth of the patients for validation
    python split.py data/stage1_train --set dataset.cv_ratio=0.2       another share
    python split.py data/stage1_train --set dataset.valid_ids=ids.txt  a fixed list

Files are hard links: they take no space, and deleting data/train and data/valid harms nothing. Across drives they are
copies.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from config import Config
from files import replacing
from helper import make_parser, run_script
from record import Record, divide_records, format_counts, load_records


def run(config: Config, args: argparse.Namespace) -> int:
    sides = {name: args.data / name for name in ("train", "valid")}
    for folder in sides.values():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; delete it first (hard links: the originals stay)")
    records = load_records(args.folder, args.data, config.dataset)
    broken = [record.problem for record in records if record.problem]
    if broken and config.dataset.on_bad == "refuse":
        raise ValueError(f"{broken[0]}; [dataset] on_bad = skip leaves such images out")
    train, valid = divide_records([record for record in records if not record.problem], config.dataset)
    copied = 0
    for folder, members in zip(sides.values(), (train, valid), strict=True):
        if members:
            with replacing(folder) as stage:
                copied += sum(link_record(record, args.folder, stage) for record in members)
        print(f"{folder}: {len(members)} images ({format_counts(members)})" if members else f"{folder}: none")
    if copied:
        print(f"{copied} files were copied: {args.folder} and {args.data} do not share a drive that can link")
    for problem in broken:
        print(f"skipped: {problem}", file=sys.stderr)
    return 3 if broken else 0


def link_record(record: Record, source: Path, target: Path) -> int:
    """Link the files of a record to the same places below `target`; how many had to be copied instead."""
    masks = record.masks or ()
    files = [record.image, *([masks] if isinstance(masks, Path) else masks)]
    return sum(not _link(file, target / file.relative_to(source)) for file in files)


def _link(source: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copy2(source, target)
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="labelled images, in any layout the toolkit reads")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
