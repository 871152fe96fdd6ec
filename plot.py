"""Turn arrays into pictures: colours for label maps, overlays on images, titled panels side by side."""

from __future__ import annotations

import io
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from files import replacing
from labels import boundaries, color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from footprint import Block

Color = tuple[int, int, int]

# Okabe & Ito, Color Universal Design (2008): told apart with every common form of colour vision. The first
# four, which are all that most label maps need, also stay apart from each other when shaded.
SKY, YELLOW, VERMILLION, GREEN = (86, 180, 233), (240, 228, 66), (213, 94, 0), (0, 158, 115)
PURPLE, BLUE, ORANGE = (204, 121, 167), (0, 114, 178), (230, 159, 0)
PALETTE: tuple[Color, ...] = (SKY, YELLOW, VERMILLION, GREEN, PURPLE, BLUE, ORANGE)

TRUTH, PREDICTED, AGREED = SKY, VERMILLION, YELLOW  # the boundaries of `compare`

SHADE = 0.22  # how far, of 1, a nucleus may lie from its palette colour towards black or white
PANEL = 3.2  # inches; height of a panel
DPI = 150

FONT = 9  # points; what follows is of `draw_network`
LETTER, LINE = 0.071, 0.145  # inches; width of a wide letter of that font, and distance between lines
GUTTER, GAP = 0.26, 0.15  # inches between columns and between rows, where the arrows run
BAND = 0.5  # of a row, between strides


