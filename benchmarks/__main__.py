"""Measure every row of the table: the plain way, the best library, ours.

    make bench                                            all rows, with the libraries that are compared
    python -m benchmarks --rows targets walker            some of them
    python -m benchmarks --json table.json                the figures for a program, too
    NUCLEI_DATA=DIR python -m benchmarks                  on real images; DIR holds stage1_train.zip and valid_ids.txt

Exit code 1: a ratio is below its floor, or answers disagree.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

#: They make OpenBLAS take another machine for this one, and count only before numpy is imported.
MISLEADING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.rows import ROWS
    from benchmarks.table import run_rows

    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of rows on all cores; default: the cores")
    args = parser.parse_args(argv)
    return run_rows(args.rows, args.threads, args.json)


if __name__ == "__main__":
    if any(name in os.environ for name in MISLEADING):
        clean = {name: value for name, value in os.environ.items() if name not in MISLEADING}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], clean)
    sys.exit(main())
