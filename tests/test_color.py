"""The colour room: each function alone, on images whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import color
from synthetic import draw_sample

TISSUE, TISSUE_LABELS = draw_sample(0, (96, 96), "tissue")
FLUORESCENCE, _ = draw_sample(0, (96, 96), "fluorescence")
#: function -> least and greatest share of the images that it changes
SHARES = {
    color.equalize_some: (0.3, 0.7), color.invert: (0.02, 0.2), color.jitter: (1, 1), color.shift_lab: (0.3, 0.7),
    color.shift_stain: (0.3, 0.7), color.shuffle: (0.02, 0.2), color.gray: (0.1, 0.3), color.recolor: (0.1, 0.3),
    color.blur: (0.2, 0.4), color.noise: (0.3, 0.7), color.illuminate: (0.2, 0.4), color.compress: (0.1, 0.3),
}  # fmt: skip


def outcomes(change: Callable, image: np.ndarray, n: int = 200) -> list[np.ndarray]:
    """What a function makes of an image; those that left it alone are left out."""
    found = [change(image, np.random.default_rng(seed)) for seed in range(n)]
    return [f for f in found if not np.array_equal(f, image)]


@pytest.mark.parametrize("change", SHARES, ids=lambda f: f.__name__)
def test_it_changes_the_share_of_images_that_it_says(change):
    low, high = SHARES[change]
    found = outcomes(change, TISSUE)
    assert low <= len(found) / 200 <= high
    assert all(f.shape == TISSUE.shape and f.dtype == np.uint8 for f in found)


@pytest.mark.parametrize("change", SHARES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 50, 3), (37, 5, 3)])
def test_small_images_and_flat_ones(change, shape):
    for value in (0, 255):
        image = np.full(shape, value, np.uint8)
        for seed in range(20):
            assert change(image, np.random.default_rng(seed)).shape == shape


def test_invert():
    assert all(np.array_equal(f, 255 - TISSUE) for f in outcomes(color.invert, TISSUE))


def test_shuffle_permutes_channels():
    found = outcomes(color.shuffle, TISSUE)
    assert all(np.array_equal(np.sort(f.reshape(-1, 3), 1), np.sort(TISSUE.reshape(-1, 3), 1)) for f in found)


def test_gray_has_equal_channels():
    assert all((f == f[..., :1]).all() for f in outcomes(color.gray, TISSUE))


def test_jitter_is_one_rising_curve():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=-1)
    for f in outcomes(color.jitter, ramp):
        assert (f == f[..., :1]).all() and (np.diff(f[0, :, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize("change", [color.shift_lab, color.shift_stain])
def test_a_gray_image_has_no_stain(change):
    assert not outcomes(change, FLUORESCENCE)


def test_stains_that_stay_the_same_leave_the_image_the_same(monkeypatch):
    class Still:
        """A generator that changes nothing: half of the time comes up, and every deviation is zero."""

        def random(self):
            return 1.0

        def normal(self, mean, deviation, size):
            return np.full(size, mean, float)

    assert np.abs(color.shift_stain(TISSUE, Still()).astype(int) - TISSUE).max() <= 1


def test_other_amounts_of_a_stain_keep_a_white_ground_bright():
    image = np.full((8, 8, 3), 255, np.uint8)
    image[:4] = (150, 60, 160)
    for f in outcomes(color.shift_stain, image):
        assert f[4:].mean() > 200 and f[:4].mean() < f[4:].mean() - 20


def test_recolor_goes_by_lightness_alone():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=-1)
    found = outcomes(color.recolor, np.concatenate([ramp, ramp]))
    rising = [f[0].sum(-1).astype(int) for f in found]
    assert all(np.array_equal(f[0], f[1]) for f in found)
    assert all((np.diff(s) >= -2).all() or (np.diff(s) <= 2).all() for s in rising)
    assert {bool(s[-1] > s[0]) for s in rising} == {True, False}


def test_blur_has_no_bias_and_sharpens_too():
    found = outcomes(color.blur, TISSUE)
    assert all(abs(f.mean() - TISSUE.mean()) < 4 for f in found)
    edges = [np.abs(np.diff(f.astype(int), axis=0)).mean() for f in found]
    plain = np.abs(np.diff(TISSUE.astype(int), axis=0)).mean()
    assert min(edges) < 0.8 * plain and max(edges) > 1.2 * plain


def test_noise_is_small_and_has_no_bias():
    image = np.full((64, 64, 3), 128, np.uint8)
    for f in outcomes(color.noise, image, 60):
        assert (f == f[..., :1]).all()
        assert f.std() < 0.09 * 255 and abs(f.mean() - 128) < 1.5


def test_noise_may_differ_between_the_channels_of_a_coloured_image():
    found = [np.ptp(f.astype(int) - TISSUE, axis=-1).mean() for f in outcomes(color.noise, TISSUE, 60)]
    assert min(found) < 2 and max(found) > 5


def test_compression_changes_an_image_little():
    found = outcomes(color.compress, TISSUE)
    assert all(np.abs(f.astype(int) - TISSUE).mean() < 12 and abs(f.mean() - TISSUE.mean()) < 2 for f in found)
    assert all(np.ptp(f, axis=-1).max() <= 8 for f in outcomes(color.compress, FLUORESCENCE))


def test_light_is_smooth_and_leaves_gray_images_gray():
    image = np.full((96, 96, 3), 128, np.uint8)
    for f in outcomes(color.illuminate, image):
        assert (f == f[..., :1]).all()
        assert np.abs(np.diff(f[..., 0].astype(int), axis=1)).max() < 40


def test_equalize_widens_a_dull_image():
    image = (TISSUE // 4 + 90).astype(np.uint8)
    before = image.copy()
    found = color.equalize(image)
    assert found.shape == image.shape and found.dtype == np.uint8
    assert found.std() > 1.3 * image.std()
    assert np.array_equal(image, before)


def test_nuclei_fade_towards_what_is_around_them_and_nothing_else_changes():
    labels = np.zeros((96, 96), np.int32)
    for i, (y, x) in enumerate([(20, 20), (20, 70), (70, 20), (70, 70)], 1):
        labels[y - 8 : y + 8, x - 8 : x + 8] = i
    image = np.where(labels[..., None] > 0, 200, 40).repeat(3, axis=-1).astype(np.uint8)
    found = [color.fade_nuclei(image, labels, np.random.default_rng(seed)) for seed in range(100)]
    changed = [f for f in found if not np.array_equal(f, image)]
    assert 15 <= len(changed) <= 45
    for f in changed:
        height = [float(f[labels == i].mean()) for i in (1, 2, 3, 4)]
        assert len({round(h) for h in height}) > 1 and min(height) > 40
        far = np.ones(labels.shape, bool)
        for y, x in np.argwhere(labels)[::17]:
            far[max(y - 9, 0) : y + 10, max(x - 9, 0) : x + 10] = False
        assert np.abs(f[far].astype(int) - 40).max() <= 1
    assert np.mean([f[labels > 0].mean() for f in changed]) < 170


def test_nuclei_fade_nowhere_without_nuclei_or_without_background():
    for labels in (np.zeros((96, 96), np.int32), np.ones((96, 96), np.int32)):
        for seed in range(20):
            assert np.array_equal(color.fade_nuclei(TISSUE, labels, np.random.default_rng(seed)), TISSUE)


def test_style_takes_colour_and_shading_and_leaves_the_shapes():
    other = np.full(TISSUE.shape, (40, 120, 200), np.uint8)
    found = [color.mix_style(TISSUE, other, np.random.default_rng(seed)) for seed in range(200)]
    changed = [f for f in found if not np.array_equal(f, TISSUE)]
    assert 20 <= len(changed) <= 60
    for f in changed:
        away = np.abs(f.mean(axis=(0, 1)) - other.mean(axis=(0, 1)))
        assert (away < np.abs(TISSUE.mean(axis=(0, 1)) - other.mean(axis=(0, 1))) + 8).all()
        fine, before = (np.diff(x.astype(float), axis=0).ravel() for x in (f, TISSUE))
        assert np.corrcoef(fine, before)[0, 1] > 0.7
    assert max(np.abs(f.mean(axis=(0, 1)) - TISSUE.mean(axis=(0, 1))).max() for f in changed) > 30


def test_an_image_has_its_own_style():
    for seed in range(30):
        assert np.abs(color.mix_style(TISSUE, TISSUE, np.random.default_rng(seed)).astype(int) - TISSUE).max() <= 1