def palette(n: int) -> NDArray[np.uint8]:
    """List `n` colours fit for colour-blind readers.

    Parameters
    ----------
    n
        How many, 0 or more. Beyond the seven of `PALETTE` they come again, darker each time.

    Returns
    -------
    (n, 3) uint8, RGB.

    Raises
    ------
    ValueError
        If `n` is negative.
    """
    if n < 0:
        raise ValueError(f"palette of {n} colours: the number must not be negative")
    index = np.arange(n)
    darker = 0.65 ** (index // len(PALETTE))
    return np.round(np.array(PALETTE)[index % len(PALETTE)] * darker[:, None]).astype(np.uint8)


def colorize(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Paint a label map so that neighbours differ clearly.

    Nuclei that touch get different colours of the palette; the shade of that colour depends on the id, so
    that distant nuclei seldom look alike either.

    Parameters
    ----------
    labels
        (H, W) integers, 0 = background; gaps between ids are allowed.

    Returns
    -------
    (H, W, 3) uint8, RGB; background black.
    """
    return _colors(labels)[labels]


def overlay(image: NDArray[np.uint8], labels: NDArray[np.integer], alpha: float = 0.35) -> NDArray[np.uint8]:
    """Lay coloured nuclei over an image, each inside a crisp line.

    Parameters
    ----------
    image
        (H, W, 3) or (H, W) uint8.
    labels
        (H, W) integers, 0 = background.
    alpha
        Strength of the fill in [0, 1]: 0 leaves the lines alone, 1 hides the image under the nuclei.

    Returns
    -------
    (H, W, 3) uint8, RGB; background pixels are those of `image`.

    Raises
    ------
    ValueError
        If the two do not fit together, or `alpha` is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
    canvas = _rgb(image, labels)
    inside, edge, fill = labels > 0, boundaries(labels), colorize(labels)
    canvas[inside] = np.round(canvas[inside] * (1 - alpha) + fill[inside] * alpha)
    canvas[edge] = fill[edge]
    return canvas


def compare(image: NDArray[np.uint8], labels: NDArray[np.integer], truth: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Draw the boundaries of two label maps over an image.

    Parameters
    ----------
    image
        (H, W, 3) or (H, W) uint8.
    labels
        (H, W) integers; what was found, drawn in the colour `PREDICTED`.
    truth
        (H, W) integers; what is there, drawn in `TRUTH`. Boundary pixels of both are drawn in `AGREED`.

    Returns
    -------
    (H, W, 3) uint8, RGB.

    Raises
    ------
    ValueError
        If the three do not have the same height and width.
    """
    canvas = _rgb(image, labels, truth)
    found, true = boundaries(labels), boundaries(truth)
    for where, paint in ((true, TRUTH), (found, PREDICTED), (found & true, AGREED)):
        canvas[where] = paint
    return canvas


def heatmap(probs: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Show probabilities in a perceptually uniform map (magma), black at 0 and pale yellow at 1.

    Parameters
    ----------
    probs
        (H, W) float in [0, 1]; values beyond are clipped, NaN counts as 0.

    Returns
    -------
    (H, W, 3) uint8, RGB.
    """
    levels = np.round(np.clip(np.nan_to_num(probs, nan=0.0), 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_MAGMA)[..., ::-1])


def side_by_side(panels: Mapping[str, NDArray[Any]], title: str | None = None, columns: int | None = None) -> Figure:
    """Arrange arrays as titled panels.

    The figure is unknown to pyplot, so it needs no display and is freed when the caller drops it.

    Parameters
    ----------
    panels
        Title -> array. (H, W, 3) and (H, W) uint8 are images, (H, W) bool a mask, (H, W) float a map of
        probabilities, shown by `heatmap`, and (H, W) of any wider integer a label map, shown by `colorize`.
    title
        Stands above them all.
    columns
        Panels in a row; None puts all in one.

    Raises
    ------
    ValueError
        If there are no panels, a panel is none of these arrays, or `columns` is less than 1.
    """
    from matplotlib.figure import Figure

    if not panels or (columns is not None and columns < 1):
        raise ValueError(f"{len(panels)} panels in {columns} columns: at least one of each is needed")
    pictures = {name: _picture(name, array) for name, array in panels.items()}
    columns = min(columns or len(pictures), len(pictures))
    rows = -(-len(pictures) // columns)
    width = PANEL * max(np.clip(p.shape[1] / p.shape[0], 0.5, 2.5) for p in pictures.values())
    figure = Figure((columns * width, rows * (PANEL + 0.3) + 0.3 * bool(title)), DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, (name, picture) in zip(axes, pictures.items(), strict=False):
        ax.imshow(picture)
        ax.set_title(name, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def histograms(panels: Mapping[str, Mapping[str, NDArray[Any]]], title: str | None = None, bins: int = 40) -> Figure:
    """Draw a panel of histograms for each entry, a line a group.

    Each line is of the share of its own group, so that a rare kind is seen beside a frequent one. The axis is
    logarithmic where values span more than a factor of 20.

    Parameters
    ----------
    panels
        Title -> group -> values, at least one a group.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    colors = dict(zip(names, palette(max(len(names), 1)) / 255, strict=False))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure = Figure((columns * 1.6 * PANEL, rows * PANEL), DPI, layout="constrained")
    for ax, (name, groups) in zip(figure.subplots(rows, columns, squeeze=False).ravel(), panels.items(), strict=False):
        values = np.concatenate([np.empty(0), *groups.values()])
        low, high = (values.min(), values.max()) if values.size else (0, 1)
        wide = low > 0 and high > 20 * low
        edges = np.geomspace(low, high, bins + 1) if wide else np.linspace(low, high + (low == high), bins + 1)
        for group, found in groups.items():
            share = np.histogram(found, edges)[0] / len(found)
            ax.stairs(share, edges, color=colors[group], label=f"{group} ({len(found)})")
        ax.set_xscale("log" if wide else "linear")
        ax.set_title(name, fontsize=10)
        if groups:
            ax.legend(fontsize=7)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def show(figure: Figure, position: tuple[int, int] | None = None) -> bool:
    """Show a figure in the notebook cell or in a window; a window holds the program until it is closed.

    Parameters
    ----------
    figure
        As `side_by_side` makes it.
    position
        (x, y) of the window on the screen in pixels, where the window system lets programs choose.

    Returns
    -------
    False if there is neither notebook nor display; then nothing happened.
    """
    if _in_notebook():
        from IPython.display import Image, display

        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=figure.dpi)
        display(Image(stream.getvalue(), format="png"))  # the figure itself needs `%matplotlib` to be seen
        return True
    return _show_window(figure, position)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all, in place of what was there; folders are made."""
    with replacing(path) as stage:
        figure.savefig(stage, format="png", dpi=figure.dpi)


def _colors(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Colour of every id, (N + 1, 3) uint8, black for 0."""
    index = color(labels, n_colors=4)
    base = palette(max(index.max(), 1))[index - 1].astype(np.float32)
    golden = np.arange(len(index)) * 0.618034 % 1  # spreads consecutive ids over the shades
    shade = SHADE * (2 * golden[:, None] - 1)
    shaded = np.where(shade < 0, base * (1 + shade), base + (255 - base) * shade)
    shaded[0] = 0
    return np.round(shaded).astype(np.uint8)


def _rgb(image: NDArray[np.uint8], *maps: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Copy `image` as (H, W, 3), once it is sure that label maps fit on it."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; wanted uint8, (H, W, 3) or (H, W)")
    for labels in maps:
        if labels.shape != image.shape[:2]:
            raise ValueError(f"labels have shape {labels.shape}, the image {image.shape[:2]}; they must be equal")
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image.copy()


def _picture(name: str, array: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of whatever a panel may be."""
    if array.dtype == np.uint8 or array.ndim != 2:
        try:
            return _rgb(array)
        except ValueError as error:
            raise ValueError(f"panel '{name}': {error}") from error
    if array.dtype == bool:
        return _rgb(array.astype(np.uint8) * 255)
    return colorize(array) if np.issubdtype(array.dtype, np.integer) else heatmap(array)


def _in_notebook() -> bool:
    """Whether this is a Jupyter kernel; IPython in a terminal is not, for it shows no pictures."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None


def _show_window(figure: Figure, position: tuple[int, int] | None) -> bool:
    """Lend the figure to pyplot while its window is open; False where the backend has no windows."""
    from matplotlib import pyplot

    def adopt(*args: Any, **kwargs: Any) -> Figure:  # stands in for a class, so that no new figure is made
        return figure

    try:
        pyplot.figure(FigureClass=cast(Any, adopt))
    except ImportError:  # matplotlib's word for: a window toolkit was asked for, but there is no display
        return False
    try:
        if figure.canvas.required_interactive_framework is None:
            return False
        if position is not None:
            _move(getattr(figure.canvas.manager, "window", None), *position)
        pyplot.show()
        return True
    finally:
        pyplot.close(figure)


def _move(window: Any, x: int, y: int) -> None:
    if hasattr(window, "wm_geometry"):  # Tk
        window.wm_geometry(f"+{x}+{y}")
    elif hasattr(window, "move"):  # Qt, GTK 3
        window.move(x, y)


def draw_network(blocks: Sequence[Block], edges: Sequence[tuple[int, int]], title: str | None = None) -> Figure:
    """Draw the blocks of a network: what is further right comes later, what is further down is coarser.

    A box says what the block is and how many channels come out of it; the last ones say what they are called, too.
    Blocks of the same stride that could run at the same time, such as those of several decoders, lie one above the
    other. Dark arrows go to the next column, pale ones skip some.

    Parameters
    ----------
    blocks, edges
        As `footprint.trace_blocks` gives them.
    title
        Stands above them all.

    Raises
    ------
    ValueError
        If there are no blocks.
    """
    from matplotlib.figure import Figure

    if not blocks:
        raise ValueError("0 blocks: a picture of a network needs at least one")
    inner = {source for source, _ in edges}
    labels = [_block_label(block, named=i not in inner) for i, block in enumerate(blocks)]
    longest, highest = max(len(line) for lines in labels for line in lines), max(map(len, labels))
    box = np.array([LETTER * longest + 0.12, LINE * (highest + 0.8)])
    columns = _block_columns(blocks, edges)
    centers = np.stack([columns, -_block_rows(blocks, columns)], axis=1) * (box + (GUTTER, GAP))
    low, high = centers.min(0) - box * (1.2, 1), centers.max(0) + box * (0.7, 1.7 if title else 1)
    figure = Figure(tuple(high - low), DPI)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    ax.set_axis_off()
    _draw_bands(ax, blocks, centers, box)
    for source, target in edges:
        _draw_edge(ax, centers[source], centers[target], box, columns[target] - columns[source] > 1)
    _draw_boxes(ax, blocks, labels, centers, box)
    if title:
        ax.text((low[0] + high[0]) / 2, high[1] - box[1] / 2, title, ha="center", va="center", fontsize=12)
    return figure


def _block_label(block: Block, named: bool) -> list[str]:
    """Lines of about a dozen letters; class names are cut before a capital."""
    lines = [""]
    for word in re.split(r"(?<=[a-z0-9])(?=[A-Z])", block.kind):
        if len(lines[-1] + word) > 12 and lines[-1]:
            lines.append("")
        lines[-1] += word
    names = [part for part in block.name.split(".") if not part.isdigit()]
    return [*(names[-1:] if named else []), *lines, str(block.shape[0])]


def _block_columns(blocks: Sequence[Block], edges: Sequence[tuple[int, int]]) -> NDArray[np.intp]:
    """Longest way from the image; pooling, which is coarser but no wider, hangs below what it pools."""
    columns = np.zeros(len(blocks), np.intp)
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        before, after = blocks[source], blocks[target]
        hangs = after.stride > before.stride and after.shape[0] == before.shape[0]
        columns[target] = max(columns[target], columns[source] + (not hangs))
    return columns


def _block_rows(blocks: Sequence[Block], columns: NDArray[np.intp]) -> NDArray[np.float64]:
    """Rows from above: a band a stride, as high as its fullest column; blocks centred in it."""
    levels = np.unique([block.stride for block in blocks], return_inverse=True)[1]
    places = defaultdict(list)
    for i, place in enumerate(zip(levels.tolist(), columns.tolist(), strict=True)):
        places[place].append(i)
    heights = np.zeros(levels.max() + 1)
    for (level, _), members in places.items():
        heights[level] = max(heights[level], len(members))
    middles = np.cumsum(heights + BAND) - heights / 2
    rows = np.zeros(len(blocks))
    for (level, _), members in places.items():
        rows[members] = middles[level] + np.arange(len(members)) - (len(members) - 1) / 2
    return rows


def _draw_bands(ax: Axes, blocks: Sequence[Block], centers: NDArray[np.float64], box: NDArray[np.float64]) -> None:
    """Name every stride at the left; every other one has a grey ground."""
    strides = np.array([block.stride for block in blocks])
    for number, stride in enumerate(np.unique(strides)):
        y = centers[strides == stride, 1]
        if number % 2 == 0:
            edge = (box[1] + GAP + BAND * (box[1] + GAP)) / 2
            ax.axhspan(y.min() - edge, y.max() + edge, color="0.96", linewidth=0, zorder=0)
        left = centers[:, 0].min() - box[0] * 0.65
        ax.text(left, (y.min() + y.max()) / 2, f"1/{stride}", ha="right", va="center", fontsize=FONT + 2, color="0.45")


def _draw_boxes(
    ax: Axes,
    blocks: Sequence[Block],
    labels: Sequence[Sequence[str]],
    centers: NDArray[np.float64],
    box: NDArray[np.float64],
) -> None:
    from matplotlib.patches import FancyBboxPatch

    kinds = [block.kind.rpartition(" x ")[2] for block in blocks]  # three of a kind look like one of it
    names = list(dict.fromkeys(kinds))
    colors = palette(len(names)) / 255
    width, height = box
    for kind, lines, (x, y) in zip(kinds, labels, centers, strict=True):
        color = colors[names.index(kind)]
        frame = FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, "round,pad=0,rounding_size=0.05", zorder=3
        )
        frame.set(facecolor=color * 0.4 + 0.6, edgecolor=color * 0.7, linewidth=0.8)
        ax.add_patch(frame)
        ax.text(x, y, "\n".join(lines), ha="center", va="center", fontsize=FONT, linespacing=1.1, zorder=4)


def _draw_edge(
    ax: Axes, source: NDArray[np.float64], target: NDArray[np.float64], box: NDArray[np.float64], skips: bool
) -> None:
    """An arrow that stays between the columns and, where it `skips` some, between the rows."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    line, bend = Curve.LINETO, Curve.CURVE4
    (x, y), (u, v) = source + (box[0] / 2, 0), target - (box[0] / 2, 0)
    if x > u:  # one above the other
        side = np.sign(source[1] - target[1]) * box[1] / 2
        points, codes = [(source[0], y - side), (target[0], v + side)], [line]
    elif not skips:
        points, codes = [(x, y), ((x + u) / 2, y), ((x + u) / 2, v), (u, v)], [bend] * 3
    else:
        bow, above = x + GUTTER / 2, v + (box[1] + GAP) / 2
        points = [(x, y), (bow, y), (bow, above), (x + GUTTER, above), (u, above)]
        points += [(target[0] - GAP, above), (target[0], above), (target[0], v + box[1] / 2)]
        codes = [bend] * 3 + [line] + [bend] * 3
    arrow = FancyArrowPatch(path=Curve(points, [Curve.MOVETO, *codes]), arrowstyle="-|>", mutation_scale=8)
    arrow.set(color="0.65" if skips else "0.2", zorder=1 if skips else 2)
    ax.add_patch(arrow)
