"""The transform room: every augmentation alone and all together, against slicing, flipping and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from config import Pre
from labels import split_fragments
from synthetic import draw_sample
from transform import AUGMENTATIONS, Sample, Warp, build_transform

SIZE = 96
SWITCHES = [
    "random_crop", "flip", "rotate", "elastic_distortion", "color_invert", "color_jitter", "color_equalize", "gray",
    "color_space_shift", "channel_shuffle", "add_noise", "fade_nuclei", "stain_shift", "recolor", "illumination",
    "blur", "compress", "style_mix", "paste_nuclei",
]  # fmt: skip
every_row = pytest.mark.parametrize("name", AUGMENTATIONS)
colour_rows = pytest.mark.parametrize(
    "name", [n for n, row in AUGMENTATIONS.items() if row.stage in ("nuclei", "image")]
)


def switched(*names: str, **values) -> Pre:
    """Settings with these switches on and all others off."""
    return Pre(**{name: name in names for name in SWITCHES}, **values)


def draw(seed: int = 0, shape: tuple[int, int] = (SIZE, SIZE), kind: str = "tissue") -> Sample:
    """A sample whose ids have gaps and need more than 16 bits."""
    image, labels = draw_sample(seed, shape, kind)
    assert labels.max() >= 2
    return Sample(image, labels * np.int32(70_001), "an id", "a group", style=image[::-1, ::2] // 2)


def run(pre: Pre, sample: Sample, seed: int, width: int = SIZE, precise: bool = False) -> Sample:
    return build_transform(pre, width, precise)(sample, np.random.default_rng(seed))


def same(a: Sample, b: Sample) -> bool:
    return np.array_equal(a.image, b.image) and np.array_equal(a.labels, b.labels)


# Every row


@every_row
@pytest.mark.parametrize("precise", [False, True])
def test_a_row_keeps_types_shape_and_ids(name, precise):
    sample = draw(3)
    for seed in range(6):
        found = run(switched(AUGMENTATIONS[name].switch), sample, seed, 64, precise)
        assert found.image.shape == (64, 64, 3) and found.image.dtype == np.uint8
        assert found.labels.shape == (64, 64) and found.labels.dtype == np.int32
        new = sorted(set(np.unique(found.labels)) - set(np.unique(sample.labels)))
        assert not new or AUGMENTATIONS[name].stage in ("warp", "sample")
        assert (found.id, found.group) == ("an id", "a group")


@every_row
def test_a_row_depends_on_the_seed_alone(name):
    pre, sample = switched(AUGMENTATIONS[name].switch), draw(3)
    found = [run(pre, sample, seed) for seed in range(30)]
    assert all(same(a, run(pre, sample, seed)) for seed, a in enumerate(found))
    assert any(not same(a, sample) for a in found)
    assert len({a.image.tobytes() for a in found}) > 1


def test_every_switch_has_a_row_and_every_row_a_switch():
    assert {row.switch for row in AUGMENTATIONS.values()} == set(SWITCHES)


def test_all_off_is_the_identity():
    sample = draw()
    assert all(same(run(switched(), sample, seed), sample) for seed in range(3))
    assert same(run(switched(), sample, 0, precise=True), sample)


@every_row
def test_a_row_leaves_its_input_alone(name):
    sample = draw()
    before = sample.image.copy(), sample.labels.copy()
    for seed in range(4):
        run(switched(AUGMENTATIONS[name].switch), sample, seed)
    assert np.array_equal(sample.image, before[0]) and np.array_equal(sample.labels, before[1])


@pytest.mark.parametrize("precise", [False, True])
def test_read_only_memory_maps_are_as_good(tmp_path, precise):
    sample = draw(1, (120, 140))
    np.save(tmp_path / "image.npy", sample.image)
    np.save(tmp_path / "labels.npy", sample.labels)
    image, labels = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("image", "labels"))
    mapped = Sample(image, labels, style=sample.style)
    for switches in (SWITCHES, []):
        found = run(switched(*switches), mapped, 3, 64, precise)
        assert same(found, run(switched(*switches), sample, 3, 64, precise))
        found.image[:], found.labels[:] = 0, 0  # what comes out belongs to the caller
    assert np.array_equal(mapped.image, sample.image) and np.array_equal(mapped.labels, sample.labels)


@pytest.mark.parametrize("shape", [(20, 30), (1, 1), (1, 50), (200, 9)])
def test_small_images_fill_the_crop(shape):
    rng = np.random.default_rng(0)
    sample = Sample(rng.integers(1, 256, (*shape, 3), dtype=np.uint8), np.ones(shape, np.int32))
    for seed in range(8):
        found = run(switched("random_crop", "flip", "rotate", "elastic_distortion"), sample, seed, 48)
        assert (found.labels == found.labels[0, 0]).all() and found.labels[0, 0] and (found.image > 0).all()


def test_no_nucleus_at_all():
    sample = Sample(draw().image, np.zeros((SIZE, SIZE), np.int32))
    for precise in (False, True):
        assert not run(switched(*SWITCHES), sample, 1, 64, precise).labels.any()


# Geometry


def test_identity_warp_equals_slicing():
    sample = draw(2, (80, 112))
    found = Warp.centered((80, 112), (32, 48)).apply(sample)
    assert np.array_equal(found.image, sample.image[24:56, 32:80])
    assert np.array_equal(found.labels, sample.labels[24:56, 32:80])


def test_what_lies_outside_is_mirrored():
    sample = draw(2, (40, 50), "dense")
    found = Warp.centered((40, 50), (60, 80)).apply(sample)
    assert np.array_equal(found.image, np.pad(sample.image, ((10, 10), (15, 15), (0, 0)), mode="reflect"))
    plain = np.pad(sample.labels, ((10, 10), (15, 15)), mode="reflect")
    pieces = split_fragments(plain, connectivity=2)
    assert np.array_equal(split_fragments(found.labels, connectivity=2), pieces)
    inside = np.unique(pieces[10:50, 15:65])
    assert np.array_equal(found.labels[np.isin(pieces, inside)], plain[np.isin(pieces, inside)])
    copies = found.labels[~np.isin(pieces, inside)]
    assert len(np.unique(copies)) == pieces.max() + 1 - len(inside) >= 2  # each has an id of its own
    assert copies.min() > sample.labels.max()


def geometric_warp(
    seed: int, shape=(SIZE, SIZE), crop=(64, 64), rows=("scale", "rotate", "flip", "random_crop")
) -> Warp:
    rng, warp = np.random.default_rng(seed), Warp.centered(shape, crop)
    for name in rows:
        warp = AUGMENTATIONS[name].run(warp, rng, Pre())
    return warp


@pytest.mark.parametrize("seed", range(6))
def test_labels_are_moved_by_nearest_neighbour(seed):
    sample = draw(seed)
    warp = geometric_warp(seed)
    x, y = np.moveaxis(warp.coordinates(), -1, 0)
    expected = ndimage.map_coordinates(sample.labels, [y, x], order=0, mode="mirror")
    assert (warp.apply(sample).labels == expected).mean() > 0.995  # halves may be rounded either way


@pytest.mark.parametrize("seed", range(3))
def test_precise_moves_each_mask_by_linear_interpolation(seed):
    sample = draw(seed)
    warp = geometric_warp(seed, rows=("scale", "rotate", "flip", "elastic_distortion", "random_crop"))
    x, y = np.moveaxis(warp.coordinates(), -1, 0)
    ids = np.unique(sample.labels)[1:]
    masks = [ndimage.map_coordinates((sample.labels == i) * 1.0, [y, x], order=1, mode="mirror") for i in ids]
    best = np.argmax(masks, axis=0)
    expected = np.where(np.max(masks, axis=0) > 0.5, ids[best], 0)
    found = warp.apply(sample, precise=True).labels
    assert (found == expected).mean() > 0.99
    assert not np.array_equal(found, warp.apply(sample).labels)


@pytest.mark.parametrize("precise", [False, True])
def test_image_and_labels_move_together(precise):
    labels = draw_sample(4, (160, 200), "tissue")[1]
    colors = np.random.default_rng(0).integers(0, 256, (labels.max() + 1, 3), dtype=np.uint8)
    sample = Sample(colors[labels], labels)
    pre = switched("random_crop", "flip", "rotate", "elastic_distortion", min_scale=0.7, max_scale=1.5)
    for seed in range(10):
        found = run(pre, sample, seed, SIZE, precise)
        inside = ndimage.minimum_filter(found.labels, 7) == ndimage.maximum_filter(found.labels, 7)
        shown = np.zeros(found.image.shape)
        for i in np.unique(found.labels):  # a mirror image has another id, and the colour of one nucleus all the same
            shown[found.labels == i] = np.median(found.image[found.labels == i], axis=0)
        error = np.abs(found.image - shown).max(axis=-1)
        assert inside.mean() > 0.2
        assert (error[inside] <= 4).mean() > 0.99


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (190, 190)])
def test_crop_stays_inside(shape):
    for seed in range(40):
        x, y = np.moveaxis(geometric_warp(seed, shape).coordinates(), -1, 0)
        assert x.min() >= -0.5 and y.min() >= -0.5
        assert x.max() <= shape[1] - 0.5 and y.max() <= shape[0] - 0.5


def test_shrinking_averages_what_it_cannot_show():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[::2] = 255
    warp = Warp((128, 128), (48, 48), np.array([63.5, 63.5]), np.eye(2) * 2.5)
    found = warp.apply(Sample(stripes, np.zeros((128, 128), np.int32))).image
    assert abs(found.mean() - 127.5) < 5 and found.std() < 25
    kept = Warp.centered((128, 128), (48, 48)).apply(Sample(stripes, np.zeros((128, 128), np.int32))).image
    assert np.array_equal(np.unique(kept), [0, 255])  # at its own size an image stays sharp


def test_crop_gets_everywhere():
    corners = np.array(
        [geometric_warp(seed, (200, 300), rows=("random_crop",)).coordinates()[0, 0] for seed in range(400)]
    )
    assert (corners.min(axis=0) < 4).all()
    assert (corners.max(axis=0) > np.array([300 - 64, 200 - 64]) - 5).all()
    assert np.allclose(corners.mean(axis=0), [(300 - 64) / 2, (200 - 64) / 2], atol=10)


def test_zoom_and_aspect_stay_in_range():
    pre = Pre(min_scale=0.5, max_scale=2, aspect=0.2)
    zooms, aspects = [], []
    for seed in range(300):
        warp = AUGMENTATIONS["scale"].run(Warp.centered((9, 9), (9, 9)), np.random.default_rng(seed), pre)
        zooms.append(np.linalg.det(warp.linear) ** -0.5)
        aspects.append(warp.linear[0, 0] / warp.linear[1, 1])
    assert 0.5 <= min(zooms) < 0.53 and 1.9 < max(zooms) <= 2
    assert 1 / 1.2 - 1e-9 <= min(aspects) < 0.85 and 1.17 < max(aspects) <= 1.2 + 1e-9
    assert 0.4 < np.mean(np.array(zooms) < 1) < 0.6  # as often smaller as larger


def test_flips_are_exact_and_all_four_come():
    sample = draw(5)
    wanted = {step: sample.labels[:: step[0], :: step[1]] for step in [(1, 1), (1, -1), (-1, 1), (-1, -1)]}
    found = count_equal(wanted, [run(switched("flip"), sample, seed) for seed in range(40)])
    assert all(found[step] > 0 for step in wanted) and sum(found.values()) == 40


def test_half_of_the_rotations_are_quarter_turns():
    sample = draw(5)
    wanted = {k: np.rot90(sample.labels, k) for k in range(4)}
    found = count_equal(wanted, [run(switched("rotate"), sample, seed) for seed in range(60)])
    assert all(found[k] > 0 for k in wanted) and 18 <= sum(found.values()) <= 42


def count_equal(wanted, samples):
    return {key: sum(np.array_equal(s.labels, labels) for s in samples) for key, labels in wanted.items()}


def test_without_random_crop_the_whole_image_is_squeezed():
    image = np.zeros((60, 120, 3), np.uint8)
    labels = np.zeros((60, 120), np.int32)
    image[:30, 60:], labels[:30, 60:] = 200, 9
    found = run(switched(), Sample(image, labels), 0, 40)
    expected = np.zeros((40, 40), np.int32)
    expected[:20, 20:] = 9
    assert np.array_equal(found.labels, expected)
    assert (found.image[1:18, 23:] == 200).all() and not found.image[23:].any()


def test_elastic_distortion_is_smooth_and_small():
    reach = []
    for seed in range(40):
        warp = geometric_warp(seed, crop=(SIZE, SIZE), rows=("elastic_distortion",))
        if warp.field is not None:
            reach.append(np.abs(warp.field).max())
            assert np.abs(np.diff(warp.field, axis=0)).max() < 1  # nothing folds over
    assert 10 <= len(reach) <= 30 and 1 < np.median(reach) < 15


def test_nuclei_of_training_images_are_brought_to_one_size():
    y, x = np.indices((600, 600))
    for radius in (6, 14, 40):
        period = 3 * radius
        number = 1 + y // period * 100 + x // period
        inside = np.hypot(y % period - period / 2, x % period - period / 2) <= radius
        labels = np.where(inside, number, 0).astype(np.int32)
        sample = Sample(np.zeros((600, 600, 3), np.uint8), labels, diameter=2.0 * radius)
        pre = switched("random_crop", min_scale=1, max_scale=1, aspect=0, nucleus_diameter=28, equal_size=True)
        found = [np.bincount(run(pre, sample, seed, 128).labels.ravel())[1:].max() for seed in range(5)]
        wanted = np.pi * (radius * np.clip(28 / (2 * radius), 0.4, 3)) ** 2
        assert np.allclose(found, wanted, rtol=0.08)


# Colour


@colour_rows
def test_colour_rows_leave_labels_alone(name):
    sample = draw()
    for seed in range(6):
        assert np.array_equal(run(switched(AUGMENTATIONS[name].switch), sample, seed).labels, sample.labels)


def test_in_other_spaces_what_knows_rgb_alone_is_left_out():
    sample = draw()
    for name, row in AUGMENTATIONS.items():
        found = [run(switched(row.switch, color_space="lab"), sample, seed) for seed in range(30)]
        plain = [run(switched(row.switch), sample, seed) for seed in range(30)]
        if row.rgb:
            assert all(same(a, sample) for a in found), name
        elif row.light:
            assert all(np.array_equal(a.image[..., 1:], sample.image[..., 1:]) for a in found), name
            assert not all(np.array_equal(a.image[..., 0], sample.image[..., 0]) for a in found), name
        else:
            assert all(same(a, b) for a, b in zip(found, plain, strict=True)), name
    assert {"stain_shift", "color_space_shift"} <= {name for name, row in AUGMENTATIONS.items() if row.rgb}
