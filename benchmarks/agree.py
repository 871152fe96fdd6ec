"""How much of two answers is the same, as a share from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labels import overlap_table, relabel
from metric import match


def equal(a: Any, b: Any) -> float:
    """All or nothing; arrays and sequences of arrays too."""
    if isinstance(a, np.ndarray):
        return float(a.shape == b.shape and np.array_equal(a, b))
    if isinstance(a, Sequence) and not isinstance(a, str):
        return float(len(a) == len(b) and all(equal(x, y) == 1 for x, y in zip(a, b, strict=True)))
    return float(a == b)


def same_pieces(a: NDArray[np.integer], b: NDArray[np.integer]) -> float:
    """Share of the foreground that lies in the same nucleus, whatever its number."""
    table = overlap_table(relabel(a), relabel(b))
    total = table.sum() - table[0, 0]
    if min(table.shape) < 2:
        return float(total == 0)
    rows, columns = table[1:, 1:].argmax(axis=1), table[1:, 1:].argmax(axis=0)
    mutual = columns[rows] == np.arange(len(rows))
    return float(table[1:, 1:].max(axis=1)[mutual].sum() / total) if total else 1.0


def same_nuclei(a: NDArray[np.integer], b: NDArray[np.integer], iou: float = 0.8) -> float:
    """Share of the nuclei that have a partner of so much IoU."""
    found = match(a, b, iou)
    total = found.tp + max(found.fp, found.fn)
    return found.tp / total if total else 1.0


def near(theirs: float, ours: float) -> float:
    """How near a positive number comes to another: 1 where it is the same, 0.9 where it is a tenth off."""
    return 1 - abs(theirs - ours) / theirs


def mean_of(shares: Sequence[Any], weights: Sequence[Any]) -> float:
    """The mean, weighted; 1 where nothing weighs."""
    return float(np.average(shares, weights=weights)) if sum(weights) else 1.0
