"""The piece room: what is cut, how it is written, and what it inherits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import piece as room
from image import Pixels, read_image, read_labels, read_pixels, write_pixels
from piece import Cut, crop_records, cut_pieces, rescale, starts
from record import Record, describe_records, find_records, read_table
from synthetic import write_dataset


@pytest.mark.parametrize(
    ("length", "width", "step", "wanted"),
    [(256, 256, 200, [0]), (100, 256, 200, [0]), (257, 256, 200, [0, 1]), (520, 256, 200, [0, 200, 264]),
     (656, 256, 200, [0, 200, 400]), (30, 10, 20, [0, 20])],
)  # fmt: skip
def test_pieces_begin_every_step_and_end_at_the_far_side(length, width, step, wanted):
    assert starts(length, width, step) == wanted


def sample(shape=(70, 90), dtype=np.uint16, channels=4) -> tuple[Pixels, np.ndarray]:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, (*shape, channels) if channels else shape).astype(dtype)
    labels = np.zeros(shape, np.int32)
    labels[5:15, 5:60], labels[40:44, 80:84] = 7, 9
    return Pixels(array, channels in (2, 4)), labels


def test_pieces_cover_the_image_and_are_named_by_their_corner():
    pixels, labels = sample()
    seen = np.zeros(labels.shape, bool)
    for piece in cut_pieces(Record("a", Path("a"), patient="7"), pixels, labels, Cut(25, 32)):
        name, x, y = piece.record.id.split("_")
        box = np.s_[int(y) : int(y) + 32, int(x) : int(x) + 32]
        assert np.array_equal(piece.pixels.array, pixels.array[box]) and np.array_equal(piece.labels, labels[box])
        assert (name, piece.record.patient, piece.record.origin, piece.pixels.alpha) == ("a", "7", "a", True)
        seen[box] = True
    assert seen.all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [0, 2, 3, 4])
def test_rescaling_keeps_type_and_channels(dtype, channels):
    pixels, labels = sample(dtype=dtype, channels=channels)
    half, few = rescale(pixels, labels, 0.5)
    assert half.array.dtype == dtype and half.array.shape == (35, 45, *pixels.array.shape[2:])
    assert half.array.mean() == pytest.approx(pixels.array.mean(), abs=0.6)
    assert np.array_equal(few, labels[1::2, 1::2])
    same, twice = rescale(Pixels(np.full((8, 9), 255, dtype), False), labels[:8, :9], 2)
    assert (same.array == 255).all() and np.array_equal(twice[::2, ::2], labels[:8, :9])


@pytest.fixture
def data(tmp_path) -> Path:
    """Two images of 60 x 80, one blank, and a table that knows the first two."""
    folder = tmp_path / "data"
    names = write_dataset(folder / "source", 2, shape=(60, 80))
    (folder / "source" / "blank" / "images").mkdir(parents=True)
    (folder / "source" / "blank" / "masks").mkdir()
    Image.new("L", (60, 60)).save(folder / "source" / "blank" / "images" / "blank.png")
    rows = [f"{name},Drawn,{name[:3]},{i}\n" for i, name in enumerate(names)]
    (folder / "dataset.csv").write_text("image_id,source,sub_category,patient\n" + "".join(rows))
    return folder


def crop(data: Path, cut: Cut = Cut(30, 40), **options) -> room.Tally:  # noqa: B008
    records = describe_records(find_records(data / "source"), read_table(data / "dataset.csv"))
    return crop_records(records, data / "source_crop", data / "dataset.csv", cut, **options)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pieces_are_written_whole_and_booked(data):
    tally = crop(data)
    table = read_table(data / "dataset.csv")
    pieces = describe_records(find_records(data / "source_crop"), table)
    assert len(pieces) == tally.pieces.total() == tally.n_booked > 6
    assert tally.n_empty + len(pieces) == 2 * 6 + 4 and tally.n_empty >= 4
    n_masks = 0
    for piece in pieces:
        origin, x, y = piece.id.rsplit("_", 2)
        whole = next(r for r in find_records(data / "source") if r.id == origin)
        box = np.s_[int(y) : int(y) + 40, int(x) : int(x) + 40]
        labels = read_labels(whole.masks, (60, 80))[box]
        found = read_labels(piece.masks, labels.shape)
        assert np.array_equal(found > 0, labels > 0)
        assert len(set(zip(found.ravel(), labels.ravel(), strict=True))) == len(np.unique(labels))
        assert np.array_equal(read_image(piece.image), read_image(whole.image)[box])
        assert (piece.origin, piece.patient, piece.source) == (origin, table[origin]["patient"], "Drawn")
        n_masks += len(piece.masks)
    assert n_masks == tally.cut_nuclei.total()


def test_a_dry_run_counts_the_same_and_writes_nothing(data):
    before = contents(data)
    dry = crop(data, dry_run=True)
    assert contents(data) == before and not (data / "source_crop").exists()
    wet = crop(data)
    assert (dry.pieces, dry.n_booked, dry.n_empty) == (wet.pieces, wet.n_booked, wet.n_empty)


def test_an_interrupted_run_goes_on_to_the_same_end(data, monkeypatch):
    crop(data)
    wanted = contents(data)
    for path in sorted((data / "source_crop").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    table = (data / "dataset.csv").read_text().splitlines()
    (data / "dataset.csv").write_text("\n".join(table[:3]) + "\n")
    write, n_left = room.write_piece, [3]

    def die(*args):
        n_left[0] -= 1
        if n_left[0] < 0:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(room, "write_piece", die)
    with pytest.raises(KeyboardInterrupt):
        crop(data)
    there = {path.name for path in (data / "source_crop").iterdir()} - {room.MARK}
    assert len(there) == 3 and there <= read_table(data / "dataset.csv").keys()  # never there without a row
    monkeypatch.undo()
    tally = crop(data)
    assert tally.n_there == 3
    found = contents(data)
    found.pop(Path("dataset.csv")), wanted.pop(Path("dataset.csv"))
    assert found == wanted
    before = contents(data)
    assert crop(data).n_booked == 0 and contents(data) == before


def test_other_pieces_and_other_things_stay(data):
    crop(data)
    before = contents(data)
    with pytest.raises(ValueError, match="holds pieces of step 30, width 40, scale 1, not of step 20"):
        crop(data, Cut(20, 40))
    assert contents(data) == before
    (data / "source_crop" / room.MARK).unlink()
    with pytest.raises(ValueError, match="things that are no pieces"):
        crop(data)


def test_a_name_that_is_taken_is_refused(data):
    first = read_table(data / "dataset.csv")
    with open(data / "dataset.csv", "a") as file:
        file.write(f"{next(iter(first))}_0_0,Mine,,\n")
    with pytest.raises(ValueError, match="rename that image"):
        crop(data)
    assert not list(data.glob("source_crop/[!.]*"))


def test_what_cannot_be_read_is_named_and_the_others_are_cut(data):
    image = next((data / "source").glob("fluor*/images/*"))
    image.write_bytes(image.read_bytes()[:90])
    (data / "source" / "blank" / "masks").rmdir()
    tally = crop(data)
    assert len(tally.refused) == 2
    assert "has no masks" in tally.refused[0] and str(image) in tally.refused[1]
    assert tally.pieces.total() > 0


@pytest.mark.parametrize("n", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("alpha", [False, True])
def test_pixels_are_kept_as_they_are(tmp_path, n, dtype, alpha):
    alpha = alpha and n in (2, 4)
    array = np.random.default_rng(0).integers(0, 250, (9, 7, n) if n else (9, 7)).astype(dtype)
    path = write_pixels(tmp_path, "a.b", Pixels(array, alpha))
    found = read_pixels(path)
    assert path.stem == "a.b" and found.alpha == alpha
    assert found.array.dtype == dtype and np.array_equal(found.array, array)


def test_sixteen_bit_label_maps_are_cut_too(tmp_path):
    pixels, labels = sample(channels=0)
    for name, array in (("images", pixels.array * 200), ("masks", labels.astype(np.uint16))):
        (tmp_path / "s" / name).mkdir(parents=True)
        for image_id in "ab":
            tifffile.imwrite(tmp_path / "s" / name / f"{image_id}.tif", array)
    tally = crop_records(find_records(tmp_path / "s"), tmp_path / "t", tmp_path / "d.csv", Cut(64, 64))
    pieces = find_records(tmp_path / "t")
    assert tally.pieces.total() == len(pieces) == 8 and tally.n_empty == 0
    assert all(read_pixels(piece.image).array.dtype == np.uint16 for piece in pieces)
    assert set(read_table(tmp_path / "d.csv")) == {piece.id for piece in pieces}
