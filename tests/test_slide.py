"""The slide room: any region of any large file, as the whole image would be read."""

from __future__ import annotations

import struct
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import tifffile
import zarr

import slide as room
from image import ImageError, read_image
from slide import is_slide, is_zarr, open_slide
from tile import Span, Window, whole

RGB = np.random.default_rng(0).integers(20, 200, (150, 220, 3), dtype=np.uint8)
SIXTEEN = RGB[..., 0].astype(np.uint16) * 150 + 300
PART = Window(Span(17, 90), Span(100, 203))
AS_IT_IS = ((), (0.1, 99.9), False, "rgb", "none")


def write_tiff(path, array, **options):
    tifffile.imwrite(path, array, tile=(64, 64), **options)


def write_series(path, *arrays, **options):
    with tifffile.TiffWriter(path) as file:
        for array in arrays:
            file.write(array, tile=(64, 64), photometric="rgb", metadata=None, **options)


def write_pyramid(path, array, ome=False):
    with tifffile.TiffWriter(path, bigtiff=True, ome=ome) as file:
        file.write(array, subifds=1, tile=(64, 64), photometric="rgb")
        file.write(array[::2, ::2], subfiletype=1, tile=(64, 64), photometric="rgb")


def write_zarr(path, array, chunks):
    zarr.create_array(str(path), shape=array.shape, chunks=chunks, dtype=array.dtype)[:] = array


