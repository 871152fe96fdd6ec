"""The forest of candidates: nested parts, features that add up, the best set of nuclei."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage as ndi
from skimage.measure import regionprops

from candidate import FEATURES, Forest, _sum_pixels, describe, find_scene, grow_forest
from labels import depth

SHAPE = (60, 90)


def disks(*places: tuple[int, int, int]) -> np.ndarray:
    y, x = np.indices(SHAPE)
    return np.any([np.hypot(y - cy, x - cx) <= r for cy, cx, r in places], axis=0)


def maps(mask: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Probabilities of a mask: markers high where it is deep, and noise that tells pixels apart."""
    rng = np.random.default_rng(seed)
    inside = ndi.gaussian_filter(depth(mask.astype(np.int32)), 1)
    marker = np.clip(inside / max(inside.max(), 1), 0, 1).astype(np.float32)
    noise = rng.random((2, *mask.shape)).astype(np.float32)
    return {"marker": marker, "semantic": 0.6 * mask + 0.4 * noise[0], "contour": noise[1]}


def grow(mask: np.ndarray, seed: int = 0) -> tuple[Forest, dict[str, np.ndarray]]:
    probs = maps(mask, seed)
    return grow_forest(mask, probs["marker"], -probs["marker"]), probs


PAIR = disks((30, 30, 12), (30, 50, 12))
CROWD = disks((20, 20, 10), (20, 36, 9), (34, 28, 11), (45, 70, 12), (30, 74, 8), (8, 80, 5))


def test_a_pair_is_one_blob_or_two_disks():
    forest, _ = grow(PAIR)
    assert forest.parent.tolist() == [-1, 0, 0]
    assert forest.atom.tolist() == [0, 1, 2]
    assert np.array_equal(forest.atoms > 0, PAIR)
    assert np.unique(forest.atoms[:, :38])[1:].tolist() == [1] and np.unique(forest.atoms[:, 43:])[1:].tolist() == [2]
    assert 0 < forest.birth[1] == forest.birth[2] <= forest.end[1]


def test_a_disk_is_itself():
    forest, _ = grow(disks((30, 30, 12)))
    assert len(forest) == 1 and forest.parent.tolist() == [-1] and forest.birth.tolist() == [0]


def test_without_a_nucleus_there_is_no_candidate():
    forest, probs = grow(np.zeros(SHAPE, bool))
    assert len(forest) == 0
    assert describe(forest, probs).shape == (0, len(FEATURES))
    assert not forest.pick(np.zeros(0)).any()
    assert forest.overlaps(np.ones(SHAPE, np.int32)).shape == (0,)


def test_the_parts_of_a_candidate_make_it_up():
    forest, _ = grow(CROWD)
    atoms = forest.members.toarray()[:, 1:]
    assert atoms.sum(axis=1).min() == 1
    for node in range(len(forest)):
        parts = atoms[forest.parent == node]
        assert len(parts) != 1
        if len(parts):
            assert np.array_equal(parts.sum(axis=0), atoms[node])
    assert np.array_equal(atoms[forest.parent < 0].sum(axis=0), np.ones(atoms.shape[1]))


def random_forest(rng: np.random.Generator, n: int) -> Forest:
    parent = np.array([-1, *(rng.integers(-1, i) for i in range(1, n))])
    leaf = ~np.isin(np.arange(n), parent)
    atom = np.where(leaf, np.cumsum(leaf), 0)
    return Forest(np.arange(leaf.sum() + 1, dtype=np.int32)[None], parent, atom, np.zeros(n), np.zeros(n))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_set_is_worth_more(seed):
    rng = np.random.default_rng(seed)
    forest = random_forest(rng, 9)
    worth = rng.uniform(-1, 1, 9)
    atoms = forest.members.toarray() > 0
    picked = forest.pick(worth)[0]
    chosen = [
        i for i in range(9) if picked[np.flatnonzero(atoms[i])].any() and (picked == i + 1).sum() == atoms[i].sum()
    ]
    assert {int(label) - 1 for label in picked if label} == set(chosen)
    sets = itertools.chain.from_iterable(itertools.combinations(range(9), k) for k in range(10))
    best = max(sum(worth[i] for i in some) for some in sets if (atoms[list(some)].sum(axis=0) <= 1).all())
    assert sum(worth[i] for i in chosen) == pytest.approx(best)


def test_features_of_a_union_are_those_of_one_piece():
    forest, probs = grow(CROWD)
    scene = find_scene([(forest, probs["semantic"])])
    features = describe(forest, probs, scene)
    same = [FEATURES.index(name) for name in (
        "relative_area", "axis_ratio", "ellipse_fit", "solidity", "roundness", "semantic", "least_semantic",
        "edge_semantic", "marker", "most_marker", "contour", "edge_contour", "at_frame",
    )]  # fmt: skip
    assert (forest.atom == 0).any()
    for node in range(len(forest)):
        mask = forest.members.toarray()[node].astype(bool)[forest.atoms]
        # what surrounds it stays a candidate of its own, so that the borders are the same
        labels = np.where(mask, 1, np.where(forest.atoms > 0, 2, 0)).astype(np.int32)
        n = labels.max()
        alone = Forest(labels, np.full(n, -1), np.arange(1, n + 1), np.zeros(n), np.zeros(n))
        assert describe(alone, probs, scene)[0, same] == pytest.approx(features[node, same], abs=1e-4)


