"""The tile room: spans cover once, weights add up to one, a nucleus is counted once wherever the cuts fall."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from labels import pile, split_fragments
from tile import Span, Window, blend, claim, cut_blocks, join, plan_strips, round_zoom, spread, whole


@pytest.mark.parametrize(("length", "side", "overlap", "step"), [(64, 64, 8, 8), (640, 256, 40, 32), (97, 20, 5, 1)])
def test_spans_cover_with_the_overlap_and_on_the_grid(length, side, overlap, step):
    spans = spread(length, side, overlap, step)
    assert spans[0].start == 0 and spans[-1].stop == length
    assert all(span.length <= side and span.start % step == span.length % step == 0 for span in spans)
    assert all(a.stop - b.start >= overlap for a, b in zip(spans, spans[1:], strict=False))
    assert len({span.length for span in spans}) == 1


def test_no_more_tiles_than_needed_and_none_larger_than_needed():
    assert spread(30, 64, 8) == [Span(0, 30)]
    assert spread(110, 100, 10) == [Span(0, 60), Span(50, 110)]


def test_tiles_that_share_all_they_have_are_refused():
    with pytest.raises(ValueError, match="wanted at least 32 more"):
        spread(1000, 128, 128, 32)


@pytest.mark.parametrize("overlap", [0, 1, 7, 30])
@pytest.mark.parametrize("length", [40, 41, 100, 333])
def test_weights_are_one_together_smooth_and_least_at_the_ends(length, overlap):
    spans = spread(length, 64, overlap)
    weights = blend(spans)
    total = np.zeros(length)
    for span, weight in zip(spans, weights, strict=True):
        assert weight.shape == (span.length,) and weight.min() > 0
        total[span.slice] += weight
    assert np.allclose(total, 1)
    if overlap == 30 and len(spans) > 1:
        assert weights[0][0] == 1 and weights[0][-1] < 0.01
        assert np.abs(np.diff(weights[0])).max() < 0.1


@pytest.mark.parametrize("sixteenths", [10, 13, 16, 20, 27, 32])
@pytest.mark.parametrize(("length", "border"), [(50, 20), (333, 20), (1000, 20), (1000, 320)])
def test_strips_of_an_enlarged_image_line_up(length, border, sixteenths):
    """A border may be wider than a tile."""
    zoom = Fraction(sixteenths, 16)
    strips = plan_strips(length, 256, 64, 32, border=border, zoom=zoom)
    total = np.zeros(length)
    for strip in strips:
        assert strip.view.length % 32 == 0 and strip.view.length <= 256
        assert strip.source.start * zoom % 1 == 0 and strip.source.length * zoom % 1 == 0
        assert strip.view.start >= 0 and strip.view.stop <= strip.source.length * zoom
        start = strip.source.start * zoom + strip.view.start  # in the enlarged image
        assert start % 32 == 0
        assert start + strip.crop.start == strip.target.start * zoom
        assert strip.crop.length == strip.grown * zoom
        assert 0 <= strip.crop.start <= strip.crop.stop <= strip.view.length
        total[strip.target.slice] += strip.weight
    assert np.allclose(total, 1)


def test_zooms_of_tiles_are_sixteenths():
    assert round_zoom(1.27) == Fraction(5, 4) and round_zoom(0.01) == Fraction(1, 16)


def test_blocks_cover_once():
    covered = np.zeros((70, 45), int)
    for block in cut_blocks(covered.shape, 32):
        covered[block.slices] += 1
    assert (covered == 1).all()


def test_windows_widen_as_far_as_the_image_and_meet():
    window = Window(Span(0, 10), Span(20, 30)).widen(4, (12, 40))
    assert window == Window(Span(0, 12), Span(16, 34))
    assert window.meet(Window(Span(11, 20), Span(0, 17))) == Window(Span(11, 12), Span(16, 17))
    assert window.meet(Window(Span(12, 20), Span(0, 17))) is None
    assert Window(Span(2, 3), Span(20, 30)).within(window) == (slice(2, 3), slice(4, 14))


def scene(shape=(120, 150)) -> np.ndarray:
    """Nuclei on the borders and corners of blocks of 32 pixels, and everywhere."""
    rng, y, x = np.random.default_rng(0), *np.indices(shape)
    labels = np.zeros(shape, np.int32)
    centers = [(32, 32), (64, 32), (32, 50), (96, 96), (0, 0), (119, 149), *rng.integers(0, shape, (60, 2)).tolist()]
    for cy, cx in centers:
        disk = np.hypot(y - cy, x - cx) <= 5
        if not labels[np.hypot(y - cy, x - cx) <= 7].any():
            labels[disk] = labels.max() + 1
    return labels


def see(truth: np.ndarray, window: Window) -> np.ndarray:
    return split_fragments(truth[window.slices])


def test_every_nucleus_is_claimed_by_one_block():
    truth = scene()
    written = np.zeros_like(truth)
    for core in cut_blocks(truth.shape, 32):
        window = core.widen(12, truth.shape)
        own, cut = claim(see(truth, window), window, core, truth.shape, written[window.slices])
        assert not cut
        written[window.slices][own > 0] = own[own > 0] + written.max()
    assert np.array_equal(written > 0, truth > 0)
    assert len(np.unique(np.stack([written[truth > 0], truth[truth > 0]]), axis=1).T) == truth.max() == written.max()


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_nucleus_that_blocks_see_differently_is_counted_once(shift):
    """Each of two blocks sees it a pixel further on its own side, or on the other's."""
    truth = np.zeros((40, 64), np.int32)
    truth[10:21, 27:37] = 1
    written = np.zeros_like(truth)
    found = 0
    for number, core in enumerate(cut_blocks(truth.shape, 32)):
        window = core.widen(16, truth.shape)
        seen = np.roll(truth, shift if number % 2 else -shift, axis=1)[window.slices]
        own, _ = claim(seen, window, core, truth.shape, written[window.slices])
        found += int(own.max())
        written[window.slices][own > 0] = found
    assert found == 1