FORMS = {
    "tiled": lambda path: write_tiff(path, RGB, photometric="rgb", compression="zlib"),
    "bigtiff": lambda path: write_tiff(path, RGB, photometric="rgb", bigtiff=True),
    "planar": lambda path: write_tiff(path, RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
    "ome": lambda path: write_tiff(
        path, RGB.transpose(2, 0, 1), photometric="minisblack", metadata={"axes": "CYX"}, ome=True
    ),
    "ome stack of one": lambda path: write_tiff(
        path, RGB.transpose(2, 0, 1)[None, :, None], photometric="minisblack", metadata={"axes": "TCZYX"}, ome=True
    ),
    "pyramid": lambda path: write_pyramid(path, RGB),
    "strips": lambda path: tifffile.imwrite(path, RGB, photometric="rgb", rowsperstrip=10, compression="zlib"),
    "one piece": lambda path: tifffile.imwrite(path, RGB, photometric="rgb"),
    "alpha": lambda path: write_tiff(
        path, np.dstack([RGB, RGB[..., :1]]), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "overview first": lambda path: write_series(path, RGB[::3, ::3], RGB, RGB[:20, :30]),
    "overview first, compressed": lambda path: write_series(path, RGB[::3, ::3], RGB, compression="zlib"),
    "ome pyramid": lambda path: write_pyramid(path, RGB, ome=True),
    "zarr": lambda path: write_zarr(path, RGB, (64, 64, 3)),
    "zarr, channels first": lambda path: write_zarr(path, RGB.transpose(2, 0, 1), (1, 64, 64)),
    "zarr, axes of one": lambda path: write_zarr(path, RGB.transpose(2, 0, 1)[None, :, None], (1, 3, 1, 64, 64)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_region_of_any_form(form, tmp_path):
    FORMS[form](tmp_path / "a.tif")
    slide = open_slide(tmp_path / "a.tif", AS_IT_IS)
    assert slide.shape == RGB.shape[:2]
    assert np.array_equal(slide.read(PART), RGB[PART.slices])
    assert np.array_equal(slide.read(whole(slide.shape)), RGB)


@pytest.mark.parametrize("array", [RGB, SIXTEEN, SIXTEEN / np.float32(7)], ids=["8 bit", "16 bit", "float"])
@pytest.mark.parametrize("stretch", [True, False])
def test_intensities_are_those_of_the_whole_image(array, stretch, tmp_path):
    photometric = "rgb" if array.ndim == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(64, 64), photometric=photometric)
    expected = read_image(tmp_path / "a.tif", stretch=stretch)
    slide = open_slide(tmp_path / "a.tif", ((), (0.1, 99.9), stretch, "rgb", "none"))
    assert np.array_equal(slide.read(PART), expected[PART.slices])


def test_a_large_slide_is_scaled_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic.PROBE", 16)
    write_tiff(tmp_path / "a.tif", SIXTEEN)
    found = open_slide(tmp_path / "a.tif").read(PART).astype(int)
    assert np.abs(found - read_image(tmp_path / "a.tif")[PART.slices]).max() <= 3


def test_tiles_of_jpeg_are_read(tmp_path):
    smooth = cv2.GaussianBlur(RGB, (0, 0), 6)
    write_tiff(tmp_path / "a.tif", smooth, photometric="rgb", compression="jpeg", compressionargs={"level": 95})
    slide = open_slide(tmp_path / "a.tif", AS_IT_IS)
    assert np.array_equal(slide.read(PART), read_image(tmp_path / "a.tif", stretch=False)[PART.slices])
    assert np.abs(slide.read(PART).astype(int) - smooth[PART.slices]).max() <= 12


def test_gray_with_opacity_is_read(tmp_path):
    gray = np.dstack([RGB[..., 0], np.full(RGB.shape[:2], 255, np.uint8)])
    write_tiff(tmp_path / "a.tif", gray, photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig")
    slide = open_slide(tmp_path / "a.tif", AS_IT_IS)
    assert np.array_equal(slide.read(PART), read_image(tmp_path / "a.tif", stretch=False)[PART.slices])
    assert np.array_equal(slide.read(PART)[..., 1], RGB[PART.slices][..., 0])


@pytest.mark.parametrize("error", [NotImplementedError, ElementTree.ParseError, KeyError, struct.error])
def test_an_odd_file_is_no_slide_and_is_named(error, tmp_path, monkeypatch):
    write_tiff(tmp_path / "a.tif", RGB, photometric="rgb")

    def odd(*args, **options):
        raise error("odd")

    monkeypatch.setattr(tifffile.TiffFile, "series", property(odd))
    assert not is_slide(tmp_path / "a.tif", 0.001)
    with pytest.raises(ImageError, match="a.tif: not a slide"):
        open_slide(tmp_path / "a.tif")


def test_the_limits_of_a_large_glass_know_of_the_tissue_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic.PROBE", 8)
    monkeypatch.setattr("mosaic.PROBE_STEP", 20)
    glass = np.full((1000, 1000), 60_000, np.uint16)
    glass[:, 505:530] = 9000  # between the places that eight along a side would be
    write_tiff(tmp_path / "a.tif", glass)
    low, high = open_slide(tmp_path / "a.tif").limits
    assert low == 9000 and high == 60_000


@pytest.mark.parametrize("names", ["cyx", ("channel", "y", "x")])
def test_ome_zarr_says_what_its_axes_are(tmp_path, names):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    narrow = RGB[:, :3].transpose(2, 0, 1)  # three channels, three columns
    for name, array in (("0", narrow), ("1", narrow[:, ::2])):
        group.create_array(name, shape=array.shape, chunks=(1, 64, 64), dtype=array.dtype)[:] = array
    axes = [{"name": name} for name in names]
    group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": [{"path": "0"}, {"path": "1"}]}]}
    slide = open_slide(tmp_path / "a.zarr", AS_IT_IS)
    assert np.array_equal(slide.read(whole(slide.shape)), RGB[:, :3])


def test_channels_are_chosen_and_colours_changed(tmp_path):
    write_tiff(tmp_path / "a.tif", np.dstack([RGB, RGB]).transpose(2, 0, 1), metadata={"axes": "CYX"}, ome=True)
    slide = open_slide(tmp_path / "a.tif", ((2, 0), (0, 100), False, "gray", "none"))
    expected = read_image(tmp_path / "a.tif", (2, 0), (0, 100), False, "gray")
    assert np.array_equal(slide.read(PART), expected[PART.slices])


def test_what_is_a_slide(tmp_path):
    write_tiff(tmp_path / "a.tif", RGB, photometric="rgb")
    write_zarr(tmp_path / "b.zarr", RGB, (64, 64, 3))
    (tmp_path / "c.tif").write_bytes(b"II*\0nothing")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    sizes = {0.03: (True, True, False, False), 0.04: (False, True, False, False)}
    for megapixels, expected in sizes.items():
        assert (
            tuple(is_slide(tmp_path / name, megapixels) for name in ("a.tif", "b.zarr", "c.tif", "d.png")) == expected
        )
    assert is_zarr(tmp_path / "b.zarr") and not is_zarr(tmp_path)


def test_what_is_refused_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="none.tif"):
        open_slide(tmp_path / "none.tif")
    (tmp_path / "a.tif").write_bytes(b"II*\0nothing")
    with pytest.raises(ImageError, match="a.tif: not a slide"):
        open_slide(tmp_path / "a.tif")
    write_tiff(tmp_path / "z.tif", np.zeros((5, 64, 64), np.uint8), metadata={"axes": "ZYX"}, photometric="minisblack")
    with pytest.raises(ImageError, match="axes ZYX"):
        open_slide(tmp_path / "z.tif")
    write_tiff(tmp_path / "w.tif", RGB[..., 0], photometric="miniswhite")
    with pytest.raises(ImageError, match="white is zero"):
        open_slide(tmp_path / "w.tif")
    write_tiff(tmp_path / "b.tif", RGB, photometric="rgb")
    with pytest.raises(ImageError, match="stain_normalize"):
        open_slide(tmp_path / "b.tif", ((), (0.1, 99.9), False, "rgb", "macenko"))
    monkeypatch.setattr(room, "MOST_CHUNK", 1000)
    with pytest.raises(ImageError, match="save it tiled"):
        open_slide(tmp_path / "b.tif")


def test_a_broken_tile_is_named(tmp_path):
    write_tiff(tmp_path / "a.tif", RGB, photometric="rgb", compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset = file.pages.first.dataoffsets[-1]
    slide = open_slide(tmp_path / "a.tif", AS_IT_IS)
    with (tmp_path / "a.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 40)
    with pytest.raises(ImageError, match="a.tif: rows"):
        slide.read(Window(Span(130, 150), Span(200, 220)))