def test_features_know_no_size():
    """The same image, each of its pixels as three by three."""
    forest, probs = grow(CROWD)
    larger = replace(forest, atoms=np.kron(forest.atoms, np.ones((3, 3), np.int32)))
    shown = {head: np.kron(p, np.ones((3, 3), np.float32)) for head, p in probs.items()}
    found, expected = describe(larger, shown), describe(forest, probs)
    assert np.abs(found - expected).max(axis=0) / (np.ptp(expected, axis=0) + 0.1) == pytest.approx(0, abs=0.2)


def test_a_part_is_seen_against_the_whole():
    """A speck alone is no longer of typical size, and what parts know of the whole is what the whole knows."""
    forest, probs = grow(CROWD)
    speck, alone = grow(disks((8, 80, 5)))
    whole = find_scene([(forest, probs["semantic"])])
    assert np.array_equal(describe(forest, probs, whole), describe(forest, probs))
    column = [FEATURES.index(name) for name in ("relative_area", "image_semantic", "rank")]
    area, typical = (
        np.count_nonzero(speck.atoms),
        np.median(np.sort(np.repeat(*[np.bincount(forest.atoms.ravel())[1:]] * 2))),
    )
    known = describe(speck, alone, whole)[0, column]
    assert known == pytest.approx([area / typical, probs["semantic"][CROWD].mean(), 0], abs=1e-4)
    assert describe(speck, alone)[0, column[0]] == 1


def test_a_scene_of_samples_is_that_of_the_image():
    forest, probs = grow(CROWD)
    parts = []
    for columns in (np.s_[:, :55], np.s_[:, 55:]):
        mask = CROWD[columns]
        cut = {head: p[columns] for head, p in probs.items()}
        parts.append((grow_forest(mask, cut["marker"], -cut["marker"]), cut["semantic"]))
    found, expected = find_scene(parts), find_scene([(forest, probs["semantic"])])
    assert found.typical == expected.typical and found.semantic == pytest.approx(expected.semantic)
    assert np.array_equal(found.areas, expected.areas)


def test_the_background_costs_no_memory():
    atoms = np.zeros((2000, 2000), np.int32)
    atoms[900:1000, 900:1000] = 1
    forest = Forest(atoms, np.array([-1]), np.array([1]), np.zeros(1), np.zeros(1))
    semantic = np.zeros(atoms.shape, np.float32)
    forest.members  # noqa: B018
    tracemalloc.start()
    _sum_pixels(atoms, {"semantic": semantic, "marker": semantic}, forest.members)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * atoms.size


def test_shapes_are_those_of_scikit_image():
    mask = ndi.rotate(disks((30, 45, 12)).astype(float), 20, reshape=False, order=1) > 0.5
    mask[25:32, 30:70] = True
    forest, probs = grow(mask)
    region = regionprops(mask.astype(int))[0]
    whole = np.flatnonzero(forest.parent < 0)[0]
    scene = find_scene([(forest, probs["semantic"])])._replace(typical=1)
    row = dict(zip(FEATURES, describe(forest, probs, scene)[whole], strict=True))
    assert row["relative_area"] == pytest.approx(region.area)
    assert row["axis_ratio"] == pytest.approx(region.axis_minor_length / region.axis_major_length, rel=1e-3)
    assert row["solidity"] == pytest.approx(region.solidity, rel=0.02)
    assert row["semantic"] == pytest.approx(probs["semantic"][mask].mean(), rel=1e-4)
    assert row["touching"] == 0


def test_borders_are_counted():
    labels = np.zeros((8, 8), np.int32)
    labels[2:6, 1:4], labels[2:6, 4:7] = 1, 2
    forest = Forest(labels, np.array([-1, 0, 0]), np.array([0, 1, 2]), np.zeros(3), np.zeros(3))
    contour = np.zeros((8, 8), np.float32)
    contour[:, 3:5] = 0.8
    probs = {"semantic": np.ones((8, 8), np.float32), "contour": contour}
    pair, left, _ = (dict(zip(FEATURES, row, strict=True)) for row in describe(forest, probs))
    assert pair["neck"] == pytest.approx(4 / np.sqrt(24)) and pair["neck_contour"] == pytest.approx(0.8)
    assert pair["touching"] == 0 and left["touching"] == pytest.approx(4 / 14)
    assert left["touching_contour"] == pytest.approx(0.8) and left["neck"] == 0
    assert left["parent_neck"] == pytest.approx(4 / np.sqrt(12)) and left["share_of_parent"] == 0.5
    assert left["marker"] == 0  # a network without that head


def test_overlaps_are_those_of_masks():
    forest, _ = grow(CROWD)
    truth = np.zeros(SHAPE, np.int32)
    for i, place in enumerate([(20, 20, 10), (34, 28, 11), (30, 74, 7)], 1):
        truth[disks(place)] = i
    atoms = forest.members.toarray().astype(bool)
    expected = []
    for node in range(len(forest)):
        mask = atoms[node][forest.atoms]
        expected.append(max((mask & (truth == i)).sum() / (mask | (truth == i)).sum() for i in (1, 2, 3)))
    assert forest.overlaps(truth) == pytest.approx(np.array(expected))
    assert not forest.overlaps(np.zeros(SHAPE, np.int32)).any()
