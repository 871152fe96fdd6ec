"""The target room: every map equals a plain loop over nuclei, on maps small enough to draw by hand and on busy ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from benchmarks.plain_targets import LOOPS, WEIGHT_LOOPS, chamfer, each, loop_balance, loop_distance_weight
from config import Contour, Pre
from synthetic import draw_sample
from target import (
    CENTROID_WEIGHT,
    GAP_WEIGHT,
    MARKER_DEPTH,
    SHAPE_SIGMA,
    SHAPE_WEIGHT,
    SOFT_EDGE,
    TARGETS,
    WEIGHTS,
    make_targets,
    plan_targets,
)

SQUARE = np.ones((3, 3), bool)


def disk(shape, y, x, radius):
    rows, columns = np.indices(shape)
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def place(shape, *masks):
    labels = np.zeros(shape, np.int32)
    for i, mask in enumerate(masks, 1):
        labels[mask] = i
    return labels


def grid(n: int, step: int = 5) -> np.ndarray:
    """More than 255 squares of 4 x 4 pixels, one pixel apart, with ids that have gaps and pass 65535."""
    ids = np.arange(1, n * n + 1).reshape(n, n) * 300
    cell = np.zeros((step, step), np.int32)
    cell[:4, :4] = 1
    return np.kron(ids, cell).astype(np.int32)


S = (40, 44)
MAPS = {
    "empty": np.zeros(S, np.int32),
    "one": place(S, disk(S, 19, 20, 9)),
    "one pixel": place(S, disk(S, 3, 5, 0)),
    "full": np.ones(S, np.int32),
    "two touching": place(S, disk(S, 20, 13, 9), disk(S, 20, 29, 9)),
    "two far apart": place(S, disk(S, 8, 8, 5), disk(S, 30, 34, 6)),
    "cut by the border": place(S, disk(S, 0, 20, 8), disk(S, 39, 43, 10), disk(S, 15, -2, 6)),
    "over 255": grid(17),
    "ring": place(S, disk(S, 20, 20, 12) & ~disk(S, 20, 20, 5), disk(S, 20, 20, 3)),
    "tissue": draw_sample(3, (96, 120), "tissue")[1],
    "dense": draw_sample(1, (96, 120), "dense")[1],
}
every_map = pytest.mark.parametrize("labels", MAPS.values(), ids=MAPS.keys())
every_row = pytest.mark.parametrize(
    ("kind", "name"), [*(("target", name) for name in TARGETS), *(("weight", name) for name in WEIGHTS)]
)


def near_the_limit(labels):
    """Where a core ends: distances are those of a 5 x 5 chamfer, true to 2 percent each."""
    found = np.zeros(labels.shape, bool)
    for mask, _, depth in each(labels):
        if np.isfinite(depth.max()):
            found |= mask & (np.abs(depth / depth.max() / MARKER_DEPTH - 1) < 0.04)
    return found


@pytest.mark.parametrize("name", TARGETS)
@every_map
def test_target_equals_the_plain_loop(name, labels):
    found = make_targets(labels, {"head": name})["head"]
    assert found.dtype == np.float32 and found.shape == (1, *labels.shape) and found.flags.c_contiguous
    assert found.min() >= 0 and (found.max() <= 1 or name == "labels")
    wrong = np.abs(found[0] - LOOPS[name](labels)) > (0.03 if name == "distance" else 1e-6)  # chamfer over chamfer
    assert not (wrong & ~near_the_limit(labels)).any() if name == "marker" else not wrong.any()


@pytest.mark.parametrize("name", WEIGHTS)
@every_map
def test_weight_equals_the_plain_loop(name, labels):
    found = make_targets(labels, {}, name)["weight"]
    assert found.dtype == np.float32 and found.shape == (1, *labels.shape) and found.flags.c_contiguous
    assert np.isfinite(found).all() and found.min() > 0
    # distances are true to 2 percent, which the steepest part of a Gaussian makes 5
    assert np.allclose(found[0], WEIGHT_LOOPS[name](labels), rtol=0.06, atol=0.05)


@every_map
def test_the_second_nearest_nucleus_is_found_exactly(labels):
    found = make_targets(labels, {}, "distance")["weight"][0]
    assert np.allclose(found, loop_distance_weight(labels, chamfer), rtol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9])
def test_the_second_nearest_nucleus_is_found_exactly_among_any_number(n):
    labels = np.zeros((40, 60), np.int32)
    labels.ravel()[np.random.default_rng(n).permutation(labels.size)[:n]] = np.arange(1, n + 1)
    found = make_targets(labels, {}, "distance")["weight"][0]
    assert np.allclose(found, loop_distance_weight(labels, chamfer), rtol=1e-6)


def first_pixel_of(numbers):
    """Of each pixel, the first one with the same number: what a label map says apart from the numbers."""
    _, first, index = np.unique(numbers, return_index=True, return_inverse=True)
    return first[index].reshape(numbers.shape)


@every_row
def test_ids_and_their_order_do_not_matter(kind, name):
    labels = MAPS["tissue"]
    ids = np.random.default_rng(0).permutation(2**20)[: labels.max() + 1].astype(np.int32) + 1
    ids[0] = 0
    plan, weight = ({"head": name}, None) if kind == "target" else ({}, name)
    for a, b in zip(*(make_targets(x, plan, weight).values() for x in (labels, ids[labels])), strict=True):
        assert np.array_equal(first_pixel_of(a), first_pixel_of(b)) if name == "labels" else np.array_equal(a, b)


@every_row
def test_input_may_be_read_only_and_stays(kind, name):
    labels = MAPS["two touching"].copy()
    labels.flags.writeable = False
    plan, weight = ({"head": name}, None) if kind == "target" else ({}, name)
    for found in make_targets(labels, plan, weight).values():
        assert found.flags.writeable and not np.shares_memory(found, labels)
    assert np.array_equal(labels, MAPS["two touching"])


# By hand


def test_contour_by_hand():
    labels = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]], np.int32)
    assert make_targets(labels, {"contour": "contour"})["contour"][0].astype(int).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
    ]


def test_contour_parts_touching_nuclei():
    labels = np.repeat([[1, 1, 1, 2, 2, 2]], 4, axis=0).astype(np.int32)
    maps = make_targets(labels, {head: head for head in ("semantic", "contour", "soft_semantic")})
    assert maps["semantic"][0].all()
    assert maps["contour"][0].tolist() == [[0, 0, 1, 1, 0, 0]] * 4
    assert np.allclose(maps["soft_semantic"][0], [[1, 1, SOFT_EDGE, SOFT_EDGE, 1, 1]] * 4)


def test_adjacent_boundary_needs_two_near_nuclei():
    plan = {"contour": "adjacent_boundary"}
    for name in ("empty", "one", "full", "two far apart"):
        assert not make_targets(MAPS[name], plan)["contour"].any()
    row = np.zeros((9, 20), np.int32)
    for gap, n in ((0, 4), (1, 3), (2, 2), (3, 1), (4, 0)):  # columns within reach of both
        labels = row.copy()
        labels[:, :8], labels[:, 8 + gap :] = 1, 2
        assert make_targets(labels, plan)["contour"][0].sum(axis=1).tolist() == [n] * 9


def test_touching_is_the_innermost_of_the_adjacent_boundary():
    for gap, columns in ((0, [7, 8]), (1, [8]), (2, [])):
        labels = np.zeros((9, 20), np.int32)
        labels[:, :8], labels[:, 8 + gap :] = 1, 2
        found = make_targets(labels, {"contour": "touching"})["contour"][0]
        assert np.flatnonzero(found[4]).tolist() == columns


@pytest.mark.parametrize("name", [name for name in MAPS if name != "empty"])
def test_every_nucleus_has_its_own_core(name):
    labels = MAPS[name]
    core = make_targets(labels, {"marker": "marker"})["marker"][0] > 0
    assert not core[labels == 0].any()
    assert set(np.unique(labels[core])) == set(np.unique(labels[labels > 0]))


def test_cores_of_touching_nuclei_are_apart():
    for name in ("two touching", "dense", "tissue"):
        labels = MAPS[name]
        core = make_targets(labels, {"marker": "marker"})["marker"][0] > 0
        large = np.bincount(labels.ravel())[labels] >= 80  # a few pixels are all core
        pieces, n = ndimage.label(core & large, SQUARE)
        assert all(np.unique(labels[pieces == i]).size == 1 for i in range(1, n + 1))


def test_weight_is_greatest_at_borders_and_one_far_away():
    weight = make_targets(place((120, 120), disk((120, 120), 60, 60, 30)), {}, "border")["weight"][0]
    assert weight[0, 0] == pytest.approx(1, abs=1e-4)
    assert weight[60, 60] == pytest.approx(1 + CENTROID_WEIGHT, abs=1e-3)
    y, x = np.unravel_index(weight.argmax(), weight.shape)
    assert abs(np.hypot(y - 60, x - 60) - 30) < 1.5
    assert (np.diff(weight[60, 15:30]) > 0).all() and (np.diff(weight[60, 31:40]) < 0).all()
    assert make_targets(MAPS["empty"], {}, "border")["weight"].tolist() == np.ones((1, *S)).tolist()


def test_distance_by_hand():
    labels = np.zeros((7, 10), np.int32)
    labels[1:6, 1:6], labels[1:6, 6:9], labels[6, 9] = 1, 2, 3
    third, two = 1 / 3, 2 / 3
    assert np.allclose(
        make_targets(labels, {"head": "distance"})["head"][0],
        [
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, third, third, third, third, third, 0.5, 0.5, 0.5, 0],
            [0, third, two, two, two, third, 0.5, 1, 0.5, 0],
            [0, third, two, 1, two, third, 0.5, 1, 0.5, 0],
            [0, third, two, two, two, third, 0.5, 1, 0.5, 0],
            [0, third, third, third, third, third, 0.5, 0.5, 0.5, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        ],
    )


@pytest.mark.parametrize("name", [name for name in MAPS if name != "empty"])
def test_every_nucleus_is_deepest_at_one_and_has_its_number(name):
    labels = MAPS[name]
    maps = make_targets(labels, {"depth": "distance", "number": "labels"})
    ids = np.unique(labels[labels > 0])
    assert np.array_equal(maps["depth"] > 0, labels[None] > 0)
    assert np.array_equal(ndimage.maximum(maps["depth"][0], labels, ids), np.ones(len(ids)))
    assert np.array_equal(ndimage.minimum(maps["number"][0], labels, ids), np.arange(1, len(ids) + 1))
    assert np.array_equal(ndimage.maximum(maps["number"][0], labels, ids), np.arange(1, len(ids) + 1))


@pytest.mark.parametrize(
    ("n", "background", "nucleus"), [(10, 2 / 3, 2), (20, 1, 1), (38, 10, 40 / 76), (1, 40 / 78, 10)]
)
def test_classes_in_balance(n, background, nucleus):
    """Of 40 pixels, and no class above `BALANCE_LIMIT`; a lone nucleus is beside no other."""
    labels = np.zeros((4, 10), np.int32)
    labels.ravel()[:n] = 5
    weight = make_targets(labels, {}, "distance")["weight"][0]
    assert np.allclose(weight, np.where(labels > 0, nucleus, background))


@pytest.mark.parametrize("gap", [0, 1, 2, 5, 10, 40])
def test_distance_weight_between_two_walls(gap):
    labels = np.zeros((9, 60), np.int32)
    labels[:, :10], labels[:, 10 + gap :] = 3, 4
    weight = make_targets(labels, {}, "distance")["weight"][0]
    balance = loop_balance(labels)
    assert np.allclose(weight[labels > 0], balance[labels > 0])
    assert np.allclose(weight[labels == 0], balance[labels == 0] + GAP_WEIGHT * np.exp(-((gap + 1) ** 2) / 50))


def test_shape_weight_across_a_line():
    labels = np.zeros((41, 200), np.int32)
    labels[20] = 1
    extra = make_targets(labels, {}, "shape")["weight"][0] - loop_balance(labels)
    profile = SHAPE_WEIGHT * np.exp(-((np.arange(41) - 20.0) ** 2) / (2 * SHAPE_SIGMA**2))
    assert np.allclose(extra, profile[:, None], atol=0.01)


def test_shape_weight_is_greatest_where_hollow_or_narrow():
    shape = (60, 110)
    bar = np.zeros(shape, bool)
    bar[10:50, 60:64] = True
    labels = place(shape, disk(shape, 20, 25, 11) | disk(shape, 40, 25, 11), bar, disk(shape, 30, 90, 11))
    extra = make_targets(labels, {}, "shape")["weight"][0] - loop_balance(labels)
    waist, pole, side, round_ = extra[30, 19:22].max(), extra[8:11, 25].max(), extra[30, 60], extra[30, 79:82].max()
    assert waist > 2 * pole and waist > 2 * round_ and side > 2 * round_
    y, x = np.unravel_index(extra[:, :45].argmax(), (60, 45))
    assert abs(y - 30) < 6 and 4 < abs(x - 25) < 12  # in one of the two notches


# The plan


@pytest.mark.parametrize(
    ("heads", "binary", "adjacent", "expected"),
    [
        (("semantic",), True, False, {"semantic": "semantic"}),
        (("semantic",), False, True, {"semantic": "soft_semantic"}),
        (("semantic", "contour"), True, True, {"semantic": "semantic", "contour": "adjacent_boundary"}),
        (
            ("semantic", "contour", "marker"),
            False,
            False,
            {"semantic": "soft_semantic", "contour": "contour", "marker": "marker"},
        ),
        (("semantic", "distance"), True, False, {"semantic": "semantic", "distance": "distance"}),
        (("color",), False, True, {"color": "labels"}),
        (("instance",), True, False, {"instance": "labels"}),
    ],
)
def test_plan(heads, binary, adjacent, expected):
    plan = plan_targets(heads, Pre(label_to_binary=binary), Contour(adjacent_boundary_only=adjacent))
    assert plan == expected
    maps = make_targets(MAPS["tissue"], plan, "border")
    assert list(maps) == [*heads, "weight"]


@pytest.mark.parametrize("adjacent", [False, True])
def test_the_narrower_band_is_taken_where_both_are_asked_for(adjacent):
    contour = Contour(adjacent_boundary_only=adjacent, touching_only=True)
    assert plan_targets(("semantic", "contour"), Pre(), contour) == {"semantic": "semantic", "contour": "touching"}


def test_weight_is_made_only_when_asked_for():
    assert list(make_targets(MAPS["one"], {"semantic": "semantic"})) == ["semantic"]


def test_unknown_rows_are_named():
    with pytest.raises(ValueError, match="unknown target 'contuor'; did you mean 'contour'"):
        make_targets(MAPS["one"], {"contour": "contuor"})
    with pytest.raises(ValueError, match="unknown weight map 'edge'"):
        make_targets(MAPS["one"], {}, "edge")
