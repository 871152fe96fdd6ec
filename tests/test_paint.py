"""The painting room: light lies where it is said to, and what is no nucleus is drawn without a label."""

from __future__ import annotations

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
    far = [np.abs(painted(kind, labels, seed)[labels > 0].mean(0) - painted(kind, labels, seed)[ring].mean(0)).max()
           for seed in range(6)]  # fmt: skip
    assert np.median(far) > 0.06


def test_walls_lie_half_way_between_two_nuclei():
    labels = np.zeros(SHAPE, np.int32)
    labels[40:56, 20:36], labels[40:56, 84:100] = 1, 2
    body, wall = paint._bodies(np.random.default_rng(0), labels)
    assert wall.min() >= 0 and wall.max() <= 1 and body.min() > 0
    columns = wall[48].argmax()
    assert abs(columns - 59.5) <= 6  # a wall may bend by a few pixels
    assert wall[:, :40].max() == 0 and wall[:, 80:].max() == 0


def test_one_nucleus_or_none_has_no_walls():
    for labels in (disk(), np.zeros(SHAPE, np.int32)):
        body, wall = paint._bodies(np.random.default_rng(0), labels)
        assert wall.max() == 0 and body.shape == SHAPE


def test_drops_are_as_many_and_as_large_as_asked_for():
    rng = np.random.default_rng(0)
    assert paint._drops(rng, SHAPE, 0.0, (4, 6)).max() == 0
    few, many = (paint._drops(np.random.default_rng(1), (256, 256), d, (4, 4)).mean() for d in (0.0002, 0.004))
    assert 0 < few < many < 1


def test_what_lies_out_of_focus_shines_without_a_label():
    nothing = np.zeros((128, 128), np.int32)
    bright = [painted("layer", nothing, seed).max() - painted("dense", nothing, seed).max() for seed in range(8)]
    assert max(bright) > 0.05


def test_no_two_laboratories_stain_alike():
    rng = np.random.default_rng(0)
    stains = np.array([paint._vary(rng, paint.EOSIN) for _ in range(50)])
    assert stains.min() > 0 and stains.std(0).min() > 0.03
    assert np.abs(stains.mean(0) - paint.EOSIN).max() < 0.06
