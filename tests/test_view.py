"""The view room: what a network is shown, and that it is taken back exactly."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from view import COLORS, VIEWS, View, combine, show, undo, unzoom_maps, zoom_image

SQUARE = [View(turns, mirrored) for turns in range(4) for mirrored in (False, True)]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_views_are_the_symmetries_of_the_square():
    image = picture(2, 3)

    def named(*views):
        return {(view.shape, np.ascontiguousarray(view).tobytes()) for view in views}

    def seen(name):
        return named(*(show(image, view) for view in VIEWS[name]))

    assert seen("flips") == named(image, image[:, ::-1], image[::-1], image[::-1, ::-1])
    assert seen("rotations") == named(*(np.rot90(image, k) for k in range(4)))
    transposed = image.transpose(1, 0, 2)
    assert seen("dihedral") == seen("flips") | seen("rotations") | named(transposed, transposed[::-1, ::-1])
    assert len(seen("dihedral")) == 8


@pytest.mark.parametrize("view", SQUARE, ids=str)
def test_undo_takes_a_view_back(view):
    image = picture(5, 7)
    maps = show(image, view).transpose(2, 0, 1).astype(np.float32)
    assert np.array_equal(undo(maps, view), image.transpose(2, 0, 1))


@pytest.mark.parametrize(("first", "second"), list(product(SQUARE, SQUARE)), ids=str)
def test_one_view_then_another(first, second):
    image = picture(4, 6)
    assert np.array_equal(show(show(image, first), second), show(image, first.then(second)))


def test_every_name_begins_with_the_image_as_it_is():
    assert all(views[0] == View() and len(set(views)) == len(views) for views in VIEWS.values())


def test_names_unite_and_factors_multiply():
    assert combine([]) == [View()]
    assert combine(["flips", "rotations"])[0] == View()
    assert len(combine(["flips", "rotations"])) == 6
    assert set(combine(["flips", "rotations"])) == set(VIEWS["flips"]) | set(VIEWS["rotations"])
    assert len(combine(["flips", "scales", "gray"])) == 4 + 2 + 1
    assert len(combine(["flips * scales*gray"])) == 4 * 3 * 2
    assert set(combine(["flips*rotations"])) == set(VIEWS["dihedral"])


@pytest.mark.parametrize("name", COLORS)
def test_colours_keep_shape_and_input(name):
    image = picture(20, 30)
    before = image.copy()
    found = show(image, View(color=name))
    assert found.shape == image.shape and found.dtype == np.uint8 and not np.array_equal(found, image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("zoom", [0.5, 0.75, 1, 1.5, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (40, 60)])
def test_maps_of_an_enlarged_image_come_back_in_place(zoom, shape):
    y, x = np.indices(shape)
    image = (np.stack([y, x, y + x], -1) * (2 if zoom >= 1 else 1)).astype(np.uint8)
    zoomed = zoom_image(image, zoom)
    assert zoomed.shape[:2] == tuple(max(round(n * zoom), 1) for n in shape)
    back = unzoom_maps(zoomed.transpose(2, 0, 1).astype(np.float32), shape)
    inner = np.s_[:, 3:-3, 3:-3]
    assert back.shape == (3, *shape)
    if min(shape) > 10:
        assert np.abs(back[inner] - image.transpose(2, 0, 1)[inner]).max() < 1.5


def test_the_settings_name_every_view():
    text = (Path(__file__).parent.parent / "config_default.ini").read_text(encoding="utf-8")
    comment = text[text.index("; Views averaged in prediction") : text.index("test_time_augment =")]
    assert all(re.search(rf"\b{name}\b", comment) for name in VIEWS)
