"""The postprocess room: touching nuclei come apart, nothing else changes, the walker walks as scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi

from benchmarks import plain
from candidate import FEATURES
from config import Post
from labels import color
from metric import average_precision
from postprocess import (
    MARKERS,
    POLICIES,
    candidates,
    heads_read,
    instances,
    separate,
    separate_walker,
)
from synthetic import draw_sample
from target import make_targets

HALF = {"semantic": 0.5, "contour": 0.5, "marker": 0.5, "distance": 0.5, "color": 0.5}
BARE = {"remove_objects": False, "fill_holes": False}
PLAN = {head: head for head in HALF}
every_policy = pytest.mark.parametrize("policy", POLICIES)
every_source = pytest.mark.parametrize("source", MARKERS)


def disks(*centers: tuple[int, int], radius: int = 10, shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Labels of disks; a pixel in several belongs to the nearest."""
    y, x = np.indices(shape)
    away = np.stack([np.hypot(y - cy, x - cx) for cy, cx in centers])
    return np.where(away.min(0) <= radius, away.argmin(0) + 1, 0).astype(np.int32)


TOUCHING = disks((20, 18), (24, 36), (20, 53))


def ideal(labels: np.ndarray, heads: tuple[str, ...] = tuple(HALF)) -> dict[str, np.ndarray]:
    """What a sure network would say."""
    maps = make_targets(labels, {head: head for head in heads if head != "color"})
    probs = {head: 0.02 + 0.96 * value[0] for head, value in maps.items()}
    if "color" in heads:
        colors = color(labels)[labels]
        probs["color"] = np.stack([0.02 + 0.96 * (colors == c).astype(np.float32) for c in range(1, 5)])
    return probs


def flat(mask: np.ndarray, high: float = 0.9) -> dict[str, np.ndarray]:
    semantic = np.where(mask, high, 0.1).astype(np.float32)
    return {"semantic": semantic, "color": np.stack([semantic] * 4)}


def random_probs(seed: int, shape: tuple[int, int] = (48, 56), scale: float = 3.0) -> dict[str, np.ndarray]:
    """Smooth noise in [0, 1], a map a head."""
    rng = np.random.default_rng(seed)
    smooth = [ndi.gaussian_filter(rng.standard_normal(shape), scale) for _ in HALF]
    maps = [(1 / (1 + np.exp(-3 * x / x.std()))).astype(np.float32) for x in smooth]
    probs = dict(zip(HALF, maps, strict=True))
    return {**probs, "color": np.stack([np.roll(probs["color"], 7 * c, 1) for c in range(4)])}


