"""Rows: probability maps -> nuclei, by the random walker and by the watershed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from benchmarks import agree, plain
from benchmarks.inputs import Inputs, Labels, Maps
from benchmarks.row import Floor, Job, Row, optional
from config import Post
from labels import relabel
from postprocess import MARKERS, instances, separate_walker

POST = Post(policy="ws", marker="marker", marker_contour=0.0, min_confidence=0.0, min_object_share=0.0)
THRESHOLDS = {"semantic": 0.5, "marker": 0.5, "contour": 0.5}


def watershed(inputs: Inputs) -> Row:
    maps = inputs.maps

    def same(theirs: Sequence[Labels], ours: Sequence[Labels]) -> float:
        return agree.mean_of([agree.same_pieces(a, b) for a, b in zip(theirs, ours, strict=True)], _areas(ours))

    return Row(
        f"maps to nuclei by watershed, {_sizes(maps)}",
        plain=lambda: [plain.separate(m.probs, THRESHOLDS, POST.min_object_size, "ws") for m in maps],
        ours=lambda: [instances(m.probs, POST, THRESHOLDS) for m in maps],
        agree=same,
        wanted=1.5,
        floor=_floor(maps, n_heads=3),
    )


def walker(inputs: Inputs) -> Row:
    maps = inputs.maps
    tasks = [_task(each) for each in maps]

    def by(mode: str) -> Job:
        return lambda: [plain.walk(semantic, mask, markers, mode) for semantic, mask, markers, _ in tasks]

    def same(theirs: Sequence[Labels], ours: Sequence[Labels]) -> float:
        shares = [np.mean((a == b)[t[3]]) for a, b, t in zip(theirs, ours, tasks, strict=True) if t[3].any()]
        return agree.mean_of(shares, [np.count_nonzero(t[3]) for t in tasks if t[3].any()])

    return Row(
        f"random walker on given markers ({sum(int(t[2].max()) for t in tasks)}), {_sizes(maps)}",
        plain=by("bf"),
        ours=lambda: [separate_walker(mask, markers, {"semantic": semantic}) for semantic, mask, markers, _ in tasks],
        agree=same,
        wanted=8.0,
        same=0.999,
        libraries={"cg_mg (pyamg)": optional("pyamg", lambda _: by("cg_mg"))},
        library_same=0.99,
        floor=_floor(maps, n_heads=1),
        rounds=1,
        note="compared are nuclei in blobs of two or more markers; pyamg stops at a tolerance of 0.001",
    )


def _task(maps: Maps) -> tuple[np.ndarray, np.ndarray, Labels, np.ndarray]:
    """Semantic map, mask, markers without gaps, and where a blob has two markers or more."""
    mask = maps.probs["semantic"] > THRESHOLDS["semantic"]
    markers = MARKERS["marker"](mask, maps.probs, POST, THRESHOLDS)
    blobs, n_blobs = ndimage.label(mask)
    n_markers = np.bincount(np.unique(np.stack([blobs.ravel(), markers.ravel()])[:, markers.ravel() > 0], axis=1)[0])
    n_markers = np.append(n_markers, np.zeros(n_blobs + 1 - len(n_markers), int))
    mask = mask & (n_markers[blobs] > 0)
    return maps.probs["semantic"], mask, relabel(markers), mask & (n_markers[blobs] > 1)


def _areas(labels: Sequence[Labels]) -> list[int]:
    return [int(np.count_nonzero(each)) for each in labels]


def _sizes(maps: Sequence[Maps]) -> str:
    return ", ".join("{} x {}".format(*m.image.shape[:2]) for m in maps) + " px"


def _floor(maps: Sequence[Maps], n_heads: int) -> Floor:
    """Every map is read and the labels are written."""
    return Floor(n_bytes=float(sum(4 * (n_heads + 1) * m.probs["semantic"].size for m in maps)))
