"""The light room: densities by hand, and back."""

from __future__ import annotations

import numpy as np

from light import density, intensity


def test_density_by_hand():
    image = np.array([[[255, 127, 0]]], np.uint8)
    assert np.allclose(density(image), [[[0, np.log(2), np.log(256)]]])
    assert density(image).dtype == np.float32


def test_every_intensity_comes_back():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(np.rint(intensity(density(image))), image)
