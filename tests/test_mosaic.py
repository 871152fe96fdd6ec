"""The mosaic room: tiles add up to what the whole image would give."""

from __future__ import annotations

from fractions import Fraction

import cv2
import numpy as np
import pytest

from mosaic import N_PROBES, PADDING, Mosaic, busiest, needs_tiles, probe, read_beyond
from tile import Span, Window, whole
from view import zoom_image


def picture(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


def mosaic(image, show, **options) -> Mosaic:
    settings = {"side": 64, "overlap": 16, "border": 8, "stride": 8, **options}
    return Mosaic(lambda window: image[window.slices], image.shape[:2], show, **settings)


def red(image):
    return [{"semantic": image[..., 0] / np.float32(255), "color": image.transpose(2, 0, 1) / np.float32(255)}]


@pytest.mark.parametrize("shape", [(200, 130), (64, 64), (33, 301), (5, 7)])
@pytest.mark.parametrize("padding", PADDING)
def test_what_looks_at_one_pixel_is_the_same_in_tiles(shape, padding):
    image = picture(*shape)
    (found,) = mosaic(image, red, padding=padding).all()
    assert found["semantic"].dtype == np.float32
    assert np.allclose(found["semantic"], image[..., 0] / 255, atol=1e-6)
    assert np.allclose(found["color"], image.transpose(2, 0, 1) / 255, atol=1e-6)


def test_no_view_is_larger_than_a_tile_and_all_lie_on_the_stride():
    seen = []

    def show(image):
        seen.append(image.shape)
        return red(image)

    mosaic(picture(200, 131), show).all()
    assert max(max(shape[:2]) for shape in seen) <= 64
    assert all(side % 8 == 0 for shape in seen for side in shape[:2])


@pytest.mark.parametrize("sixteenths", [10, 13, 20, 27, 32])
def test_an_enlarged_tile_is_a_piece_of_the_enlarged_image(sixteenths):
    image, zoom = picture(160, 192), Fraction(sixteenths, 16)
    enlarged, pieces = zoom_image(image, float(zoom)), mosaic(image, red, side=128, overlap=72, zoom=zoom)
    rows, columns = pieces.strips
    for y in rows:
        for x in columns:
            piece = read_beyond(pieces.read, Window(y.source, x.source), image.shape[:2], "reflect")
            view = zoom_image(piece, float(zoom))[y.view.slice, x.view.slice][y.crop.slice, x.crop.slice]
            top, left = (int(strip.target.start * zoom) for strip in (y, x))
            expected = enlarged[top : top + len(view), left : left + view.shape[1]]
            inner = np.s_[4 : len(expected) - 4, 4 : expected.shape[1] - 4]  # the border is continued before enlarging
            assert np.abs(view[inner].astype(int) - expected[inner]).max() <= 1


@pytest.mark.parametrize("sixteenths", [10, 20, 27])
def test_maps_of_an_enlarged_image_come_back(sixteenths):
    image = cv2.GaussianBlur(picture(160, 150), (0, 0), 6)
    (found,) = mosaic(image, red, side=128, overlap=72, zoom=Fraction(sixteenths, 16)).all()
    assert found["semantic"].shape == (160, 150)
    assert np.abs(found["semantic"] - image[..., 0] / 255).max() < 0.02


def test_no_seam_where_tiles_disagree():
    """Each tile answers with a number of its own: from one to the next the maps pass without a step."""
    answers = iter(np.linspace(0, 1, 100))

    def show(image):
        return [{"semantic": np.full(image.shape[:2], next(answers), np.float32)}]

    (found,) = mosaic(picture(40, 400), show, overlap=32).all()
    assert np.abs(np.diff(found["semantic"], axis=1)).max() < 0.06 * (found["semantic"].max() - found["semantic"].min())


def test_a_window_gets_what_the_whole_has_there():
    image, window = picture(200, 130), Window(Span(50, 111), Span(3, 90))
    pieces, asked = mosaic(image, red), []

    def get(index):
        asked.append(index)
        return pieces.tile(index)

    (part,) = pieces.blend(window, get)
    assert np.allclose(part["semantic"], pieces.all()[0]["semantic"][window.slices], atol=1e-6)
    assert asked == pieces.touching(window)
    assert set(asked) < set(pieces.touching(whole(image.shape[:2])))


def test_what_needs_tiles():
    assert needs_tiles((1000, 10), 1, 32, 1024)
    assert not needs_tiles((960, 960), 1, 32, 1024)
    assert needs_tiles((960, 960), 1.25, 32, 1024)
    assert not needs_tiles((9999, 9999), 2, 32, 0)


def test_probes_are_spread_and_few():
    places = probe((5000, 300))
    assert len(places) == N_PROBES
    assert all(place.shape == (256, 256) for place in places)
    assert probe((50, 60)) == [whole((50, 60))]


def test_a_narrow_piece_of_tissue_is_found_on_a_large_glass():
    shape, needle = (100_000, 90_000), Span(43_000, 46_000)
    places = probe(shape)
    assert any(needle.start <= place.columns.start and place.columns.stop <= needle.stop for place in places)
    starts = sorted({place.rows.start for place in places})
    assert max(np.diff(starts)) <= 2048 and starts[0] <= 1024 and starts[-1] + 256 >= shape[0] - 1024
    assert len(probe((16_384, 16_384))) == N_PROBES**2

    def read(window):
        columns = np.arange(*window.columns)
        tissue = np.where((columns >= needle.start) & (columns < needle.stop), columns % 2 * 90, 240)
        return np.broadcast_to(tissue[None, :, None], (*window.shape, 3)).astype(np.uint8)

    narrow = (4000, shape[1])
    assert all((sample == 90).any() for sample in busiest(read, narrow, 1000, 1))


def test_samples_are_where_the_image_differs():
    image = np.zeros((2000, 2000, 3), np.uint8)
    image[1500:1800, 200:500] = picture(300, 300)
    first, *others = busiest(lambda window: image[window.slices], image.shape[:2], 400, 3)
    assert first.shape == (400, 400, 3) and first.any()
    assert len(others) == 2 and sum(sample.astype(bool).sum() for sample in others) <= first.astype(bool).sum()
