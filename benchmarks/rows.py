"""The rows of the table; to add one, write a function ``inputs -> Row`` and name it here."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import label_rows, reading_rows, separation_rows
from benchmarks.inputs import Inputs
from benchmarks.row import Row

ROWS: dict[str, Callable[[Inputs], Row]] = {
    "decode": reading_rows.decode,
    "cache": reading_rows.cache,
    "walker": separation_rows.walker,
    "watershed": separation_rows.watershed,
    "precision": label_rows.precision,
    "runlength": label_rows.runlength,
}
