"""The stain room, against scikit-image and against tissue whose stains are known."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from skimage.color import rgb2hed, rgb2lab

from config import Pre
from image import Cache, read_image
from light import is_gray
from stain import FULL_STAIN, NORMALIZERS, SPACES, see
from synthetic import draw_sample, write_dataset

TISSUE = draw_sample(0, (96, 96), "tissue")[0]
FLUORESCENCE = draw_sample(0, (96, 96), "fluorescence")[0]
#: Optical density of hematoxylin and eosin on two slides.
SLIDES = (((0.60, 0.72, 0.34), (0.15, 0.85, 0.50)), ((0.50, 0.76, 0.42), (0.26, 0.80, 0.54)))
every_normalizer = pytest.mark.parametrize("name", [name for name in NORMALIZERS if name != "none"])


def stained(stains, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Amounts (64, 64, 2) of two stains, and the image they give."""
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(0.15, 1.6, (64, 64, 2)) * (rng.random((64, 64, 2)) < 0.7) + 0.02
    stains = np.array(stains) / np.linalg.norm(stains, axis=1, keepdims=True)
    return amounts, np.rint(np.clip(256 * np.exp(-amounts @ stains) - 1, 0, 255)).astype(np.uint8)


def test_rows_are_the_choices_of_the_settings():
    assert set(SPACES) == set(get_args(Pre.model_fields["color_space"].annotation))
    assert set(NORMALIZERS) == set(get_args(Pre.model_fields["stain_normalize"].annotation))


# Spaces


def test_lab_is_that_of_scikit_image():
    found = see(TISSUE, "lab").astype(float) * [100 / 255, 1, 1] - [0, 128, 128]
    assert np.abs(found - rgb2lab(TISSUE)).max() < 1.5


def test_hed_is_that_of_scikit_image():
    image = np.maximum(TISSUE, 1)
    expected = np.clip(rgb2hed(image) / FULL_STAIN, 0, 1)
    assert np.abs(see(image, "hed") / 255 - expected).max() <= 0.5 / 255 + 1e-9
    assert (see(np.zeros((2, 2, 3), np.uint8), "hed") == see(np.ones((2, 2, 3), np.uint8), "hed")).all()


def test_hed_tells_stains_apart():
    hematoxylin, eosin = (65, 60, 125), (240, 60, 215)
    found = see(np.array([[hematoxylin, eosin]], np.uint8), "hed")[0].astype(int)
    assert found[0, 0] > 2 * found[0, 1] and found[1, 1] > 2 * found[1, 0]


def test_gray_is_the_luminance():
    found = see(TISSUE, "gray")
    assert (found == found[..., :1]).all()
    assert np.abs(found[..., 0] - TISSUE @ [0.299, 0.587, 0.114]).max() <= 1


def test_rgb_is_the_image_itself():
    assert see(TISSUE) is TISSUE


# Stains


@every_normalizer
def test_gray_images_are_left_alone(name):
    noisy = FLUORESCENCE.copy()
    noisy[0, 0] = (255, 0, 0)
    assert is_gray(noisy) and not is_gray(TISSUE)
    assert see(noisy, normalize=name) is noisy


@every_normalizer
@pytest.mark.parametrize("seed", range(3))
def test_slides_that_were_stained_differently_come_to_look_alike(name, seed):
    _, first = stained(SLIDES[0], seed)
    _, second = stained(SLIDES[1], seed)
    before = np.abs(first.astype(int) - second).mean()
    after = np.abs(see(first, normalize=name).astype(int) - see(second, normalize=name)).mean()
    assert after < 0.6 * before


@every_normalizer
def test_what_is_normal_already_hardly_changes(name):
    once = see(stained(SLIDES[0])[1], normalize=name)
    assert np.abs(see(once, normalize=name).astype(int) - once).mean() < 6


def test_macenko_finds_the_stains_of_a_slide():
    from light import density
    from stain import _find_stains

    true = np.array(SLIDES[0])
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    _, image = stained(true)
    found = _find_stains(density(image).reshape(-1, 3))
    assert found is not None and ((found * true).sum(axis=1) > 0.99).all()


@every_normalizer
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 40, 3), (64, 64, 3)])
@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (180, 60, 160)])
def test_flat_images_make_no_trouble(name, shape, color):
    found = see(np.broadcast_to(np.uint8(color), shape).copy(), normalize=name)
    assert found.shape == shape and found.dtype == np.uint8


@pytest.mark.parametrize("stains", [((0.65, 0.70, 0.29),) * 2, ((0.65, 0.70, 0.29), (0.10, 0.30, 0.95))])
def test_macenko_leaves_one_stain_or_another_pair_as_it_is(stains):
    image = stained(stains)[1]
    assert see(image, normalize="macenko") is image


def test_reinhard_leaves_glass_as_it_is():
    image = stained(SLIDES[0])[1]
    image[:8] = 255
    found = see(image, normalize="reinhard")
    assert (found[:8] == 255).all() and not np.array_equal(found, image)


# On the way in


def test_images_are_read_and_cached_in_the_colours_that_are_asked_for(tmp_path):
    (name,) = write_dataset(tmp_path, 1, 2, (48, 48))
    path = tmp_path / name / "images" / f"{name}.png"
    plain, folder = read_image(path), tmp_path / "cache"
    for space in SPACES:
        for normalize in NORMALIZERS:
            found = read_image(path, color_space=space, stain_normalize=normalize)
            assert np.array_equal(found, see(plain, space, normalize))
            cache = Cache(folder, color_space=space, stain_normalize=normalize)
            assert np.array_equal(cache.image(path), found)
    assert len(list(folder.rglob("*.npy"))) == len(SPACES) * len(NORMALIZERS)
