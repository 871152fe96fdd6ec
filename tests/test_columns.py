"""The columns room: tables to print."""

from __future__ import annotations

import pytest

from columns import align


def test_columns_are_as_wide_as_their_widest_cell():
    table = align([("", "images", "each"), ("HE", 3, "1.5x"), ("everything", 1234567, "-")])
    assert table.splitlines() == [
        "             images  each",
        "HE                3  1.5x",
        "everything  1234567     -",
    ]


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError):
        align([("a", "b"), ("c",)])
