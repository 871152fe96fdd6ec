"""Any image or label file -> array, the policy that brings intensities to 8 bits, and the cache of what was decoded.

Decoded images and label maps are written once to disk and opened as memory maps from then on, so that all threads,
processes and later runs share one copy, and nothing is ever sent from one process to another.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from columns import one_line
from config import Policy
from files import replacing
from labels import compose, relabel
from png import decode_gray
from stain import see

logger = logging.getLogger(__name__)

PNG_MAGIC = b"\x89PNG"
#: Of compression: with this filter the lowest level makes files nearly as small as higher ones do, in half the time.
PNG_LEVEL, PNG_FILTER_SUB = 1, 0x10
PNG_PALETTE = 3  # colour type, byte 25
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: The least range of gray levels that `stretch` widens to the full one.
STRETCH_FLOOR = 16
_CACHE_FORMAT = 1


class ImageError(ValueError):
    """A file that cannot be used; the message names it."""


class Pixels(NamedTuple):
    """A decoded file: `array` is (H, W) or (H, W, C); `alpha` says that the last channel is opacity."""

    array: NDArray
    alpha: bool


def read_image(
    path: str | Path,
    channels: Sequence[int] = (),
    percentiles: tuple[float, float] = (0.1, 99.9),
    stretch: bool = False,
    color_space: str = "rgb",
    stain_normalize: str = "none",
) -> NDArray[np.uint8]:
    """Read an image as 8-bit RGB, or in the colours that a network is to see.

    8-bit pixels are taken as they are; 16-bit and float ones are scaled between two percentiles of the image. Gray
    becomes three equal channels, alpha is dropped.

    Parameters
    ----------
    path : path
        PNG, TIFF, JPEG, or whatever Pillow reads.
    channels : sequence of int, at most three
        Which channels become red, green, blue; one becomes gray, of two the third is black. Needed where an image has
        two, or more than three, that are no colours.
    percentiles : (float, float)
        Intensities that become 0 and 255.
    stretch : bool
        Scale 8-bit images too, so that a dim one shows a network as much as a bright one.
    color_space, stain_normalize : str
        Rows of `stain.SPACES` and `stain.NORMALIZERS`.

    Returns
    -------
    (H, W, 3) uint8

    Raises
    ------
    ImageError
        Unreadable or empty file, z or time stack, channels that cannot be guessed.
    """
    policy = Policy(tuple(channels), percentiles, stretch, color_space, stain_normalize)
    return as_seen(_decode(Path(path), picture=True), policy, path)


def as_seen(pixels: Pixels, policy: Policy, name: str | Path) -> NDArray[np.uint8]:
    """As `read_image`, of what is decoded already; errors call it `name`."""
    array, alpha = pixels
    if array.ndim == 2:
        array = array[..., None]
    if alpha:
        array = array[..., :-1]
    array = pick_channels(array, policy.channels, name)
    image = to_uint8(array, find_range([array], policy.percentiles, policy.stretch, name), name)
    return see(image, policy.color_space, policy.stain_normalize)


def read_pixels(path: str | Path) -> Pixels:
    """Read an image as it is stored: all channels, alpha too, in its own type. A palette becomes colours.

    Raises
    ------
    ImageError
        Unreadable or empty file, z or time stack.
    """
    return _decode(Path(path), picture=True)


def write_pixels(folder: Path, name: str, pixels: Pixels) -> Path:
    """Write what `read_pixels` gave without loss: as PNG where that can hold it, else as TIFF.

    Parameters
    ----------
    folder, name : path, str
        The file is ``<folder>/<name>.png`` or ``.tif``; the folder must be there.

    Returns
    -------
    path
    """
    array = pixels.array.astype(np.uint8) * np.uint8(255) if pixels.array.dtype == bool else pixels.array
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    n_colors = (1 if array.ndim == 2 else array.shape[-1]) - pixels.alpha
    if array.dtype in (np.uint8, np.uint16) and n_colors in (1, 3):
        path = folder / f"{name}.png"
        path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(array), level=PNG_LEVEL, filter=PNG_FILTER_SUB))
        return path
    path = folder / f"{name}.tif"
    tifffile.imwrite(
        path,
        array,
        compression="zlib",
        photometric="rgb" if n_colors == 3 else "minisblack",
        planarconfig="contig" if array.ndim == 3 else None,
        extrasamples=["UNASSALPHA"] if pixels.alpha else None,
        metadata=None,
    )
    return path


def read_labels(masks: Path | Sequence[Path], shape: tuple[int, int] | None = None) -> NDArray[np.int32]:
    """Read the nuclei of an image, from one label map or from one mask a nucleus.

    A pixel that several masks claim goes to the smallest of them (then a nucleus lying on a larger one survives),
    of equal ones to the first by file name. A mask is where its file exceeds half of its maximum; one without a
    pixel is skipped with a warning.

    Parameters
    ----------
    masks : path or sequence of paths
        A label map (0 is background), or one file per nucleus.
    shape : (int, int), optional
        Shape of the image, which every file must have. Needed where there may be no mask at all.

    Returns
    -------
    (H, W) int32
        Labels 1..N without gaps.

    Raises
    ------
    ImageError
        Unreadable file, or one of another shape than `shape`.
    """
    if isinstance(masks, Path):
        return _read_label_map(masks, shape)
    if not masks and shape is None:
        raise ImageError("no masks and no image shape: how large is the label map?")
    pixels = []
    for path in sorted(masks):
        mask = read_mask(path)
        shape = shape or mask.shape
        _check_shape(path, mask.shape, shape)
        inside = np.flatnonzero(mask)
        if inside.size:
            pixels.append(inside)
        else:
            logger.warning("%s: empty mask, skipped", path)
    assert shape is not None
    return relabel(compose(pixels, shape))


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Read the mask of one nucleus, (H, W) bool: where the file exceeds half of its maximum.

    Raises
    ------
    ImageError
        Unreadable or empty file.
    """
    array, alpha = _decode(path)
    if array.ndim == 3:
        array = array[..., :-1].max(axis=-1) if alpha else array.max(axis=-1)
    top = array.max(initial=0)
    # Of whole numbers the half is rounded down, which changes nothing, rather than all of them turned to float.
    return array > (top / 2 if array.dtype.kind == "f" else top // 2)


@dataclass(frozen=True)
class Cache:
    """Decoded images and label maps on disk.

    Parameters
    ----------
    folder : path
        Where the arrays lie; made when first needed.
    channels, percentiles, stretch, color_space, stain_normalize
        As in `read_image`; part of the key.

    Notes
    -----
    An entry is keyed by the paths, sizes and modification times of the files it comes from: a changed file is
    decoded again, and its old entry removed. Entries appear atomically, so several processes may fill one cache.
    """

    folder: Path
    channels: tuple[int, ...] = ()
    percentiles: tuple[float, float] = (0.1, 99.9)
    stretch: bool = False
    color_space: str = "rgb"
    stain_normalize: str = "none"
    _keys: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def _policy(self) -> tuple[tuple[int, ...], tuple[float, float], bool, str, str]:
        return self.channels, self.percentiles, self.stretch, self.color_space, self.stain_normalize

    def image(self, path: Path) -> NDArray[np.uint8]:
        """The image as `read_image` gives it, (H, W, 3) uint8, as a read-only memory map."""
        return self._open(path, [path], "image", lambda: read_image(path, *self._policy))

    def labels(self, path: Path, masks: Path | Sequence[Path]) -> NDArray[np.int32]:
        """The label map that belongs to the image at `path`, (H, W) int32, as a read-only memory map."""
        files = [path, masks] if isinstance(masks, Path) else [path, *masks]
        return self._open(path, files, "labels", lambda: read_labels(masks, self.image(path).shape[:2]))

    def _open(self, path: Path, files: Sequence[Path], kind: str, decode) -> NDArray:
        # A name is computed once a run: training must not read the time stamps of 29,000 masks in every epoch.
        memo = path / kind
        if memo not in self._keys:
            self._keys[memo] = self._name(path, files, kind)
        entry = self.folder / self._keys[memo]
        try:
            return np.load(entry, mmap_mode="r")
        except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
            self._store(entry, decode())
        return np.load(entry, mmap_mode="r")

    def _name(self, path: Path, files: Sequence[Path], kind: str) -> str:
        """`<2 digits>/<source>-<state of its files>.<kind>.npy`; entries of one source differ in the state alone."""
        policy = self._policy if kind == "image" else ()
        source = hashlib.sha1(repr((_CACHE_FORMAT, str(path.resolve()), *policy)).encode()).hexdigest()
        state = hashlib.sha1()
        for file in files:
            try:
                stat = os.stat(file)
            except FileNotFoundError:
                raise ImageError(f"{file}: no such file") from None
            state.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return f"{source[:2]}/{source[2:20]}-{state.hexdigest()[:20]}.{kind}.npy"

    def _store(self, entry: Path, array: NDArray) -> None:
        try:
            with replacing(entry) as stage, open(stage, "wb") as file:
                np.save(file, array)
        except OSError as error:
            raise OSError(f"cannot write the cache in {self.folder} ({error}); choose [dataset] cache_dir") from error
        source, kind = entry.name.split("-")[0], entry.name.split(".", 1)[1]
        for old in entry.parent.glob(f"{source}-*.{kind}"):
            if old != entry:
                old.unlink(missing_ok=True)


def _decode(path: Path, colors: bool = True, picture: bool = False) -> Pixels:
    """Decode a file; without `colors`, the indices of a palette stay as they are; of a `picture`, white is bright."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data:
        raise ImageError(f"{path}: empty file")
    try:
        if data.startswith(PNG_MAGIC) and (colors or data[25] != PNG_PALETTE):
            array = decode_gray(data)
            array = imagecodecs.png_decode(data) if array is None else array
            return Pixels(array, array.ndim == 3 and array.shape[-1] in (2, 4))
        if data.startswith(TIFF_MAGIC):
            return _decode_tiff(path, data, colors, picture)
        return _decode_other(data, colors)
    except ImageError:
        raise
    except Exception as error:  # every codec has errors of its own, and all of them mean the same to the user
        raise ImageError(f"{path}: not a readable image: {one_line(error)}") from None


def _decode_tiff(path: Path, data: bytes, colors: bool, picture: bool) -> Pixels:
    with tifffile.TiffFile(BytesIO(data)) as file:
        series = file.series[0]
        array = series.asarray()
        axes = series.axes
        page = file.pages.first
    kept = [axis for axis, n in zip(axes, array.shape, strict=True) if n > 1 or axis in "YX"]
    array = array.reshape([n for axis, n in zip(axes, array.shape, strict=True) if n > 1 or axis in "YX"])
    # Of one bit it is taken as it is: libraries write True and False so, and mean bright and dark.
    if picture and page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype != bool:
        if array.dtype.kind != "u":
            raise ImageError(f"{path}: white is zero, in {array.dtype}; save it with black as zero")
        array = (2**page.bitspersample - 1) - array
    if kept == ["Y", "X"]:
        if colors and page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
            array = (page.colormap >> 8).astype(np.uint8).T[array]  # of 16 bits, widened from 8
        return Pixels(array, False)
    if sorted(kept) in (["S", "X", "Y"], ["C", "X", "Y"]):
        channel = next(i for i, axis in enumerate(kept) if axis in "SC")
        return Pixels(np.moveaxis(array, channel, -1), "S" in kept and has_alpha(page))
    named = {"Z": "a z stack", "T": "a time series"}
    what = next((named[axis] for axis in kept if axis in named), "a stack of pages")
    raise ImageError(f"{path}: {what} (axes {''.join(kept)}, shape {array.shape}); save one plane of it")


def has_alpha(page: tifffile.TiffPage) -> bool:
    # A sample of unspecified meaning is opacity behind three colours, but a channel among others.
    named = page.extrasamples[-1:] not in ((), (tifffile.EXTRASAMPLE.UNSPECIFIED,))
    return named or bool(page.extrasamples) and page.photometric == tifffile.PHOTOMETRIC.RGB


def _decode_other(data: bytes, colors: bool) -> Pixels:
    with Image.open(BytesIO(data)) as file:
        plain = file.mode in {"L", "I", "F", "RGB"} or file.mode.startswith("I;16") or (file.mode == "P" and not colors)
        return Pixels(np.asarray(file if plain else file.convert("RGB")), False)


def pick_channels(array: NDArray, channels: Sequence[int], path: str | Path) -> NDArray:
    """(H, W, C) -> (H, W, 1) or (H, W, 3), as `read_image` says.

    Raises
    ------
    ImageError
        It has not those channels, or it cannot be guessed which are meant.
    """
    n = array.shape[-1]
    if channels:
        if not all(0 <= c < n for c in channels):
            raise ImageError(f"{path}: has {n} channels, [pre] channels = {', '.join(map(str, channels))}")
        array = array[..., list(channels)]
        if len(channels) == 2:
            array = np.concatenate([array, np.zeros_like(array[..., :1])], axis=-1)
    if array.shape[-1] not in (1, 3):
        raise ImageError(f"{path}: has {n} channels; say which are red, green and blue with [pre] channels = 0, 1, ...")
    return array


def find_range(
    arrays: Sequence[NDArray], percentiles: tuple[float, float], stretch: bool, path: str | Path
) -> tuple[float, float] | None:
    """The intensities that become black and white, None where 8-bit pixels stay as they are.

    Parameters
    ----------
    arrays : sequence of (h, w, C)
        All of an image, or samples of a large one.
    percentiles, stretch, path
        As in `read_image`.

    Raises
    ------
    ImageError
        There are pixels that are not finite.
    """
    narrow = arrays[0].dtype in (bool, np.uint8)
    if narrow and not stretch or arrays[0].dtype == bool:
        return None
    values = arrays[0] if len(arrays) == 1 else np.concatenate([array.ravel() for array in arrays])
    low, high = np.percentile(_finite(values, path), percentiles)
    # An 8-bit image that is all but flat shows noise, not nuclei: its range is not blown up beyond reason.
    return low, low + max(high - low, STRETCH_FLOOR if narrow else max(1e-6 * abs(low), 1e-12))


def to_uint8(array: NDArray, limits: tuple[float, float] | None, path: str | Path) -> NDArray[np.uint8]:
    """(H, W, 1) or (H, W, 3) of any type -> (H, W, 3) uint8, with the limits that `find_range` gave."""
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if limits is not None:
        low, high = limits
        array = np.rint(np.clip((_finite(array, path) - low) * (255.0 / (high - low)), 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _finite(array: NDArray, path: str | Path) -> NDArray[np.float32]:
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ImageError(f"{path}: has pixels that are not finite")
    return array


def _read_label_map(path: Path, shape: tuple[int, int] | None) -> NDArray[np.int32]:
    array, alpha = _decode(path, colors=False)
    if array.ndim == 3:
        array = array[..., :-1] if alpha else array
        if (array != array[..., :1]).any():
            raise ImageError(f"{path}: a label map has one channel, this has {array.shape[-1]}")
        array = array[..., 0]
    if array.dtype.kind == "f" and (array == np.rint(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "uib" or array.min(initial=0) < 0:
        raise ImageError(f"{path}: a label map holds whole numbers from 0, this is {array.dtype}")
    _check_shape(path, array.shape, shape or array.shape)
    return relabel(array)


def _check_shape(path: Path, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise ImageError(f"{path}: shape {tuple(found)}, image is {tuple(wanted)}; is this mask from another image?")
