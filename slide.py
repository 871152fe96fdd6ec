"""Images too large to hold: any region of a tiled TIFF, an OME-TIFF or a Zarr, as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from columns import one_line
from config import DEFAULT_POLICY, Policy
from image import TIFF_MAGIC, ImageError, find_range, has_alpha, pick_channels, to_uint8
from mosaic import N_PROBES, probe
from stain import see
from tile import Window

#: Pixels of the largest piece that a file may be stored in, so that a region can be read without the whole.
MOST_CHUNK = 2**25
#: More channels than that are rows or columns.
MOST_CHANNELS = 16


@dataclass(frozen=True)
class Slide:
    """An image on disk at its full resolution.

    Attributes
    ----------
    path : Path
    pixels : array
        Of zarr, or a memory map: whatever is sliced is read.
    channel : int or None
        Which axis of `pixels` the channels are; None of a gray image. The other two are rows and columns.
    alpha : bool
        The last channel is opacity.
    policy : tuple
        As `image.read_image` takes it.
    limits : (float, float) or None
        See `image.find_range`; the same for all regions, from samples all over the slide.
    """

    path: Path
    pixels: Any
    channel: int | None
    alpha: bool
    policy: Policy
    limits: tuple[float, float] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = (n for axis, n in enumerate(self.pixels.shape) if axis != self.channel)
        return height, width

    def read(self, window: Window) -> NDArray[np.uint8]:
        """The pixels of a window within the slide, (h, w, 3) uint8, as a network is to see them.

        Raises
        ------
        ImageError
            That part of the file is broken, or holds pixels that are not finite.
        """
        return see(to_uint8(self._pick(window), self.limits, self.path), self.policy[3])

    def _pick(self, window: Window) -> NDArray:
        """(h, w, 1) or (h, w, 3) as they are stored."""
        index: list[slice] = list(window.slices)
        if self.channel is not None:
            index.insert(self.channel, slice(None))
        try:
            array = np.asarray(self.pixels[tuple(index)])
        except Exception as error:  # every codec has errors of its own
            raise ImageError(f"{self.path}: rows {window.rows}, columns {window.columns}: {error}") from None
        array = array[..., None] if self.channel is None else np.moveaxis(array, self.channel, -1)
        return pick_channels(array[..., :-1] if self.alpha else array, self.policy[0], self.path)

    def sampled(self) -> Slide:
        """This slide with its limits; of many samples every so many-th pixel, so that they do not fill the memory."""
        places = probe(self.shape)
        step = ceil(sqrt(len(places)) / N_PROBES)
        samples = [np.array(self._pick(window)[::step, ::step]) for window in places]
        return Slide(
            self.path,
            self.pixels,
            self.channel,
            self.alpha,
            self.policy,
            find_range(samples, self.policy[1], self.policy[2], self.path),
        )


def open_slide(path: str | Path, policy: Policy = DEFAULT_POLICY) -> Slide:
    """Open an image without reading it.

    Parameters
    ----------
    path : path
        A TIFF (BigTIFF, OME-TIFF, planar or not; of a pyramid the full resolution), or a Zarr (an array; or a group,
        such as OME-Zarr, of which the largest array is taken).
    policy : tuple
        As `image.read_image` takes it. Percentiles are taken of samples all over the slide.

    Raises
    ------
    FileNotFoundError
        There is nothing.
    ImageError
        It is no such file, a stack, stored in one piece; or stains are to be normalized, which takes the whole image.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if policy[4] != "none":
        raise ImageError(f"{path}: [pre] stain_normalize = {policy[4]} takes a whole image; wanted none for a slide")
    try:
        pixels, axes, alpha = _open_zarr(path) if is_zarr(path) else _open_tiff(path)
    except ImageError:
        raise
    except Exception as error:  # of whatever reads it
        raise ImageError(f"{path}: not a slide that can be read: {one_line(error)}") from None
    chunk = prod(getattr(pixels, "chunks", (1,)))
    if chunk > MOST_CHUNK:
        raise ImageError(
            f"{path}: stored in pieces of {chunk / 1e6:.0f} MPix; save it tiled, as by tifffile tile=(512, 512)"
        )
    channel = next((i for i, axis in enumerate(axes) if axis in "SC"), None)
    return Slide(path, pixels, channel, alpha, policy).sampled()