def equal(value: float, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    maps = {head: np.full(shape, value, np.float32) for head in HALF}
    return {**maps, "color": np.stack([maps["color"]] * 4)}


@every_source
@every_policy
def test_touching_disks_come_apart(policy, source):
    assert ndi.label(TOUCHING > 0)[1] == 1
    found = instances(ideal(TOUCHING), Post(policy=policy, marker=source), HALF)
    assert found.max() == 3
    assert np.array_equal(found > 0, TOUCHING > 0)
    assert average_precision(TOUCHING, found, [0.85]) == [1.0]


@pytest.mark.parametrize("source", ["marker", "contour", "color", "distance"])  # peaks do not know
@every_policy
def test_synthetic_nuclei_come_back(policy, source):
    _, labels = draw_sample(5, (96, 96), "fluorescence", n_nuclei=6)
    found = instances(ideal(labels), Post(policy=policy, marker=source), HALF)
    assert average_precision(labels, found, [0.7]) == [1.0]


@every_source
@every_policy
@pytest.mark.parametrize("value", [0.0, 0.5, 0.2])
def test_blank_in_blank_out(policy, source, value):
    probs = equal(value, (20, 30))
    found = instances(probs, Post(policy=policy, marker=source), HALF)
    assert found.dtype == np.int32
    assert found.shape == (20, 30)
    assert not found.any()  # the threshold itself does not belong


@every_source
@every_policy
@pytest.mark.parametrize("shape", [(24, 30), (1, 1), (1, 9), (9, 1)])
def test_an_image_of_ones_is_one_nucleus(policy, source, shape):
    probs = equal(1.0, shape)
    found = instances(probs, Post(policy=policy, marker=source, min_object_size=0), HALF)
    assert np.array_equal(found, np.ones(shape, np.int32))


@every_source
@every_policy
@pytest.mark.parametrize("seed", range(3))
def test_every_pixel_of_the_mask_is_someones_and_no_other(policy, source, seed):
    probs = random_probs(seed)
    before = {head: value.copy() for head, value in probs.items()}
    post = Post(policy=policy, marker=source, **BARE)
    found = instances(probs, post, HALF)
    assert found.dtype == np.int32
    assert np.array_equal(found > 0, probs["semantic"] > 0.5)
    assert np.array_equal(np.unique(found), np.arange(found.max() + 1))
    assert np.array_equal(found, instances(probs, post, HALF))
    assert all(np.array_equal(value, before[head]) for head, value in probs.items())


@every_policy
def test_policy_floods_what_its_markers_reach(policy):
    mask = TOUCHING > 0
    mask[40:46, 2:9] = True  # a blob without a marker
    markers = np.zeros(mask.shape, np.int32)
    markers[20, 18], markers[24, 36], markers[20, 53] = 7, 3, 5
    found = POLICIES[policy](mask, markers, flat(mask))
    assert found.dtype == np.int32
    assert np.array_equal(found > 0, TOUCHING > 0)
    assert set(np.unique(found)) == {0, 3, 5, 7}
    assert np.array_equal(found[markers > 0], markers[markers > 0])
    for number in (3, 5, 7):
        assert ndi.label(found == number)[1] == 1


@every_policy
def test_two_markers_share_a_bar_in_the_middle(policy):
    mask = np.zeros((7, 24), bool)
    mask[2:5, 2:22] = True
    markers = np.zeros(mask.shape, np.int32)
    markers[2:5, 2], markers[2:5, 21] = 1, 2
    expected = np.zeros_like(markers)
    expected[2:5, 2:12], expected[2:5, 12:22] = 1, 2
    assert np.array_equal(POLICIES[policy](mask, markers, flat(mask)), expected)


@every_policy
def test_a_valley_of_probability_is_the_border(policy):
    """Off the middle, so that distance alone would put it elsewhere."""
    mask = np.zeros((9, 30), bool)
    mask[2:7, 2:28] = True
    probs = flat(mask)
    probs["semantic"][2:7, 8] = 0.55
    markers = np.zeros(mask.shape, np.int32)
    markers[4, 4], markers[4, 25] = 1, 2
    found = POLICIES[policy](mask, markers, probs)
    assert (found[2:7, 2:8] == 1).all()
    assert (found[2:7, 9:28] == 2).all()


def test_contour_holds_the_watershed_back():
    mask = np.zeros((9, 30), bool)
    mask[2:7, 2:28] = True
    contour = np.full(mask.shape, 0.05, np.float32)
    contour[2:7, 8] = 0.8
    markers = np.zeros(mask.shape, np.int32)
    markers[4, 4], markers[4, 25] = 1, 2
    found = POLICIES["ws"](mask, markers, {**flat(mask), "contour": contour})
    assert (found[2:7, 2:8] == 1).all()
    assert (found[2:7, 9:28] == 2).all()


@pytest.mark.parametrize("seed", range(8))
def test_walker_equals_scikit_image(seed):
    probs = random_probs(seed, scale=2.5 + seed % 3)
    mask = probs["semantic"] > 0.5
    rng = np.random.default_rng(100 + seed)
    seeds = mask & (rng.random(mask.shape) < 0.02)
    blobs, n_blobs = ndi.label(mask)
    count = [ndi.label(seeds & (blobs == blob))[1] for blob in range(1, n_blobs + 1)]
    contested = np.isin(blobs, 1 + np.flatnonzero(np.array(count) >= 2))
    assert contested.sum() > 200
    markers = ndi.label(seeds & contested)[0].astype(np.int32)  # without gaps, as scikit-image numbers its answer
    theirs = plain.walk(probs["semantic"], contested, markers)
    ours = separate_walker(mask, markers, probs)
    assert np.mean(ours[contested] == theirs[contested]) > 0.999  # ties may fall either way


@pytest.mark.parametrize("seed", range(6))
def test_watershed_equals_scikit_image(seed):
    probs = random_probs(seed, scale=2.0)
    mask = probs["semantic"] > 0.4
    markers = np.where(
        np.random.default_rng(seed).random(mask.shape) < 0.05, np.arange(mask.size).reshape(mask.shape), 0
    )
    markers = ndi.grey_dilation(markers, (1 + seed % 2, 2)).astype(np.int32)  # outside the mask, too
    elevation = probs["contour"] - probs["semantic"]
    found = POLICIES["ws"](mask, markers, {"semantic": -elevation})
    assert np.array_equal(found, plain.flood(elevation, markers, mask))
    assert len(np.unique(found)) > 20


def test_walker_leaves_pixels_without_a_marker_alone_and_takes_lone_ones():
    mask = np.zeros((9, 30), bool)
    mask[1, 1] = mask[1, 4] = mask[4:7, 2:28] = True
    markers = np.zeros(mask.shape, np.int32)
    markers[1, 1], markers[5, 3], markers[5, 26], markers[0, 0] = 9, 4, 2, 7
    found = separate_walker(mask, markers, flat(mask))
    assert found[1, 1] == 9 and found[1, 4] == 0 and found[0, 0] == 0
    assert (found[4:7, 2:15] == 4).all() and (found[4:7, 15:28] == 2).all()


@every_policy
def test_without_segmentation_blobs_stay_whole(policy):
    labels = disks((14, 14), (14, 30), (14, 54), radius=9)
    found = instances(ideal(labels), Post(segmentation=False, policy=policy), HALF)
    assert np.array_equal(found, np.select([labels == 3, labels > 0], [2, 1]))


def test_seg_scale_sets_how_far_apart_peaks_are():
    probs = ideal(TOUCHING, ("semantic",))
    assert instances(probs, Post(seg_scale=0.3), HALF).max() == 3
    assert instances(probs, Post(seg_scale=3.0), HALF).max() == 1


def test_seg_ratio_leaves_large_clumps_out_of_the_typical_size():
    """Two small disks and a chain of five: with all blobs in the mean, the chain's own size hides its peaks."""
    labels = disks((12, 12), (36, 12), *[(24, 34 + 9 * i) for i in range(5)], radius=5, shape=(48, 84))
    probs = ideal(labels, ("semantic",))
    assert ndi.label(labels > 0)[1] == 3
    assert instances(probs, Post(seg_ratio=0.6, seg_scale=0.8), HALF).max() == 7
    assert instances(probs, Post(seg_ratio=1.0, seg_scale=0.8), HALF).max() < 7


@pytest.mark.parametrize("head", HALF)
def test_threshold_of_each_head_is_its_own(head):
    probs = ideal(TOUCHING)
    high = {**HALF, head: 0.99}
    sources = [name for name in HALF if name != "semantic"]
    found = {source: instances(probs, Post(marker=source), high).max() for source in sources}
    # Nothing is semantic; no contour parts the disks; no marker, middle or colour does.
    assert found == {source: 0 if head == "semantic" else 1 if head == source else 3 for source in sources}


def test_small_objects_go_where_asked():
    mask = np.zeros((20, 40), bool)
    mask[2:4, 2:8] = True  # 12 pixels
    mask[10:11, 2:13] = True  # 11 pixels
    mask[10:18, 20:30] = True

    def count(**options):
        return instances(flat(mask), Post(segmentation=False, **options), HALF).max()

    assert count(remove_objects=False) == 3
    assert count() == 2
    assert count(min_object_size=11) == 3
    assert count(min_object_size=13) == 1
    assert count(min_object_size=81) == 0


def test_holes_are_filled_where_asked():
    solid = disks((24, 32), radius=14) > 0
    ring = solid & (disks((24, 32), radius=5) == 0)
    post = {"segmentation": False}
    assert np.array_equal(instances(flat(ring), Post(**post), HALF) > 0, solid)
    assert np.array_equal(instances(flat(ring), Post(fill_holes=False, **post), HALF) > 0, ring)


def test_a_fiber_is_dropped_where_asked():
    mask = disks((30, 12), (30, 40), radius=4) > 0  # 49 pixels each
    mask[4:9, 2:62] = True  # 300 pixels, long
    post = {"segmentation": False}
    assert instances(flat(mask), Post(**post), HALF).max() == 3
    found = instances(flat(mask), Post(filter_fiber=True, **post), HALF)
    assert found.max() == 2
    assert not found[:12].any()


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        (("contour",), {}, "no head 'semantic'; there are: contour"),
        (("semantic",), {"marker": "marker"}, "no head 'marker'; there are: semantic"),
        (("semantic", "marker"), {"marker": "contour"}, "no head 'contour'; there are: semantic, marker"),
        (("semantic",), {"policy": "wss"}, "unknown policy 'wss'; did you mean 'ws'.; there are: ws, rw"),
        (("semantic", "marker"), {"policy": "color", "marker": "marker"}, "no head 'color'; there are: semantic"),
        (("semantic", "marker"), {"policy": "color"}, "no head 'color'; there are: semantic, marker"),
        (("semantic",), {"marker": "peaks"}, "unknown source of markers 'peaks'; did you mean 'peak'"),
    ],
)
def test_what_is_not_there_is_named(heads, options, message):
    with pytest.raises(ValueError, match=message):
        instances(ideal(TOUCHING, heads), Post(**options), HALF)


