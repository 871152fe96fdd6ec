"""The likeness room: the same pixels in another format are the same; a scaled copy is near; another image is not."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from likeness import near_pairs, perceptual_hash, pixel_hash, thumbnail
from synthetic import draw_sample


def test_the_same_gray_picture_has_one_name_in_every_format():
    gray = np.random.default_rng(0).integers(0, 256, (9, 7), np.uint8)
    rgb = np.repeat(gray[..., None], 3, axis=-1)
    rgba = np.dstack([rgb, np.full_like(gray, 255)])
    assert pixel_hash(gray) == pixel_hash(rgb) == pixel_hash(rgba, alpha=True) == pixel_hash(gray[..., None])


def test_other_pixels_another_shape_or_depth_are_other_names():
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    others = [gray + 1, gray.reshape(4, 3), gray.astype(np.uint16), np.dstack([gray, gray, gray + 1])]
    assert len({pixel_hash(array) for array in [gray, *others]}) == 5


def test_byte_order_does_not_matter():
    gray = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert pixel_hash(gray) == pixel_hash(gray.astype(">u2"))


def views(image: np.ndarray) -> list[np.ndarray]:
    small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR)
    return [image, small, jpeg, (image * 0.7 + 20).astype(np.uint8)]


@pytest.mark.parametrize("kind", ["fluorescence", "tissue"])
def test_copies_are_near_and_other_images_are_not(kind):
    pictures = [view for seed in range(4) for view in views(draw_sample(seed, (128, 128), kind)[0])]
    pairs = near_pairs([perceptual_hash(p) for p in pictures], [thumbnail(p) for p in pictures])
    found = {(i, j) for i, j, _ in pairs}
    wanted = {(i, j) for i in range(16) for j in range(i + 1, 16) if i // 4 == j // 4}
    assert found == wanted


def test_flat_images_are_like_nothing():
    flat = np.full((20, 20, 3), 7, np.uint8)
    assert near_pairs([perceptual_hash(flat)] * 2, [thumbnail(flat)] * 2) == []
    assert near_pairs([], []) == []
