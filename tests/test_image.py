"""The image room: every kind of file, the intensity policy, label maps, and the cache."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import image as room
from image import Cache, ImageError, read_image, read_labels, read_mask

RGB = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
GRAY = RGB[..., 0]
ALPHA = RGB[..., 1:2]
GRAY_AS_RGB = np.repeat(GRAY[..., None], 3, axis=-1)
SIXTEEN = GRAY.astype(np.uint16) * 200 + 300


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)


def save_tiff(path, array, **options):
    tifffile.imwrite(path, array, **options)


def save_palette(path, colors=11):
    """An image of few colours; returns its indices and its colours, as Pillow sees them."""
    picture = Image.fromarray(RGB).quantize(colors)
    picture.save(path)
    return np.asarray(picture), np.asarray(picture.convert("RGB"))


def with_alpha(array):
    return np.concatenate([np.atleast_3d(array), ALPHA], axis=-1)


def scaled(array, low=0.1, high=99.9, floor=0.0):
    """The intensity policy in float64, from the sorted pixels: linear interpolation between order statistics."""
    pixels = np.sort(np.asarray(array, np.float64).ravel())
    black, white = (np.interp(p / 100 * (pixels.size - 1), np.arange(pixels.size), pixels) for p in (low, high))
    return np.clip((array - black) * 255.0 / max(white - black, floor), 0, 255)


# Kinds of files

EIGHT_BIT = {
    "gray.png": (save, GRAY, {}, GRAY_AS_RGB),
    "gray_alpha.png": (save, with_alpha(GRAY), {}, GRAY_AS_RGB),
    "rgb.png": (save, RGB, {}, RGB),
    "rgba.png": (save, with_alpha(RGB), {}, RGB),
    "1bit.png": (save, GRAY > 99, {}, np.where(GRAY_AS_RGB > 99, 255, 0)),
    "transparent.png": (save, RGB, {"transparency": tuple(RGB[0, 0].tolist())}, RGB),
    "gray.tif": (save_tiff, GRAY, {}, GRAY_AS_RGB),
    "gray_alpha.tif": (save_tiff, with_alpha(GRAY), {"extrasamples": ["unassalpha"]}, GRAY_AS_RGB),
    "rgb.tif": (save_tiff, RGB, {"photometric": "rgb"}, RGB),
    "rgb_lzw.tif": (save_tiff, RGB, {"photometric": "rgb", "compression": "lzw", "predictor": True}, RGB),
    "rgb_deflate.tiff": (save_tiff, RGB, {"photometric": "rgb", "compression": "zlib"}, RGB),
    "rgb_packbits.tif": (save_tiff, RGB, {"photometric": "rgb", "compression": "packbits"}, RGB),
    "rgb_zstd.tif": (save_tiff, RGB, {"photometric": "rgb", "compression": "zstd"}, RGB),
    "rgb_planes.tif": (save_tiff, np.moveaxis(RGB, -1, 0), {"photometric": "rgb", "planarconfig": "separate"}, RGB),
    "rgba.tif": (save_tiff, with_alpha(RGB), {"photometric": "rgb", "extrasamples": ["assocalpha"]}, RGB),
    "rgb_unnamed.tif": (save_tiff, with_alpha(RGB), {"photometric": "rgb", "extrasamples": ["unspecified"]}, RGB),
    "channels.tif": (save_tiff, np.moveaxis(RGB, -1, 0), {"imagej": True, "metadata": {"axes": "CYX"}}, RGB),
    "samples.tif": (save_tiff, RGB, {"photometric": "minisblack", "planarconfig": "contig"}, RGB),
    "one_page.tif": (save_tiff, GRAY[None, None], {"ome": True, "metadata": {"axes": "TZYX"}}, GRAY_AS_RGB),
    "white_is_zero.tif": (save_tiff, ~GRAY, {"photometric": "miniswhite"}, GRAY_AS_RGB),
    "1bit.tif": (save_tiff, GRAY > 99, {}, np.where(GRAY_AS_RGB > 99, 255, 0)),
    "1bit_fax.tif": (save, GRAY > 99, {"compression": "group4"}, np.where(GRAY_AS_RGB > 99, 255, 0)),
    "rgb.bmp": (save, RGB, {}, RGB),
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_pixels_are_taken_as_they_are(tmp_path, name):
    write, array, options, expected = EIGHT_BIT[name]
    write(tmp_path / name, array, **options)
    found = read_image(tmp_path / name)
    assert found.dtype == np.uint8 and found.shape == (9, 13, 3)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["palette.png", "palette.tif", "palette.bmp"])
def test_a_palette_becomes_its_colours(tmp_path, name):
    _, colors = save_palette(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name), colors)


def test_a_palette_of_few_bits(tmp_path):
    picture = Image.fromarray(RGB).quantize(4)
    picture.save(tmp_path / "a.png", bits=2)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path, mode):
    smooth = np.indices((32, 40)).sum(0).astype(np.uint8)
    Image.fromarray(np.stack([smooth, smooth * 2, 255 - smooth], -1)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")).astype(int)
    found = read_image(tmp_path / "a.jpg").astype(int)
    assert found.shape == (32, 40, 3)
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize(
    "array",
    [SIXTEEN, SIXTEEN.astype(">u2"), SIXTEEN.astype(np.int16) - 9000, SIXTEEN / np.float32(7), SIXTEEN / 3e9]
    + [RGB.astype(np.uint16) * 257, RGB.astype(np.uint32) << 24, RGB.astype(np.float32) / 255],
    ids=["16 bit", "big endian", "signed", "float", "double", "RGB 16", "RGB 32", "RGB float"],
)
def test_deep_tiff_is_scaled_between_percentiles(tmp_path, array):
    save_tiff(tmp_path / "a.tif", array, photometric="rgb" if array.ndim == 3 else "minisblack")
    expected = scaled(np.atleast_3d(array).astype(np.float64))
    found = read_image(tmp_path / "a.tif")
    assert found.dtype == np.uint8 and found.min() == 0 and found.max() == 255
    assert np.abs(found - expected).max() <= 0.51


def test_deep_png_is_scaled_between_percentiles(tmp_path):
    save(tmp_path / "a.png", SIXTEEN)
    assert np.abs(read_image(tmp_path / "a.png") - scaled(SIXTEEN)[..., None]).max() <= 0.51
    narrow = read_image(tmp_path / "a.png", percentiles=(10, 80))
    assert np.abs(narrow - scaled(SIXTEEN, 10, 80)[..., None]).max() <= 0.51
    assert not np.array_equal(narrow, read_image(tmp_path / "a.png"))


def test_a_hot_pixel_does_not_darken_a_deep_image(tmp_path):
    array = np.tile(np.arange(1000, 1200, dtype=np.uint16), (200, 1))
    array[7, 7] = 65535
    save_tiff(tmp_path / "a.tif", array)
    found = read_image(tmp_path / "a.tif")
    assert found[0, 0, 0] == 0 and found[0, -1, 0] >= 254 and 120 < found[0, 100, 0] < 136


def test_a_flat_deep_image_is_black_and_finite(tmp_path):
    save_tiff(tmp_path / "a.tif", np.full((5, 6), 777, np.uint16))
    assert not read_image(tmp_path / "a.tif").any()


def test_stretch_widens_a_dim_image(tmp_path):
    dim = (GRAY // 4 + 10).astype(np.uint8)
    save(tmp_path / "a.png", dim)
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], dim)
    found = read_image(tmp_path / "a.png", stretch=True)
    assert np.abs(found - scaled(dim)[..., None]).max() <= 0.51


def test_stretch_does_not_blow_up_noise(tmp_path):
    save(tmp_path / "a.png", (GRAY % 3 + 100).astype(np.uint8))  # a range of 2
    found = read_image(tmp_path / "a.png", stretch=True)
    assert found.min() == 0
    assert found.max() == round(2 * 255 / room.STRETCH_FLOOR)


# Channels and stacks


def test_channels_are_picked_in_order(tmp_path):
    save(tmp_path / "a.png", RGB)
    black = np.zeros_like(GRAY)
    assert np.array_equal(read_image(tmp_path / "a.png", channels=(2, 1, 0)), RGB[..., ::-1])
    assert np.array_equal(read_image(tmp_path / "a.png", channels=(2,)), np.stack([RGB[..., 2]] * 3, -1))
    assert np.array_equal(
        read_image(tmp_path / "a.png", channels=(1, 0)), np.stack([RGB[..., 1], RGB[..., 0], black], -1)
    )


FIVE = np.random.default_rng(1).integers(0, 256, (5, 9, 13), dtype=np.uint8)


@pytest.mark.parametrize("n", [2, 4, 5])
@pytest.mark.parametrize("interleaved", [True, False])
def test_channels_that_are_no_colours_must_be_picked(tmp_path, n, interleaved):
    path = tmp_path / "a.tif"
    if interleaved:
        save_tiff(path, np.moveaxis(FIVE[:n], 0, -1), photometric="minisblack", planarconfig="contig")
    else:
        save_tiff(path, FIVE[:n], imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(ImageError, match=rf"a\.tif: has {n} channels.*\[pre\] channels"):
        read_image(path)
    assert np.array_equal(read_image(path, channels=(n - 1, 0, 1)), np.moveaxis(FIVE[[n - 1, 0, 1]], 0, -1))


def test_a_channel_that_is_not_there(tmp_path):
    save(tmp_path / "a.png", with_alpha(RGB))
    with pytest.raises(ImageError, match=r"a\.png: has 3 channels, \[pre\] channels = 0, 3"):
        read_image(tmp_path / "a.png", channels=(0, 3))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"imagej": True, "metadata": {"axes": "ZYX"}}, "z stack"),
        ({"imagej": True, "metadata": {"axes": "TYX"}}, "time series"),
        ({"ome": True, "metadata": {"axes": "ZYX"}}, "z stack"),
        ({"ome": True, "metadata": {"axes": "TYX"}}, "time series"),
        ({"photometric": "minisblack"}, "stack of pages"),
    ],
)
def test_stacks_are_refused_by_name(tmp_path, options, what):
    save_tiff(tmp_path / "a.tif", FIVE, **options)
    with pytest.raises(ImageError, match=rf"a\.tif: a {what}.*\(5, 9, 13\)"):
        read_image(tmp_path / "a.tif")


# Bad files


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_a_truncated_file_is_named(tmp_path, name, share):
    noise = np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    save(tmp_path / name, noise)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageError, match=name):
        read_image(tmp_path / name)


def test_a_corrupt_file_is_named(tmp_path):
    save(tmp_path / "a.png", RGB)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[60:90] = bytes(30)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG", b"II*\0"], ids=["empty", "text", "PNG", "TIFF"])
@pytest.mark.parametrize("read", [read_image, read_labels, lambda path: read_labels([path])])
def test_what_is_no_image_is_named(tmp_path, content, read):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png"):
        read(tmp_path / "a.png")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=tmp_path.name):
        read_image(tmp_path)


def test_pixels_that_are_not_finite_are_refused(tmp_path):
    array = np.ones((4, 5), np.float32)
    array[2, 3] = np.nan
    save_tiff(tmp_path / "a.tif", array)
    with pytest.raises(ImageError, match=r"a\.tif.*not finite"):
        read_image(tmp_path / "a.tif")


# One mask a nucleus


def write_masks(folder: Path, **masks) -> list[Path]:
    paths = []
    for name, mask in masks.items():
        paths.append(folder / f"{name}.png")
        save(paths[-1], mask.astype(np.uint8) * 255)
    return paths


def box(top, left, bottom, right, shape=(12, 16)):
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_masks_become_labels_in_order_of_name(tmp_path):
    a, b = box(0, 0, 3, 4), box(5, 5, 9, 9)
    paths = write_masks(tmp_path, b=b, a=a)
    labels = read_labels(paths, (12, 16))
    assert labels.dtype == np.int32
    assert np.array_equal(labels, a * 1 + b * 2)


def test_of_overlapping_masks_the_smaller_wins(tmp_path):
    large, small = box(0, 0, 8, 8), box(2, 2, 4, 4)
    for names in (("a", "b"), ("b", "a")):
        paths = write_masks(tmp_path, **dict(zip(names, (large, small), strict=True)))
        labels = read_labels(paths)
        ids = {"a": 1, "b": 2}
        expected = np.where(small, ids[names[1]], large * ids[names[0]])
        assert np.array_equal(labels, expected)


def test_of_equal_masks_the_first_name_wins(tmp_path):
    a, b, c = box(0, 0, 4, 4), box(2, 2, 6, 6), box(4, 4, 8, 8)
    paths = write_masks(tmp_path, c=c, a=a, b=b)
    expected = np.select([a, b, c], [1, 2, 3])
    for order in (paths, paths[::-1], tuple(paths)):
        assert np.array_equal(read_labels(order), expected)


def test_a_mask_hidden_by_smaller_ones_leaves_no_gap(tmp_path):
    top, bottom, whole, other = box(0, 0, 2, 4), box(2, 0, 4, 4), box(0, 0, 4, 4), box(8, 8, 9, 9)
    labels = read_labels(write_masks(tmp_path, a=whole, b=top, c=bottom, d=other))
    assert np.array_equal(labels, np.select([top, bottom, other], [1, 2, 3]))


def test_an_empty_mask_is_skipped_with_a_warning(tmp_path, caplog):
    paths = write_masks(tmp_path, a=box(0, 0, 0, 0), b=box(1, 1, 3, 3))
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_labels(paths), box(1, 1, 3, 3) * 1)
    assert "a.png" in caplog.text and "b.png" not in caplog.text


def test_a_mask_is_where_its_file_exceeds_half_of_its_maximum(tmp_path):
    mask = box(1, 1, 4, 6)
    save(tmp_path / "bits.png", mask)
    save(tmp_path / "ones.png", mask.astype(np.uint8))
    save(tmp_path / "gray.png", np.where(mask, 200, 100).astype(np.uint8))
    save(tmp_path / "rgba.png", np.dstack([mask * 255] * 3 + [mask * 0 + 255]).astype(np.uint8))
    save_tiff(tmp_path / "deep.tif", mask.astype(np.uint16) * 65535)
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(read_labels([path]), mask * 1), path.name


def test_no_mask_at_all(tmp_path):
    labels = read_labels((), (3, 4))
    assert labels.shape == (3, 4) and labels.dtype == np.int32 and not labels.any()
    with pytest.raises(ImageError, match="shape"):
        read_labels(())


def test_a_mask_of_another_size_names_both_shapes(tmp_path):
    paths = write_masks(tmp_path, a=box(0, 0, 3, 3), b=box(0, 0, 3, 3, shape=(12, 20)))
    for shape in ((12, 16), None):
        with pytest.raises(ImageError, match=r"b\.png.*\(12, 20\).*\(12, 16\)"):
            read_labels(paths, shape)


def test_more_than_255_masks(tmp_path):
    expected = np.zeros((20, 15), np.int32)
    paths = []
    for i in range(300):
        expected.ravel()[i] = i + 1
        paths.append(tmp_path / f"{i:04d}.png")
        save(paths[-1], (expected == i + 1).astype(np.uint8) * 255)
    assert np.array_equal(read_labels(paths), expected)


# Label maps

IDS = np.zeros((9, 13), np.int64)
IDS[0, 0], IDS[2:4, 3:9], IDS[6:, 5:] = 300, 7, 65535
SEQUENTIAL = np.select([IDS == 7, IDS == 300, IDS == 65535], [1, 2, 3])


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.float32, ">u2"])
@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}], ids=["plain", "lzw"])
def test_label_map_tiff(tmp_path, dtype, options):
    save_tiff(tmp_path / "a.tif", IDS.astype(dtype), **options)
    labels = read_labels(tmp_path / "a.tif", (9, 13))
    assert labels.dtype == np.int32 and np.array_equal(labels, SEQUENTIAL)


def test_label_map_png_of_16_bits(tmp_path):
    save(tmp_path / "a.png", IDS.astype(np.uint16))
    assert np.array_equal(read_labels(tmp_path / "a.png"), SEQUENTIAL)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
@pytest.mark.parametrize("colors", ["random", "all black", "gray"])
def test_label_map_with_a_palette_means_its_indices(tmp_path, name, colors):
    indices = (IDS % 251).astype(np.uint8)
    palette = {
        "random": np.random.default_rng(3).integers(0, 256, 768),
        "all black": np.zeros(768, int),
        "gray": np.repeat(np.arange(256)[::-1], 3),
    }[colors]
    picture = Image.fromarray(indices)
    picture.putpalette(palette.astype(np.uint8).tobytes())
    assert picture.mode == "P"
    picture.save(tmp_path / name)
    ranks = np.searchsorted(np.unique(indices), indices)
    assert np.array_equal(read_labels(tmp_path / name), ranks)


def test_label_map_of_equal_channels(tmp_path):
    save(tmp_path / "a.png", np.dstack([(IDS % 251).astype(np.uint8)] * 3))
    assert read_labels(tmp_path / "a.png").max() == 3


@pytest.mark.parametrize(
    ("array", "why"),
    [(RGB, "one channel"), (IDS.astype(np.float32) / 7, "whole numbers"), (-IDS.astype(np.int32), "whole numbers")],
    ids=["colour", "fractions", "negative"],
)
def test_what_is_no_label_map_is_refused(tmp_path, array, why):
    save_tiff(tmp_path / "a.tif", array)
    with pytest.raises(ImageError, match=rf"a\.tif.*{why}"):
        read_labels(tmp_path / "a.tif")


def test_a_label_map_of_another_size_names_both_shapes(tmp_path):
    save(tmp_path / "a.png", IDS.astype(np.uint16))
    with pytest.raises(ImageError, match=r"a\.png.*\(9, 13\).*\(13, 9\)"):
        read_labels(tmp_path / "a.png", (13, 9))


# The cache


@pytest.fixture
def cached(tmp_path):
    """An image, two masks and a cache for them."""
    path = tmp_path / "a.png"
    save(path, np.full((12, 16, 3), 77, np.uint8))
    masks = write_masks(tmp_path, m1=box(0, 0, 3, 3), m2=box(5, 5, 9, 9))
    return path, tuple(masks), Cache(tmp_path / "deep" / "cache")


def entries(cache):
    return sorted(str(path.relative_to(cache.folder)) for path in cache.folder.rglob("*") if path.is_file())


def again(cache, **changes):
    """The same cache as a later run opens it."""
    options = {"channels": cache.channels, "percentiles": cache.percentiles, "stretch": cache.stretch, **changes}
    return Cache(cache.folder, **options)


def test_cache_gives_read_only_memory_maps(cached):
    path, masks, cache = cached
    image, labels = cache.image(path), cache.labels(path, masks)
    assert isinstance(image, np.memmap) and isinstance(labels, np.memmap)
    assert not image.flags.writeable and not labels.flags.writeable
    assert np.array_equal(image, read_image(path))
    assert np.array_equal(labels, read_labels(masks))
    assert len(entries(cache)) == 2


def test_cache_decodes_once(cached, monkeypatch):
    path, masks, cache = cached
    cache.image(path), cache.labels(path, masks)
    monkeypatch.setattr(room, "read_image", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(room, "read_labels", lambda *_: pytest.fail("decoded again"))
    for later in (cache, again(cache)):
        assert later.image(path)[0, 0, 0] == 77
        assert later.labels(path, masks).max() == 2


def test_cache_sees_a_changed_image_and_drops_the_old_entry(cached):
    path, masks, cache = cached
    cache.image(path), cache.labels(path, masks)
    before = entries(cache)
    save(path, np.full((12, 16, 3), 99, np.uint8))
    os.utime(path, ns=(1, 1))
    later = again(cache)
    assert later.image(path)[0, 0, 0] == 99
    assert np.array_equal(later.labels(path, masks), read_labels(masks))
    after = entries(cache)
    assert len(after) == 2 and not set(before) & set(after)


@pytest.mark.parametrize("change", ["edited", "removed", "renamed"])
def test_cache_sees_changed_masks(cached, change):
    path, masks, cache = cached
    cache.image(path), cache.labels(path, masks)
    before = entries(cache)
    if change == "edited":
        write_masks(masks[1].parent, m2=box(5, 5, 6, 6))
        os.utime(masks[1], ns=(1, 1))
    elif change == "removed":
        masks = masks[:1]
    else:
        masks = (masks[0].rename(masks[0].with_name("z.png")), masks[1])
    assert np.array_equal(again(cache).labels(path, masks), read_labels(masks))
    after = entries(cache)
    assert len(after) == 2 and len(set(before) & set(after)) == 1  # the image is the same


def test_caches_of_other_policies_do_not_collide(tmp_path):
    path = tmp_path / "a.tif"
    save_tiff(path, RGB.astype(np.uint16) * 100, photometric="rgb")
    folder = tmp_path / "cache"
    policies = [{}, {"percentiles": (5.0, 95.0)}, {"channels": (2, 1, 0)}, {"channels": (0,)}]
    for _ in range(2):
        for policy in policies:
            assert np.array_equal(Cache(folder, **policy).image(path), read_image(path, **policy))
    save(tmp_path / "b.png", RGB // 4)
    for stretch in (False, True, False):
        found = Cache(folder, stretch=stretch).image(tmp_path / "b.png")
        assert np.array_equal(found, read_image(tmp_path / "b.png", stretch=stretch))
    assert len(entries(Cache(folder))) == 6  # none drove another out


def test_images_of_one_name_do_not_collide(tmp_path):
    cache = Cache(tmp_path / "cache")
    for value, name in ((1, "x"), (2, "y")):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "a.png", np.full((4, 5), value, np.uint8))
        os.utime(tmp_path / name / "a.png", ns=(1, 1))
    assert [cache.image(tmp_path / name / "a.png")[0, 0, 0] for name in "xyx"] == [1, 2, 1]


@pytest.mark.parametrize("damage", [b"", b"not an array", None], ids=["empty", "text", "cut off"])
def test_an_unreadable_entry_is_decoded_again(cached, damage):
    path, _, cache = cached
    cache.image(path)
    entry = cache.folder / entries(cache)[0]
    entry.write_bytes(entry.read_bytes()[:-100] if damage is None else damage)
    assert np.array_equal(again(cache).image(path), read_image(path))
    assert entries(cache) == [str(entry.relative_to(cache.folder))]


def test_many_threads_fill_one_cache(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        save(path, np.full((30, 40), i, np.uint8))
    cache = Cache(tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: int(cache.image(paths[i % 4]).max()), range(64)))
    assert found == [i % 4 for i in range(64)]
    assert len(entries(cache)) == 4  # and nothing half-written


def test_a_bad_file_leaves_nothing_in_the_cache(cached):
    path, masks, cache = cached
    path.write_bytes(b"hello")
    with pytest.raises(ImageError, match=r"a\.png"):
        cache.labels(path, masks)
    assert not cache.folder.exists() or not entries(cache)
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        cache.image(path.with_name("gone.png"))


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    save(tmp_path / "a.png", GRAY)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cache_dir"):
        Cache(tmp_path / "file" / "cache").image(tmp_path / "a.png")


def test_white_is_zero_in_pictures_alone(tmp_path):
    """A mask or a label map that is stored so holds the numbers that it holds."""
    labels = np.zeros((9, 13), np.uint8)
    labels[2:5, 3:8] = 255
    save_tiff(tmp_path / "a.tif", labels, photometric="miniswhite")
    assert np.array_equal(read_mask(tmp_path / "a.tif"), labels > 0)
    assert np.array_equal(read_labels(tmp_path / "a.tif", (9, 13)) > 0, labels > 0)
    save_tiff(tmp_path / "b.tif", labels.astype(np.float32), photometric="miniswhite")
    with pytest.raises(ImageError, match="white is zero, in float32"):
        read_image(tmp_path / "b.tif")


def test_a_flat_image_of_large_numbers_is_black(tmp_path):
    save_tiff(tmp_path / "a.tif", np.full((9, 13), 20_000, np.uint16))
    assert not read_image(tmp_path / "a.tif").any()
