"""The plot room: neighbours tell apart, overlays stay true to their arrays, figures reach disk and screen."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

import plot
from footprint import Block, trace_blocks
from labels import adjacency, boundaries
from model import build_model
from plot import colorize, compare, draw_network, heatmap, histograms, overlay, palette, save, show, side_by_side
from synthetic import draw_sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sample():
    return draw_sample(3, (128, 160), "dense")


def two_squares():
    labels = np.zeros((12, 20), np.int32)
    labels[2:10, 2:10], labels[2:10, 10:18] = 1, 2
    return labels


# Colours


def test_palette_has_as_many_colours_as_asked():
    for n in (0, 1, 4, 7, 20):
        colors = palette(n)
        assert colors.shape == (n, 3) and colors.dtype == np.uint8
        assert len({tuple(c) for c in colors.tolist()}) == n
    assert np.array_equal(palette(3), palette(9)[:3])
    with pytest.raises(ValueError, match="-1"):
        palette(-1)


def test_first_colours_part_under_colour_blindness():
    """Machado et al. 2009 (doi:10.1109/TVCG.2009.113), no red cones and no green cones at all."""
    protan = [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
    deutan = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    linear = (palette(4) / 255.0) ** 2.2
    for matrix in (np.eye(3), np.array(protan), np.array(deutan)):
        seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2) * 255
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=2)[np.triu_indices(4, 1)]
        assert apart.min() > 50


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_differ_clearly(seed):
    _, labels = draw_sample(seed, (128, 128), "dense", n_nuclei=80)
    pairs = adjacency(labels)
    assert len(pairs) > 20
    colors = plot._colors(labels).astype(float)
    assert np.linalg.norm(colors[pairs[:, 0]] - colors[pairs[:, 1]], axis=1).min() > 55


def test_colorize(sample):
    _, labels = sample
    painted = colorize(labels)
    assert painted.shape == (*labels.shape, 3) and painted.dtype == np.uint8
    assert (painted[labels == 0] == 0).all() and (painted[labels > 0].max(1) > 60).all()
    assert len(np.unique(painted[labels > 0], axis=0)) > 0.7 * labels.max()  # far nuclei differ as well
    for index in range(1, labels.max() + 1):
        assert len(np.unique(painted[labels == index], axis=0)) == 1


def test_colorize_takes_any_label_map():
    assert (colorize(np.zeros((4, 5), np.int32)) == 0).all()
    gaps = np.zeros((4, 5), np.uint16)
    gaps[0, 0], gaps[3, 4] = 7, 900
    assert (colorize(gaps).max(2) > 0).sum() == 2


# Overlays


def test_overlay_fills_and_outlines(sample):
    image, labels = sample
    before = image.copy()
    drawn, fill, edge = overlay(image, labels, 0.5), colorize(labels), boundaries(labels)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert np.array_equal(image, before)
    assert np.array_equal(drawn[labels == 0], image[labels == 0])
    assert np.array_equal(drawn[edge], fill[edge])
    inner = (labels > 0) & ~edge
    assert np.abs(drawn[inner] - (image[inner] / 2 + fill[inner] / 2)).max() <= 0.5


def test_overlay_alpha_zero_leaves_only_lines(sample):
    image, labels = sample
    inner = ~boundaries(labels)
    assert np.array_equal(overlay(image, labels, 0)[inner], image[inner])
    assert np.array_equal(overlay(image, labels, 1), np.where(labels[..., None] > 0, colorize(labels), image))


def test_overlay_of_gray_image():
    drawn = overlay(np.full((12, 20), 90, np.uint8), two_squares())
    assert drawn.shape == (12, 20, 3) and (drawn[0, 0] == 90).all()


def test_compare_colours_each_side():
    truth, found = np.zeros((12, 12), np.int32), np.zeros((12, 12), np.int32)
    truth[1:5, 1:5] = 1  # missed
    found[7:11, 7:11] = 1  # invented
    truth[1:5, 7:11], found[1:5, 7:11] = 2, 2  # right
    drawn = compare(np.full((12, 12, 3), 128, np.uint8), found, truth)
    assert tuple(drawn[1, 1]) == plot.TRUTH
    assert tuple(drawn[7, 7]) == plot.PREDICTED
    assert tuple(drawn[1, 7]) == plot.AGREED
    assert (drawn[2, 2] == 128).all() and (drawn[11, 0] == 128).all()


@pytest.mark.parametrize("function", [overlay, lambda image, labels: compare(image, labels, labels)])
def test_misfits_are_refused(function):
    labels = two_squares()
    with pytest.raises(ValueError, match=r"\(12, 20\).*\(20, 12\)"):
        function(np.zeros((20, 12, 3), np.uint8), labels)
    with pytest.raises(ValueError, match="float64"):
        function(np.zeros((12, 20, 3)), labels)
    with pytest.raises(ValueError, match="alpha is 35"):
        overlay(np.zeros((12, 20, 3), np.uint8), labels, 35)


def test_heatmap_rises_with_probability():
    ramp = heatmap(np.linspace(0, 1, 256, dtype=np.float32)[None])
    assert ramp.shape == (1, 256, 3) and ramp.dtype == np.uint8
    luminance = ramp[0] @ [0.2126, 0.7152, 0.0722]
    assert luminance[0] < 3 and luminance[-1] > 240 and np.diff(luminance).min() > -1
    assert ramp[0, 160, 0] > ramp[0, 160, 1]  # red before green: not BGR
    odd = heatmap(np.array([[-1, 2, np.nan]]))
    assert np.array_equal(odd[0], ramp[0, [0, 255, 0]])


# Figures


@pytest.fixture
def figure(sample):
    image, labels = sample
    probs = (labels > 0).astype(np.float32)
    return side_by_side({"image": image, "labels": labels, "semantic": probs, "mask": labels > 0}, "dense_0003")


def test_side_by_side_titles_and_grid(figure, sample):
    assert [ax.get_title() for ax in figure.axes] == ["image", "labels", "semantic", "mask"]
    assert figure.get_suptitle() == "dense_0003"
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (1, 4)
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert np.array_equal(shown[0], sample[0]) and np.array_equal(shown[1], colorize(sample[1]))
    grid = side_by_side({str(i): sample[0] for i in range(5)}, columns=3)
    assert grid.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 3)


def test_side_by_side_refuses_what_is_no_panel():
    with pytest.raises(ValueError, match="0 panels"):
        side_by_side({})
    with pytest.raises(ValueError, match="panel 'semantic'.*float32.*1, 4, 4"):
        side_by_side({"semantic": np.zeros((1, 4, 4), np.float32)})


def test_saved_figure_opens_and_shows_the_panels(figure, tmp_path):
    path = tmp_path / "new" / "folder" / "figure.png"
    save(figure, path)
    save(figure, path)
    with Image.open(path) as png:
        assert png.format == "PNG"
        pixels = np.array(png.convert("RGB"))
    assert pixels.shape[1] > 2.5 * pixels.shape[0]
    for part in np.array_split(pixels, 4, axis=1):  # each panel has dark ground and something on it
        assert part.min() < 30 and part.std() > 20
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_failed_save_keeps_the_old_file(figure, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(target, **options):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save(figure, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_figures_are_freed(sample):
    from matplotlib import pyplot

    figure = side_by_side({"image": sample[0]})
    watch = weakref.ref(figure)
    assert pyplot.get_fignums() == []
    del figure
    gc.collect()
    assert watch() is None


# Screens


def test_show_without_display(tmp_path):
    """In a process with neither display nor notebook: False, no output, matplotlib only when used."""
    code = (
        "import sys, numpy as np, plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figure = plot.side_by_side({'a': np.zeros((4, 4), np.uint8)})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert plot.show(figure) is False\n"
        "from matplotlib import pyplot\n"
        "assert pyplot.get_fignums() == []\n"
        "plot.save(figure, sys.argv[1])\n"
    )
    env = {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path), "MPLBACKEND": "agg", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "a.png"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_show_when_the_toolkit_cannot_load(figure, monkeypatch):
    from matplotlib import pyplot

    def fail(*args, **kwargs):
        raise ImportError("requires the 'qt' interactive framework, as 'headless' is currently running")

    monkeypatch.setattr(pyplot, "figure", fail)
    assert show(figure) is False


def test_show_in_a_window(figure, monkeypatch):
    """A stand-in for a window toolkit: the very figure is shown once, placed, then let go."""
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pyplot.switch_backend("agg")
    monkeypatch.setattr(FigureCanvasAgg, "required_interactive_framework", "tk")
    events = []
    window = SimpleNamespace(wm_geometry=events.append)
    monkeypatch.setattr("matplotlib.backend_bases.FigureManagerBase.window", window, raising=False)
    monkeypatch.setattr(pyplot, "show", lambda: events.append(pyplot.gcf()))
    assert show(figure, position=(40, 60)) is True
    assert events == ["+40+60", figure] and pyplot.get_fignums() == []


def test_show_in_a_notebook(figure, monkeypatch):
    shown = []
    shell = SimpleNamespace(kernel=object())
    display = SimpleNamespace(Image=lambda data, format: (format, data[:4]), display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert show(figure) is True
    assert shown == [("png", b"\x89PNG")]


# Networks


def unet_blocks(n_decoders):
    """Two strides, a skip and a head a decoder, as `trace_blocks` would give them."""
    blocks = [
        Block("image", "image", (3, 64, 64), 1),
        Block("encoder.stages.0", "ConvBlock", (16, 64, 64), 1),
        Block("encoder.pool", "MaxPool2d", (16, 32, 32), 2),
        Block("encoder.stages.1", "3 x InvertedResidual", (32, 32, 32), 2),
    ]
    edges = [(0, 1), (1, 2), (2, 3)]
    for number in range(n_decoders):
        up = len(blocks)
        blocks += [
            Block(f"decoders.{number}.up.0", "ConvTranspose2d", (16, 64, 64), 1),
            Block(f"decoders.{number}.blocks.0", "ConvBlock", (16, 64, 64), 1),
            Block(f"outputs.head_{number}", "Conv2d", (1, 64, 64), 1),
        ]
        edges += [(3, up), (1, up + 1), (up, up + 1), (up + 1, up + 2)]
    return blocks, edges


def drawn(figure):
    """Extents in pixels of the boxes, and the texts within them, in the order of the blocks."""
    (ax,) = figure.axes
    figure.draw_without_rendering()
    boxes = [p.get_window_extent() for p in ax.patches if isinstance(p, FancyBboxPatch)]
    texts = [t for t in ax.texts if t.get_zorder() == 4]
    return boxes, texts


@pytest.fixture(params=[1, 3, "camunet"])
def network(request):
    return trace_blocks(build_model("camunet")) if request.param == "camunet" else unet_blocks(request.param)


def test_boxes_lie_apart_and_hold_their_text(network):
    figure = draw_network(*network, "a title")
    boxes, texts = drawn(figure)
    assert len(boxes) == len(texts) == len(network[0])
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        text = texts[i].get_window_extent()
        assert box.x0 < text.x0 and text.x1 < box.x1 and box.y0 < text.y0 and text.y1 < box.y1
        assert figure.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1 and figure.bbox.y0 < box.y0
    title = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text() == "a title"]
    assert len(title) == 1 and not any(box.overlaps(title[0]) for box in boxes)


def test_arrows_run_between_the_boxes(network):
    figure = draw_network(*network)
    boxes, _ = drawn(figure)
    arrows = [p for p in figure.axes[0].patches if isinstance(p, FancyArrowPatch)]
    assert len(arrows) == len(network[1])
    for arrow in arrows:
        curve = figure.axes[0].transData.transform_path(arrow.get_path())
        ways = np.concatenate([piece(np.linspace(0, 1, 50)) for piece, _ in curve.iter_bezier()])
        for box in boxes:
            inner = box.padded(-2)
            assert not ((ways > inner.min) & (ways < inner.max)).all(axis=1).any()


def test_a_network_goes_down_and_comes_up():
    blocks, edges = unet_blocks(3)
    boxes, texts = drawn(draw_network(blocks, edges))
    (image, first, pool, deep, *_), ups, outputs = boxes, boxes[4::3], boxes[6::3]
    assert image.x1 < first.x0 and first.x0 == pool.x0 and pool.y1 < first.y0
    assert pool.x1 < deep.x0 and pool.y0 == deep.y0 and deep.y1 < min(box.y0 for box in ups)
    assert len({box.x0 for box in ups}) == 1 and ups[0].y0 > ups[1].y1 and ups[1].y0 > ups[2].y1
    assert min(box.x0 for box in outputs) == max(box.x0 for box in boxes)
    assert [text.get_text() for text in texts][2:7] == [
        "MaxPool2d\n16", "3 x Inverted\nResidual\n32", "Conv\nTranspose2d\n16", "ConvBlock\n16", "head_0\nConv2d\n1",
    ]  # fmt: skip


def test_skips_are_paler_and_kinds_have_a_colour():
    blocks, edges = unet_blocks(1)
    (ax,) = draw_network(blocks, edges).axes
    shades = [p.get_edgecolor()[0] for p in ax.patches if isinstance(p, FancyArrowPatch)]
    assert shades[edges.index((1, 5))] > 0.5 and sum(shade > 0.5 for shade in shades) == 1
    colors = [p.get_facecolor() for p in ax.patches if isinstance(p, FancyBboxPatch)]
    assert colors[1] == colors[5] and len(set(colors)) == len({block.kind for block in blocks})
    assert min(min(color) for color in colors) > 0.5  # black letters on it


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="0 blocks"):
        draw_network([], [])


def test_histograms_show_shares_of_each_group(tmp_path):
    panels = {"wide": {"a": np.array([1.0, 10, 1000]), "b": np.array([5.0])}, "one value": {"a": np.array([2.0, 2])}}
    figure = histograms(panels, title="all")
    wide, narrow = figure.axes
    assert (wide.get_xscale(), narrow.get_xscale()) == ("log", "linear")
    for ax in (wide, narrow):
        assert all(patch.get_data().values.sum() == pytest.approx(1) for patch in ax.patches)
    assert [text.get_text() for text in wide.get_legend().get_texts()] == ["a (3)", "b (1)"]
    save(figure, tmp_path / "h.png")
    assert histograms({"nothing": {}}).axes
