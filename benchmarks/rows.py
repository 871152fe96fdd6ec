"""The rows of the table; to add one, write a function ``inputs -> Row`` and name it here."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import label_rows, prediction_rows, reading_rows, sample_rows, separation_rows, training_rows
from benchmarks.inputs import Inputs
from benchmarks.row import Row

ROWS: dict[str, Callable[[Inputs], Row]] = {
    "decode": reading_rows.decode,
    "cache": reading_rows.cache,
    "targets": sample_rows.targets,
    "sample": sample_rows.sample,
    "step": training_rows.step,
    "rate": training_rows.rate,
    "walker": separation_rows.walker,
    "watershed": separation_rows.watershed,
    "precision": label_rows.precision,
    "runlength": label_rows.runlength,
    "predict": prediction_rows.predict,
}