@pytest.mark.parametrize(
    ("heads", "options", "same"),
    [
        (("semantic", "color"), {}, {"policy": "color", "marker": "color"}),
        (("semantic", "marker", "color"), {}, {"policy": "ws", "marker": "marker"}),
        (("semantic", "marker", "color"), {"policy": "color"}, {"policy": "color", "marker": "color"}),
        (("semantic", "distance", "contour"), {}, {"policy": "ws", "marker": "distance"}),
        (("semantic", "contour"), {}, {"policy": "ws", "marker": "contour"}),
        (("semantic",), {}, {"policy": "ws", "marker": "peak"}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_auto_takes_what_the_heads_allow(heads, options, same, seed):
    probs = {head: value for head, value in random_probs(seed).items() if head in heads}
    assert np.array_equal(instances(probs, Post(**options), HALF), instances(probs, Post(**same), HALF))


def test_specks_of_another_colour_are_no_nuclei():
    probs = ideal(TOUCHING, ("semantic", "color"))
    probs["color"][:, 18:20, 16:18] = probs["color"][::-1, 18:20, 16:18]
    found = instances(probs, Post(), HALF)
    assert average_precision(TOUCHING, found, [0.95]) == [1.0]


def test_grow_takes_background_alone():
    grown = instances(ideal(TOUCHING), Post(grow=1), HALF)
    plain = instances(ideal(TOUCHING), Post(), HALF)
    assert np.array_equal(grown[plain > 0], plain[plain > 0])
    assert np.array_equal(grown > 0, ndi.binary_dilation(plain > 0))


def test_doubtful_nuclei_are_dropped():
    probs = {"semantic": np.where(TOUCHING == 2, 0.6, 0.9 * (TOUCHING > 0)).astype(np.float32)}
    probs["marker"] = ideal(TOUCHING)["marker"]
    assert instances(probs, Post(), HALF).max() == 3
    assert instances(probs, Post(segmentation=False, min_confidence=0.95), HALF).max() == 0
    found = instances(probs, Post(min_confidence=0.7), HALF)
    assert found.max() == 2 and not found[24, 36]


def test_the_contour_parts_markers_that_run_together():
    probs = ideal(TOUCHING)
    probs["marker"] = np.where(TOUCHING > 0, 0.9, 0.0).astype(np.float32)
    assert instances(probs, Post(marker="marker"), HALF).max() == 1
    assert instances(probs, Post(marker="marker", marker_contour=0.5), HALF).max() == 3
    assert instances({k: v for k, v in probs.items() if k != "contour"}, Post(marker_contour=0.5), HALF).max() == 1


def test_specks_beside_large_nuclei_are_dropped():
    labels = disks((20, 18), (24, 44))
    mask = labels > 0
    mask[40:45, 2:7] = True  # 25 pixels, beside nuclei of more than 300
    assert instances(flat(mask), Post(marker="peak", min_object_share=0), HALF).max() == 3
    assert instances(flat(mask), Post(marker="peak"), HALF).max() == 2
    assert instances(flat(mask[38:]), Post(marker="peak"), HALF).max() == 1  # alone it is a nucleus


def two_disks() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Maps of two nuclei that the marker head sees as one below 0.8, and the truth."""
    y, x = np.indices((40, 60))
    disks = [np.hypot(y - 20, x - cx) for cx in (20, 38)]
    truth = np.where(disks[0] <= 10, 1, np.where(disks[1] <= 10, 2, 0)).astype(np.int32)
    marker = np.clip(1 - np.minimum(*disks) / 40, 0, 1).astype(np.float32)
    return {"semantic": (truth > 0).astype(np.float32), "marker": marker}, truth


def likes(feature: str, value: float):
    """An opinion that thinks best of candidates of that value."""
    column = FEATURES.index(feature)
    return lambda features: np.exp(-abs(features[:, column] - np.float32(value)))


def test_the_opinion_decides_what_is_one_nucleus():
    probs, truth = two_disks()
    assert instances(probs, Post(), HALF).max() == 1
    apart = instances(probs, Post(), HALF, likes("log_atoms", 0))
    assert average_precision(truth, apart).mean() > 0.9
    assert instances(probs, Post(), HALF, likes("log_atoms", np.log(2))).max() == 1


def test_what_promises_too_little_is_dropped():
    probs, _ = two_disks()
    assert not instances(probs, Post(min_quality=0.5), HALF, lambda features: np.full(len(features), 0.4)).any()


@pytest.mark.parametrize("named", [{"policy": "ws"}, {"marker": "marker"}])
def test_a_policy_or_marker_that_is_named_asks_for_no_opinion(named):
    probs, _ = two_disks()
    assert instances(probs, Post(**named), HALF, likes("log_atoms", 0)).max() == 1


def test_a_forest_wants_an_opinion():
    probs, _ = two_disks()
    with pytest.raises(ValueError, match="no second opinion; tune.py"):
        instances(probs, Post(policy="forest"), HALF)


def test_candidates_of_a_blob_do_not_depend_on_what_else_there_is():
    """Where shape alone tells nuclei apart, two small disks are told apart beside a mass of any size."""
    y, x = np.mgrid[:200, :260]
    disks = (np.hypot(y - 20, x - 20) <= 8) | (np.hypot(y - 20, x - 34) <= 8)
    mass = np.hypot(y - 110, x - 160) <= 80
    for mask in (disks, disks | mass):
        found = candidates(mask, {"semantic": mask.astype(np.float32)}, Post())
        assert len(np.unique(found.atoms[:40, :50])) == 3


@pytest.mark.parametrize("head", ["distance", "contour", None])
def test_candidates_come_from_whatever_tells_nuclei_apart(head):
    probs, truth = two_disks()
    marker = probs.pop("marker")
    if head is not None:
        probs[head] = marker if head == "distance" else 1 - marker
    found = candidates(truth > 0, probs, Post())
    assert len(found) == 3
    assert found.overlaps(truth)[1:].min() > 0.9


def test_each_instance_has_the_quality_that_was_expected_of_it():
    probs, truth = two_disks()
    probs["semantic"][2:8, 50:58] = 1  # something flat that no marker rises in
    opinion = likes("most_marker", 1)
    labels, expected, _ = separate(probs, Post(min_quality=0), HALF, opinion)
    assert expected is not None and expected.shape == (labels.max(),) == (3,)
    flat = labels[4, 54]
    assert expected[flat - 1] == expected.min() < 0.9 < expected.max()
    kept = instances(probs, Post(min_quality=0.9), HALF, opinion)
    assert kept.max() == 2 and not kept[4, 54]
    assert separate(probs, Post(policy="ws"), HALF, opinion).quality is None
    assert separate(probs, Post(), HALF).quality is None
    nothing = {head: np.zeros_like(value) for head, value in probs.items()}
    found = separate(nothing, Post(), HALF, opinion)
    assert found.quality is not None and found.quality.shape == (0,)


def test_a_promise_is_what_all_chosen_nuclei_are_worth():
    probs, _ = two_disks()
    certain = likes("log_atoms", 0)
    found = separate(probs, Post(min_quality=0.25), HALF, certain)
    assert found.labels.max() == 2 and found.promise == pytest.approx(2 * (1 - 0.25))
    removed = separate(probs, Post(min_quality=0.25, min_object_size=10_000), HALF, certain)
    assert removed.labels.max() == 0 and removed.promise == found.promise
    assert separate(probs, Post(policy="ws"), HALF, certain).promise == separate(probs, Post(), HALF).promise == 0
    nothing = {head: np.zeros_like(value) for head, value in probs.items()}
    assert separate(nothing, Post(), HALF, certain).promise == 0


@every_policy
@every_source
@pytest.mark.parametrize("marker_contour", [0.0, 0.5])
def test_heads_that_are_not_read_change_nothing(policy, source, marker_contour):
    probs, post = random_probs(3), Post(policy=policy, marker=source, marker_contour=marker_contour)
    read = heads_read(probs, post)
    assert np.array_equal(instances({head: probs[head] for head in read}, post, HALF), instances(probs, post, HALF))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"segmentation": False}, {"semantic"}),
        ({"policy": "rw", "marker": "marker", "marker_contour": 0}, {"semantic", "marker"}),
        ({"policy": "rw", "marker": "marker", "marker_contour": 0.5}, {"semantic", "marker", "contour"}),
        ({"policy": "rw", "marker": "peak"}, {"semantic"}),
        ({"policy": "ws", "marker": "distance"}, {"semantic", "contour", "distance"}),
        ({"policy": "forest"}, {"semantic", "marker", "contour", "distance"}),
    ],
)
def test_what_is_read(options, expected):
    assert heads_read(HALF, Post(**options)) == expected


def test_a_policy_of_ones_own_may_read_all_heads():
    assert heads_read(HALF, Post(marker="peak").model_copy(update={"policy": "mine"})) >= set(HALF)
