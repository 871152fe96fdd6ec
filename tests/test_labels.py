from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage import draw

import labels as room


def voronoi(n_seeds: int, size: int, seed: int, reach: float = np.inf) -> np.ndarray:
    """Touching cells around random seeds, cut off at `reach` pixels and by the border."""
    rng = np.random.default_rng(seed)
    places = rng.choice(size * size, n_seeds, replace=False)
    seeds = np.zeros(size * size, np.int32)
    seeds[places] = np.arange(1, n_seeds + 1)
    seeds = seeds.reshape(size, size)
    distance, (rows, columns) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    return np.where(distance <= reach, seeds[rows, columns], 0).astype(np.int32)


ONE_PIXEL = np.zeros((5, 7), np.int32)
ONE_PIXEL[2, 3] = 1
MAPS = {
    "none": np.zeros((5, 7), np.int32),
    "no pixels": np.zeros((0, 7), np.int32),
    "one pixel": ONE_PIXEL,
    "full": np.ones((4, 6), np.int32),
    "touching pair": np.array([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0]], np.int32),
    "noise": np.random.default_rng(7).integers(0, 6, (23, 31)).astype(np.int32),
    "tissue": voronoi(60, 64, seed=0),
    "clusters": voronoi(60, 90, seed=1, reach=6),
    "over 255": voronoi(400, 120, seed=2, reach=3),
}
every_map = pytest.mark.parametrize("labels", MAPS.values(), ids=MAPS.keys())


# relabel, areas


def test_relabel_keeps_the_order_of_ids() -> None:
    labels = np.array([[0, 9, 9], [4, 0, 70]])
    relabelled = room.relabel(labels)
    assert relabelled.dtype == np.int32
    assert relabelled.tolist() == [[0, 2, 2], [1, 0, 3]]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([[0, 10**12], [5, 2**40]], [[0, 2], [1, 3]]), ([[7, 10**12], [5, 2**40]], [[2, 3], [1, 4]])],
    ids=["with background", "without"],
)
def test_relabel_takes_ids_far_beyond_the_image(labels: list[list[int]], expected: list[list[int]]) -> None:
    assert room.relabel(np.array(labels)).tolist() == expected


@every_map
def test_relabel_leaves_sequential_maps_but_copies(labels: np.ndarray) -> None:
    sequential = room.relabel(labels)
    again = room.relabel(sequential)
    assert np.array_equal(again, sequential)
    assert not np.shares_memory(again, sequential)