def is_zarr(path: Path) -> bool:
    """Whether it is a folder of zarr, of either version."""
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def is_slide(path: Path, megapixels: float) -> bool:
    """Whether it is a Zarr, or a TIFF of more than so many megapixels; what cannot be read is none."""
    if is_zarr(path):
        return True
    try:
        with path.open("rb") as file:
            if not file.read(4).startswith(TIFF_MAGIC):
                return False
        with tifffile.TiffFile(path) as tiff:
            series = _largest(tiff)
            sides = [n for axis, n in zip(series.axes, series.shape, strict=True) if axis in "YX"]
    except Exception:  # of odd files tifffile raises what it likes; who reads them as images will say what is wrong
        return False
    return prod(sides) > megapixels * 1e6


def _largest(file: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """The series of most pixels: others are overviews, labels and photographs of the glass."""

    def pixels(series: tifffile.TiffPageSeries) -> int:
        return prod(n for axis, n in zip(series.axes, series.shape, strict=True) if axis in "YX")

    return max(file.series, key=pixels)


def _open_tiff(path: Path) -> tuple[Any, str, bool]:
    """Pixels, axes without those of one, and whether there is opacity."""
    with ExitStack() as stack:
        file = stack.enter_context(tifffile.TiffFile(path))
        series = _largest(file)
        level = series.levels[0]
        page = level.keyframe
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise ImageError(f"{path}: has a palette; save it as RGB")
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            raise ImageError(f"{path}: white is zero; save it with black as zero")
        mapped = page.is_memmappable and len(level.pages) == 1
        if mapped:
            pixels: Any = tifffile.memmap(path, series=file.series.index(series), level=0, mode="r")
        else:
            pixels = zarr.open(series.aszarr(level=0), mode="r")
        pixels, axes = _squeeze(path, pixels, level.axes)
        alpha = "S" in axes and has_alpha(page)
        if not mapped:
            stack.pop_all()  # it is read from later
        return pixels, axes, alpha


def _open_zarr(path: Path) -> tuple[Any, str, bool]:
    node: Any = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        return *_squeeze(path, node, _guess_axes(node.shape)), False
    arrays = [array for _, array in node.arrays()]
    if not arrays:
        raise ImageError(f"{path}: a group without arrays; name the array in it")
    array = max(arrays, key=lambda one: prod(one.shape))
    attributes: dict[str, Any] = dict(node.attrs)
    scales = attributes.get("ome", attributes).get("multiscales", [{}])[0]
    names = [axis["name"] if isinstance(axis, dict) else axis for axis in scales.get("axes", ())]
    axes = "".join(name[:1] for name in names).upper()  # c or channel, t or time
    axes = axes if len(axes) == array.ndim else _guess_axes(array.shape)
    return *_squeeze(path, array, axes), False


def _guess_axes(shape: Sequence[int]) -> str:
    """Of an array that does not say: few channels come first or last."""
    large = [n for n in shape if n > 1]
    if len(large) == 3 and min(large[0], large[2]) <= MOST_CHANNELS:
        letters = iter("CYX" if large[0] < large[2] else "YXC")
    else:
        letters = iter("YX" if len(large) == 2 else "QYX")
    return "".join(next(letters, "Q") if n > 1 else "Q" for n in shape)


class _Squeezed:
    """An array without its axes of one."""

    def __init__(self, array: Any, kept: Sequence[int]) -> None:
        self.array, self.kept = array, tuple(kept)
        self.shape = tuple(array.shape[axis] for axis in kept)
        self.chunks = getattr(array, "chunks", (1,))

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray:
        full: list[slice] = [slice(None)] * len(self.array.shape)
        for axis, part in zip(self.kept, index, strict=True):
            full[axis] = part
        array = np.asarray(self.array[tuple(full)])
        return array.reshape([n for axis, n in enumerate(array.shape) if axis in self.kept])


def _squeeze(path: Path, array: Any, axes: str) -> tuple[Any, str]:
    kept = [i for i, (axis, n) in enumerate(zip(axes, array.shape, strict=True)) if n > 1 or axis in "YX"]
    left = "".join(axes[i] for i in kept)
    if sorted(left.replace("S", "C")) not in (["X", "Y"], ["C", "X", "Y"]):
        raise ImageError(
            f"{path}: axes {left}, shape {tuple(array.shape)}; wanted one plane of rows, columns, channels"
        )
    return (array if len(kept) == len(array.shape) else _Squeezed(array, kept)), left
