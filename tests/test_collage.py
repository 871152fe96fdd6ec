"""The collage room: what is pasted touches, is labelled exactly, and changes nothing far away."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from collage import MAX_HIDDEN, mirror_tile, paste_nuclei, paste_some
from labels import adjacency, areas, relabel
from synthetic import KINDS, draw_sample

every_kind = pytest.mark.parametrize("kind", KINDS)
SEEDS = range(8)


def draw(kind: str, seed: int = 3, n: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Nuclei that stand apart, so that every contact that is found later was made by pasting."""
    return draw_sample(seed, (192, 192), kind, n, touching=False)


def disks(value: int, ground: int, centers=((30, 30), (30, 90), (90, 60))) -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((128, 128), np.int32)
    y, x = np.mgrid[:128, :128]
    for number, (row, column) in enumerate(centers, start=1):
        labels[(y - row) ** 2 + (x - column) ** 2 <= 12**2] = number
    return np.where(labels[..., None] > 0, value, ground).astype(np.uint8).repeat(3, axis=-1), labels


def paste(image, labels, seed, **options):
    return paste_nuclei(image, labels, np.random.default_rng(seed), **options)


@every_kind
def test_what_is_pasted_is_whole_new_and_touches(kind):
    image, labels = draw(kind)
    n_new = 0
    for seed in SEEDS:
        found_image, found = paste(image, labels, seed, n=4)
        assert found_image.shape == image.shape and found_image.dtype == np.uint8 and found.dtype == np.int32
        new = np.setdiff1d(found, labels)
        n_new += new.size
        assert set(new) == set(range(labels.max() + 1, labels.max() + 1 + new.size))
        touching = set(adjacency(found).ravel().tolist())
        assert set(new.tolist()) <= touching
        for number in np.unique(found)[1:]:
            assert ndimage.label(found == number)[1] == 1
    assert n_new >= 4


@every_kind
def test_nothing_is_hidden_beyond_recognition_and_old_labels_only_lose_to_new_ones(kind):
    image, labels = draw(kind)
    for seed in SEEDS:
        found = paste(image, labels, seed, n=8)[1]
        changed = found != labels
        assert (found[changed] > labels.max()).all()
        left = areas(found)[1 : labels.max() + 1] / areas(labels)[1:]
        assert left.min() >= 1 - MAX_HIDDEN


@every_kind
def test_pixels_far_from_what_was_pasted_stay(kind):
    image, labels = draw(kind)
    for seed in SEEDS:
        found_image, found = paste(image, labels, seed)
        far = ndimage.distance_transform_edt(found <= labels.max()) > 16
        assert np.array_equal(found_image[far], image[far])


@pytest.mark.parametrize(("value", "ground"), [(200, 20), (60, 230)], ids=["bright nuclei", "dark nuclei"])
def test_image_and_labels_agree(value, ground):
    image, labels = disks(value, ground)
    n_new = 0
    for seed in SEEDS:
        found_image, found = paste(image, labels, seed, n=3)
        n_new += found.max() - 3
        inside = ndimage.binary_erosion(found > 0, iterations=2)
        outside = ndimage.binary_erosion(found == 0, iterations=6)
        middle = (value + ground) / 2
        assert ((found_image[..., 0] > middle) == (value > middle))[inside].all()
        assert (np.abs(found_image[outside].astype(int) - ground) <= 1).all()
    assert n_new >= 12


def test_a_flat_nucleus_shows_no_line_where_it_ends_on_another():
    image, labels = disks(180, 20)
    image = np.stack([ndimage.gaussian_filter(image[..., 0], 1.5)] * 3, axis=-1)
    for seed in SEEDS:
        found_image, found = paste(image, labels, seed, n=3)
        inside = ndimage.binary_erosion(found > 0, iterations=5)
        assert found_image[inside].min() > 120


def test_it_depends_on_the_generator_alone_and_leaves_its_arguments_alone():
    image, labels = draw("tissue")
    before = image.copy(), labels.copy()
    first, again, other = paste(image, labels, 1), paste(image, labels, 1), paste(image, labels, 2)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])
    assert np.array_equal(image, before[0]) and np.array_equal(labels, before[1])


def test_ids_with_gaps_are_kept():
    image, labels = disks(200, 20)
    far_apart = labels * np.int32(70_001)
    for seed in SEEDS:
        plain, found = paste(image, labels, seed)[1], paste(image, far_apart, seed)[1]
        assert np.array_equal(np.where(plain > 3, 3 * 70_001 + plain - 3, plain * 70_001), found)


def test_another_image_gives_its_nuclei_at_the_contrast_of_this_one():
    image, labels = disks(110, 20)
    brighter = disks(200, 20, centers=((64, 64),))
    found_image, found = paste(image, labels, 0, n=2, source=brighter)
    core = ndimage.binary_erosion(found > 3, iterations=3)
    assert core.any() and abs(float(np.median(found_image[core])) - 110) < 25


def test_bright_nuclei_are_not_pasted_among_dark_ones():
    image, labels = disks(200, 20)
    assert paste(image, labels, 0, n=4, source=disks(60, 230))[1] is labels


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (30, 30)])
@pytest.mark.parametrize("value", [0, 1])
def test_nothing_to_paste(shape, value):
    image, labels = np.full((*shape, 3), 90, np.uint8), np.full(shape, value, np.int32)
    found_image, found = paste(image, labels, 0, n=3)
    assert np.array_equal(found_image, image) and np.array_equal(found, labels)


def test_some_is_one_in_three():
    image, labels = disks(200, 20)
    changed = sum(paste_some(image, labels, np.random.default_rng(seed))[1] is not labels for seed in range(150))
    assert 30 <= changed <= 70


# Mirror images


def test_a_window_is_what_symmetric_padding_gives():
    image, labels = draw("fluorescence")
    found_image, found = mirror_tile(image, labels, (500, 420), (-100, -150))
    padding = ((100, 208), (150, 78))
    assert np.array_equal(found_image, np.pad(image, (*padding, (0, 0)), mode="symmetric"))
    assert np.array_equal(found > 0, np.pad(labels, padding, mode="symmetric") > 0)


def test_a_window_inside_is_the_image_itself():
    image, labels = draw("tissue")
    found_image, found = mirror_tile(image, labels, (60, 50), (20, 30))
    assert np.array_equal(found_image, image[20:80, 30:80])
    assert np.array_equal(found, relabel(labels[20:80, 30:80]))


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize(("depth", "n"), [(6, 1), (20, 2)], ids=["a cap is rounded", "most of a disk has a twin"])
def test_a_nucleus_on_the_border_goes_on_in_its_mirror_image(turn, depth, n):
    y, x = np.mgrid[:64, :64]
    labels = np.rot90(((y - depth + 12) ** 2 + (x - 32) ** 2 <= 12**2).astype(np.int32), turn).copy()
    image = np.zeros((64, 64, 3), np.uint8)
    found = mirror_tile(image, labels, (64, 64), [(-32, 0), (0, -32), (32, 0), (0, 32)][turn])[1]
    assert found.max() == n


def test_mirror_images_of_a_nucleus_are_other_nuclei():
    image, labels = disks(200, 20)
    found = mirror_tile(image, labels, (256, 384))[1]
    assert found.max() == 3 * 2 * 3 and set(areas(found)[1:]) == {areas(labels)[1]}
