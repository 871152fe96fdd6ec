"""Turn arrays into pictures: colours for label maps, overlays on images, titled panels side by side."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from files import replacing
from labels import boundaries, color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
