"""The table: run rows, print them, say what is not as wanted."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.inputs import open_inputs
from benchmarks.machine import measure_machine
from benchmarks.row import Result, measure, n_cores
from benchmarks.rows import ROWS
from files import replacing
from helper import prepare_process

HEADER = ("row", "plain", "library", "ours", "plain/ours", "wanted", "library/ours", "wanted", "same", "over the floor")
WIDTHS = (10, 10, 24, 10, 11, 7, 13, 7, 10, 15)


def run_rows(names: Sequence[str], threads: int = 0, to: Path | None = None) -> int:
    """Measure the rows of these names and print the table; 0, or 1 where something is not as wanted."""
    prepare_process()
    began, results = time.monotonic(), []
    machine = measure_machine(threads or n_cores())
    with tempfile.TemporaryDirectory() as folder:
        inputs = open_inputs(Path(folder), machine)
        print(f"{machine}\n1 core alone: {machine.one_core}\non {inputs}\n\n{format_line(HEADER)}")
        for name in names:
            results.append(measure(name, ROWS[name](inputs), machine))
            print(format_result(results[-1]), flush=True)
    print("\n" + "\n".join(f"{r.name}: {r.row.work}{'; ' * bool(r.row.note)}{r.row.note}" for r in results))
    failures = [failure for result in results for failure in result.failures]
    print(f"\n{len(results)} rows in {time.monotonic() - began:.0f} s, {len(failures)} not as wanted")
    for failure in failures:
        print(failure, file=sys.stderr)
    if to is not None:
        with replacing(to) as stage:
            stage.write_text(json.dumps([to_dict(result) for result in results], indent=1))
    return 1 if failures else 0


def format_line(cells: Sequence[str]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def format_result(result: Result) -> str:
    """One line of the table."""
    row, library = result.row, result.best_library
    missing = [name for name, job in row.libraries.items() if job is None]
    shown = f"{format_seconds(result.seconds[library])} {library}" if library else ""
    shown = shown or (f"no {', '.join(missing)}" if missing else "-")
    return format_line(
        (
            result.name,
            format_seconds(result.seconds["plain"]),
            shown,
            format_seconds(result.seconds["ours"]),
            f"{result.ratio('plain'):.1f}",
            f"{row.wanted:g}" if row.wanted else "-",
            f"{result.ratio(library):.2f}" if library else "-",
            f"{row.wanted_library:g}" if library else "-",
            f"{100 * min(result.shares.values()):.3f} %",
            f"{result.seconds['ours'] / result.floor:.3g} times" if result.floor else "-",
        )
    )


def format_seconds(seconds: float) -> str:
    """In the unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def to_dict(result: Result) -> dict[str, object]:
    """The figures of a row, in plain types."""
    row = result.row
    return {
        "row": result.name,
        "work": row.work,
        "seconds": dict(result.seconds),
        "same": dict(result.shares),
        "plain_over_ours": result.ratio("plain"),
        "wanted": row.wanted,
        "library": result.best_library,
        "library_over_ours": result.ratio(result.best_library) if result.best_library else None,
        "wanted_library": row.wanted_library,
        "floor": result.floor,
        "missing": [name for name, job in row.libraries.items() if job is None],
        "failures": result.failures,
    }