@pytest.mark.parametrize(
    ("labels", "fact"),
    [
        (np.array([[0, -3]]), "-3"),
        (np.zeros((2, 3, 4), int), r"\(2, 3, 4\)"),
        (np.zeros((2, 3)), "float64"),
    ],
)
def test_what_is_no_label_map_is_refused(labels: np.ndarray, fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        room.relabel(labels)
    with pytest.raises(ValueError, match=fact):
        room.areas(labels)


def test_ids_beyond_int32_go_through_relabel_first() -> None:
    with pytest.raises(ValueError, match="4294967296"):
        room.remove_small(np.array([[2**32]]), 1)


@every_map
def test_areas_count_every_id(labels: np.ndarray) -> None:
    areas = room.areas(labels)
    assert areas.dtype == np.int64
    assert len(areas) == labels.max(initial=0) + 1
    assert [np.count_nonzero(labels == i) for i in range(len(areas))] == areas.tolist()


# split_fragments


def test_split_fragments_parts_pieces_and_keeps_neighbours_apart() -> None:
    labels = np.array([[1, 1, 2, 0, 1], [0, 0, 2, 0, 1], [2, 0, 0, 1, 0]])
    assert room.split_fragments(labels).tolist() == [[1, 1, 2, 0, 3], [0, 0, 2, 0, 3], [4, 0, 0, 5, 0]]
    assert room.split_fragments(labels, connectivity=2).tolist() == [
        [1, 1, 2, 0, 3],
        [0, 0, 2, 0, 3],
        [4, 0, 0, 3, 0],
    ]


@every_map
def test_split_fragments_equals_one_component_search_per_id(labels: np.ndarray) -> None:
    pieces = room.split_fragments(labels)
    expected = sum(ndimage.label(labels == i)[1] for i in range(1, labels.max(initial=0) + 1))
    assert pieces.dtype == np.int32
    assert pieces.max(initial=0) == expected
    assert np.array_equal(pieces > 0, labels > 0)
    for number in range(1, expected + 1):
        assert len(np.unique(labels[pieces == number])) == 1


# overlap_table


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_components_are_numbered_as_scipy_does(share: float, n_threads: int) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(n_threads)
    try:
        for shape in ((1, 1), (1, 50), (50, 1), (37, 64), (300, 200)):
            mask = np.random.default_rng(shape[0]).random(shape) < share
            found = room.components(mask)
            assert found.dtype == np.int32
            assert np.array_equal(found, ndimage.label(mask)[0])
            assert np.array_equal(room.components(mask[::2, ::2]), ndimage.label(mask[::2, ::2])[0])
    finally:
        cv2.setNumThreads(before)


def test_overlap_table_by_hand() -> None:
    true, pred = np.array([[1, 1, 0], [2, 2, 2]]), np.array([[0, 1, 1], [1, 3, 3]])
    assert room.overlap_table(true, pred).tolist() == [[0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 2]]


@every_map
def test_overlap_table_equals_plain_loop(labels: np.ndarray) -> None:
    pred = np.roll(labels, 2, axis=1)[::-1]
    counts = Counter(zip(labels.ravel().tolist(), pred.ravel().tolist(), strict=True))
    table = room.overlap_table(labels, pred)
    assert table.dtype == np.int64
    assert {pair: table[pair] for pair in zip(*map(np.ndarray.tolist, table.nonzero()), strict=True)} == counts
    assert np.array_equal(table.sum(axis=1), room.areas(labels))
    assert np.array_equal(table.sum(axis=0), room.areas(pred))


def test_overlap_table_shows_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        room.overlap_table(np.zeros((2, 3), int), np.zeros((3, 2), int))


@every_map
def test_the_same_nuclei_under_other_numbers(labels: np.ndarray) -> None:
    numbers = np.random.default_rng(0).permutation(1000)[: labels.max(initial=0)] + 1
    assert room.same_instances(labels, np.concatenate([[0], numbers])[labels])
    merged = np.minimum(labels, labels.max(initial=0) - 1).clip(0)
    assert room.same_instances(labels, merged) == (not labels.any())


def test_background_is_no_nucleus() -> None:
    half = np.repeat([[0, 1]], 3, axis=0)
    assert not room.same_instances(half, 1 - half)


# boundaries


def test_boundaries_by_hand() -> None:
    labels = np.array([[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 1, 1], [1, 1, 1, 1]])
    expected = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    assert np.array_equal(room.boundaries(labels), expected)


@every_map
def test_boundaries_equal_plain_loop(labels: np.ndarray) -> None:
    height, width = labels.shape
    expected = np.zeros(labels.shape, bool)
    for y in range(height):
        for x in range(width):
            for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= ny < height and 0 <= nx < width and labels[y, x] and labels[y, x] != labels[ny, nx]:
                    expected[y, x] = True
    assert room.boundaries(labels).dtype == bool
    assert np.array_equal(room.boundaries(labels), expected)


# adjacency, color


def test_adjacency_by_hand() -> None:
    labels = np.array([[3, 3, 0, 2], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 4]])
    assert room.adjacency(labels).tolist() == [[1, 4]]
    assert room.adjacency(labels, radius=2).tolist() == [[1, 2], [1, 3], [1, 4], [2, 3]]
    assert room.adjacency(labels, radius=3).tolist() == [[1, 2], [1, 3], [1, 4], [2, 3], [2, 4], [3, 4]]


@pytest.mark.parametrize("radius", [1, 2, 4])
@every_map
def test_adjacency_equals_dilating_each_nucleus(labels: np.ndarray, radius: int) -> None:
    expected = set()
    window = np.ones((2 * radius + 1, 2 * radius + 1), bool)
    for nucleus in np.unique(labels[labels > 0]).tolist():
        near = np.unique(labels[ndimage.binary_dilation(labels == nucleus, window)]).tolist()
        expected |= {(nucleus, other) for other in near if other > nucleus}
    pairs = room.adjacency(labels, radius)
    assert pairs.dtype == np.int32
    assert pairs.shape == (len(expected), 2)
    assert pairs.tolist() == [list(pair) for pair in sorted(expected)]


def test_adjacency_wants_a_radius() -> None:
    with pytest.raises(ValueError, match="radius: 0"):
        room.adjacency(ONE_PIXEL, radius=0)


@pytest.mark.parametrize("n_colors", [1, 4, 8])
@every_map
def test_color_parts_neighbours(labels: np.ndarray, n_colors: int) -> None:
    colors = room.color(labels, n_colors)
    present = room.areas(labels) > 0
    present[0] = False
    assert colors.dtype == np.int32
    assert np.array_equal(colors > 0, present)
    first, second = room.adjacency(labels).T
    assert np.all(colors[first] != colors[second])
    assert np.array_equal(colors, room.color(labels, n_colors))


def test_color_keeps_to_its_palette_where_it_can() -> None:
    assert room.color(MAPS["clusters"]).max() <= 4
    lone = np.zeros((3, 20), np.int32)
    lone[1, 1::2] = np.arange(1, 11)
    assert sorted(Counter(room.color(lone)[1:].tolist()).items()) == [(1, 3), (2, 3), (3, 2), (4, 2)]


def test_color_takes_more_where_the_palette_does_not_do() -> None:
    corner = np.array([[1, 2], [3, 4]])  # all four meet in one corner
    assert sorted(room.color(corner, n_colors=3).tolist()) == [0, 1, 2, 3, 4]


def test_color_wants_a_palette() -> None:
    with pytest.raises(ValueError, match="n_colors: 0"):
        room.color(ONE_PIXEL, n_colors=0)


