"""The painting room: light lies where it is said to, and what is no nucleus is drawn without a label."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

import paint
from synthetic import KINDS

SHAPE = (96, 120)
kinds = pytest.mark.parametrize("kind", KINDS)


def painted(kind, labels, seed=1):
    rng = np.random.default_rng(seed)
    return KINDS[kind].paint(rng, labels, paint.draw_flow(rng, labels.shape))


def disk(radius=14):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return ((y - 48) ** 2 + (x - 60) ** 2 < radius**2).astype(np.int32)


@kinds
def test_light_is_finite_and_of_the_shape(kind):
    for labels in (disk(), np.zeros(SHAPE, np.int32), np.ones(SHAPE, np.int32)):
        image = painted(kind, labels)
        assert image.shape == (*SHAPE, 3) and np.isfinite(image).all()


@kinds
def test_a_nucleus_differs_from_what_is_around_it(kind):
    labels = disk()
    ring = (disk(22) > 0) & (disk(16) == 0)
    images = [painted(kind, labels, seed) for seed in range(6)]
    contrasts = [np.abs(image[labels > 0].mean(0) - image[ring].mean(0)).max() for image in images]
    assert np.median(contrasts) > 0.06


def test_walls_lie_half_way_between_two_nuclei():
    labels = np.zeros(SHAPE, np.int32)
    labels[40:56, 20:36], labels[40:56, 84:100] = 1, 2
    body, wall = paint._bodies(np.random.default_rng(0), labels)
    assert wall.min() >= 0 and wall.max() <= 1 and body.min() > 0
    assert abs(wall[48].argmax() - 59.5) <= 6  # a wall may bend by a few pixels
    assert wall[:, :40].max() == 0 and wall[:, 80:].max() == 0


def test_one_nucleus_or_none_has_no_walls():
    for labels in (disk(), np.zeros(SHAPE, np.int32)):
        body, wall = paint._bodies(np.random.default_rng(0), labels)
        assert wall.max() == 0 and body.shape == SHAPE


def test_drops_are_as_many_and_as_large_as_asked_for():
    def cover(density, radius):
        return paint._drops(np.random.default_rng(1), (256, 256), density, (radius, radius)).mean()

    assert cover(0.0, 4) == 0
    assert 0 < cover(0.0002, 4) < cover(0.004, 4) < 1
    assert cover(0.0002, 8) > 3 * cover(0.0002, 4)


def test_what_lies_out_of_focus_shines_without_a_label():
    nothing = np.zeros((128, 128), np.int32)
    bright = [np.ptp(cv2.GaussianBlur(painted("layer", nothing, seed)[..., 0], (0, 0), 3)) for seed in range(8)]
    dark = [np.ptp(cv2.GaussianBlur(painted("dense", nothing, seed)[..., 0], (0, 0), 3)) for seed in range(8)]
    assert sum(value > 2 * max(dark) for value in bright) >= 4


def test_no_two_laboratories_stain_alike():
    rng = np.random.default_rng(0)
    stains = np.array([paint._vary(rng, paint.EOSIN) for _ in range(50)])
    assert stains.min() > 0 and stains.std(0).min() > 0.03
    assert np.abs(stains.mean(0) - paint.EOSIN).max() < 0.06