@pytest.mark.parametrize("share", [0.4, 0.45, 0.49])
@pytest.mark.parametrize("shape", ["disk", "slanting", "long"])
def test_a_nucleus_of_which_a_block_has_written_a_part_is_counted_once(shape, share):
    y, x = np.indices((60, 64))
    across = {"disk": x, "slanting": x + y, "long": x}[shape]
    truth = np.hypot((y - 30) / (0.5 if shape == "long" else 1), x - 36) <= 12
    written = np.where(truth & (across < np.quantile(across[truth], share)), 7, 0)
    written[2:6, 2:6] = 3
    core = cut_blocks(truth.shape, 32)[1]
    window = core.widen(16, truth.shape)
    seen = truth.astype(np.int32)[window.slices]
    assert 0.3 < np.count_nonzero(written == 7) / truth.sum() < 0.5
    assert not claim(seen, window, core, truth.shape, written[window.slices])[0].any()


def test_what_touches_a_written_nucleus_or_holds_a_speck_is_a_nucleus_all_the_same():
    y, x = np.indices((60, 90))
    left, right = (np.hypot(y - 16, x - cx) <= r for cx, r in ((24, 9), (40, 10)))
    core = cut_blocks(left.shape, 32)[1]
    window = core.widen(16, left.shape)
    both = (left | right).astype(np.int32)[window.slices]
    own, _ = claim(both, window, core, left.shape, np.where(left & ~right, 5, 0)[window.slices])
    assert own.max() == 1
    own, _ = claim(both, window, core, left.shape, np.where(np.hypot(y - 16, x - 40) < 3, 5, 0)[window.slices])
    assert own.max() == 1


def test_a_nucleus_the_window_ends_in_asks_for_more():
    truth = np.zeros((20, 100), np.int32)
    truth[8:12, 5:60] = 1
    core = Window(Span(0, 20), Span(0, 40))
    none = np.zeros_like(truth)
    for halo, cut in ((5, True), (30, False)):
        window = core.widen(halo, truth.shape)
        assert claim(truth[window.slices], window, core, truth.shape, none[window.slices])[1] is cut
    at_the_end_of_the_image = np.where(np.arange(100) < 10, 1, 0) * np.ones((20, 1), int)
    assert not claim(at_the_end_of_the_image, whole((20, 100)), core, (20, 100), none)[1]


def test_tiles_of_a_long_nucleus_are_joined():
    truth = scene()
    truth[60:66] = truth.max() + 1  # across all tiles, longer than any
    truth = split_fragments(truth)
    canvas, n = np.zeros_like(truth), 0
    for core in cut_blocks(truth.shape, 32):
        window = core.widen(12, truth.shape)
        n = join(canvas, see(truth, window), window, core, n)
    assert np.array_equal(canvas > 0, truth > 0)
    assert len(np.unique(canvas)) == len(np.unique(truth))
    assert len(np.unique(np.stack([canvas, truth]).reshape(2, -1), axis=1).T) == len(np.unique(truth))


def test_piled_maps_count_as_one():
    piled = pile([np.array([[0, 7]]), np.array([[3], [0]])])
    assert np.array_equal(piled, [[0, 1], [2, 0], [0, 0]])
    assert pile([]).shape == (0, 0)