# remove_small, fill_holes, remove_fiber


def test_remove_small_keeps_ids_and_the_exact_size() -> None:
    labels = np.array([[1, 2, 2], [0, 3, 3], [0, 3, 0]])
    assert room.remove_small(labels, 2).tolist() == [[0, 2, 2], [0, 3, 3], [0, 3, 0]]
    assert room.remove_small(labels, 3).tolist() == [[0, 0, 0], [0, 3, 3], [0, 3, 0]]
    assert np.array_equal(room.remove_small(labels, 0), labels)
    assert not room.remove_small(labels, 100).any()


def test_fill_holes_by_hand() -> None:
    labels = np.array(
        [
            [1, 1, 1, 0, 2, 2, 3, 3],
            [1, 0, 1, 0, 2, 0, 0, 3],
            [1, 1, 1, 0, 2, 2, 3, 3],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [4, 4, 4, 4, 4, 0, 5, 5],
            [4, 0, 0, 0, 4, 0, 5, 0],
            [4, 0, 6, 0, 4, 0, 5, 5],
            [4, 0, 0, 0, 4, 0, 0, 0],
            [4, 4, 4, 4, 4, 0, 7, 0],
            [0, 0, 0, 0, 0, 7, 0, 7],
            [0, 0, 0, 0, 0, 0, 7, 0],
        ]
    )
    expected = labels.copy()
    expected[1, 1] = 1
    expected[9, 6] = 7  # closed by corners, as in scipy's binary_fill_holes
    assert np.array_equal(room.fill_holes(labels), expected)


@every_map
def test_fill_holes_equals_a_loop_over_pieces_of_background(labels: np.ndarray) -> None:
    expected = labels.copy()
    pieces, n_pieces = ndimage.label(labels == 0)
    for number in range(1, n_pieces + 1):
        piece = pieces == number
        around = np.unique(labels[ndimage.binary_dilation(piece) & ~piece])
        at_border = piece[0].any() or piece[-1].any() or piece[:, 0].any() or piece[:, -1].any()
        if not at_border and len(around) == 1:
            expected[piece] = around[0]
    filled = room.fill_holes(labels)
    assert filled.dtype == np.int32
    assert np.array_equal(filled, expected)


def test_fill_holes_of_one_nucleus_equals_scipy() -> None:
    labels = (np.random.default_rng(3).random((60, 60)) < 0.7).astype(np.int32)
    assert np.array_equal(room.fill_holes(labels) > 0, ndimage.binary_fill_holes(labels))


def scene(long: int, thick: int) -> np.ndarray:
    """Two disks of about 80 pixels and an object of `long` x `thick`."""
    labels = np.zeros((60, 200), np.int32)
    labels[draw.disk((12, 15), 5)] = 1
    labels[draw.disk((12, 40), 5)] = 2
    labels[30 : 30 + thick, 2 : 2 + long] = 3
    return labels


def test_remove_fiber_takes_the_large_and_long_only() -> None:
    fiber = scene(long=190, thick=4)
    assert np.array_equal(room.remove_fiber(fiber), np.where(fiber == 3, 0, fiber))
    for kept in (scene(long=28, thick=28), scene(long=60, thick=4), np.where(fiber == 3, 3, 0)):
        assert np.array_equal(room.remove_fiber(kept), kept)


def test_remove_fiber_wants_more_than_its_ratio() -> None:
    labels = np.zeros((5, 60), np.int32)
    labels[1, :50] = 1
    labels[3, :10] = 2
    assert np.array_equal(room.remove_fiber(labels), labels)
    labels[3, 9] = 0
    assert room.areas(room.remove_fiber(labels)).tolist()[1:] == [0, 9]
    assert np.array_equal(room.remove_fiber(labels, ratio=6), labels)
    assert np.array_equal(room.remove_fiber(labels, eccentricity=1.0), labels)


@every_map
def test_maps_come_back_as_int32_and_inputs_stay(labels: np.ndarray) -> None:
    before = labels.copy()
    for function in (room.relabel, room.split_fragments, room.fill_holes, room.remove_fiber):
        result = function(labels)
        assert result.dtype == np.int32
        assert result.shape == labels.shape
        assert not np.shares_memory(result, labels)
    assert room.remove_small(labels, 5).dtype == np.int32
    assert np.array_equal(labels, before)


def test_typical_area_is_that_of_a_typical_pixel():
    labels = np.zeros((40, 40), np.int32)
    labels[:10, :10], labels[20:30, :10], labels[20:30, 20:30] = 1, 2, 7
    labels[39, ::2] = np.arange(10, 30)  # specks are many, and of no weight
    assert room.typical_area(labels) == 100
    assert room.typical_diameter(labels) == pytest.approx(2 * np.sqrt(100 / np.pi))
    assert (
        room.typical_area(np.zeros((3, 3), np.int32)) == 0 and room.typical_diameter(np.zeros((3, 3), np.int32)) == 0.0
    )
