"""Tables and lines to print."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(message: object, most: int = 200) -> str:
    """What an error of somebody else says, its line breaks gone, cut after so many letters."""
    return " ".join(str(message).split())[:most]


def align(rows: Sequence[Sequence[object]]) -> str:
    """Rows as lines of aligned columns: the first flush left, as it names the row, the others flush right.

    Parameters
    ----------
    rows : sequence of sequences
        All of one length; the first holds the titles.
    """
    words = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(word.rjust(n) for word, n in zip(row[1:], widths[1:], strict=True))])
        for row in words
    )
