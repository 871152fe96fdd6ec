"""The synthetic room: reproducible, exact, whole nuclei that touch or keep their distance as asked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from record import find_records
from synthetic import GAP, KINDS, MIN_AREA, Nucleus, draw_nucleus, draw_sample, write_dataset

SHAPE = (160, 208)
PALE = ("epithelium", "carcinoma", "gland")  # nuclei little darker than the bodies of their cells are among these
GLOWING = ("fluorescence", "dense", "thick", "layer", "palisade")
kinds = pytest.mark.parametrize("kind", KINDS)


def touching_pairs(labels):
    """Pairs of ids side by side, by the plain definition."""
    pairs = set()
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        both = (a != b) & (a > 0) & (b > 0)
        pairs |= {tuple(sorted(pair)) for pair in zip(a[both].tolist(), b[both].tolist(), strict=True)}
    return pairs


@kinds
def test_sample_is_reproducible(kind):
    image, labels = draw_sample(5, SHAPE, kind)
    np.random.rand(3)  # noqa: NPY002  the global state must not matter
    again, labels_again = draw_sample(5, SHAPE, kind)
    assert np.array_equal(image, again) and np.array_equal(labels, labels_again)
    other, _ = draw_sample(6, SHAPE, kind)
    assert not np.array_equal(image, other)


@kinds
@pytest.mark.parametrize("touching", [True, False])
def test_nuclei_are_whole_and_numbered(kind, touching):
    for seed in range(3):
        image, labels = draw_sample(seed, SHAPE, kind, touching=touching)
        assert image.shape == (*SHAPE, 3) and image.dtype == np.uint8
        assert labels.shape == SHAPE and labels.dtype == np.int32
        n = labels.max()
        assert n >= 1 and np.array_equal(np.unique(labels), np.arange(n + 1))
        assert np.bincount(labels.ravel())[1:].min() >= MIN_AREA
        assert all(ndimage.label(labels == index)[1] == 1 for index in range(1, n + 1))


@kinds
def test_clusters_touch_unless_told_otherwise(kind):
    assert any(touching_pairs(draw_sample(seed, SHAPE, kind)[1]) for seed in range(4))


@kinds
def test_gap_is_kept(kind):
    _, labels = draw_sample(2, SHAPE, kind, n_nuclei=25, touching=False)
    assert labels.max() >= 15
    for index in range(1, labels.max() + 1):
        near = ndimage.binary_dilation(labels == index, np.ones((3, 3)), iterations=GAP)
        assert set(np.unique(labels[near])) <= {0, index}


@kinds
def test_image_shows_its_nuclei(kind):
    """Nuclei stand out from the ground by far more than the noise, on their side of it."""
    image, labels = draw_sample(1, SHAPE, kind)
    gray = image.mean(2)
    difference = gray[labels > 0].mean() - gray[labels == 0].mean()
    least = {**dict.fromkeys(GLOWING, 8), **dict.fromkeys(PALE, 12)}.get(kind, 25)
    assert (difference if kind in GLOWING else -difference) > least
    if kind in (*GLOWING, "brightfield"):
        assert np.ptp(image, axis=2).max() == 0
    else:
        assert image[..., 2].mean() > image[..., 1].mean() + 20  # purple and pink have little green


@pytest.mark.parametrize(("flank", "least"), [(1.0, np.sin(np.pi / 2 - 0.3)), (0.0, 0.0)])
def test_nuclei_lie_along_the_flank_of_others(flank, least):
    """In a palisade the way from one to the next runs across their long axes; elsewhere anywhere."""
    rng, first = np.random.default_rng(1), Nucleus(50.0, 50.0, 12.0, 5.0, 0.4)
    row = KINDS["palisade"]._replace(cluster=1.0, flank=flank)
    placed = [draw_nucleus(rng, row, 7.0, np.ones((2, 100, 100), np.float32), [first], 0) for _ in range(200)]
    across = [abs(np.sin(np.arctan2(n.y - first.y, n.x - first.x) - first.angle)) for n in placed]
    assert min(across) >= least and (min(across) < 0.1) == (flank == 0)


def test_masks_are_exact():
    """The step in brightness lies on the border of the mask: shifting the mask makes the fit worse."""
    image, labels = draw_sample(4, (256, 256), "purple")
    dark, mask = 255.0 - image.mean(2), labels > 0
    fits = {
        (dy, dx): np.corrcoef(dark.ravel(), np.roll(mask, (dy, dx), (0, 1)).ravel())[0, 1]
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert max(fits, key=fits.get) == (0, 0)


def test_number_of_nuclei():
    image, labels = draw_sample(0, SHAPE, "tissue", n_nuclei=0)
    assert labels.max() == 0 and image.std() > 0
    assert draw_sample(0, SHAPE, "purple", n_nuclei=1)[1].max() == 1
    assert draw_sample(0, SHAPE, "purple", n_nuclei=7)[1].max() == 7
    assert draw_sample(0, (256, 256), "dense", n_nuclei=300)[1].max() == 300  # more than 8 bits hold


def test_full_image_ends():
    _, labels = draw_sample(0, (24, 24), "dense", n_nuclei=500)
    assert 1 <= labels.max() < 500


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (33, 17)])
@kinds
def test_odd_shapes(shape, kind):
    image, labels = draw_sample(0, shape, kind)
    assert image.shape == (*shape, 3) and labels.shape == shape


def test_seed_chooses_the_kind():
    image, labels = draw_sample(11, (64, 64))
    same = [kind for kind in KINDS if np.array_equal(draw_sample(11, (64, 64), kind)[0], image)]
    assert len(same) == 1
    sources = {
        kind for seed in range(40) for kind in KINDS
        if np.array_equal(draw_sample(seed, (8, 8))[0], draw_sample(seed, (8, 8), kind)[0])
    }  # fmt: skip
    assert sources == set(KINDS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"kind": "tisue"}, "tisue.*tissue"), ({"shape": (0, 5)}, "shape"), ({"n_nuclei": -1}, "n_nuclei -1"),
     ({"seed": -3}, "seed -3")],
)  # fmt: skip
def test_errors_name_the_fact(wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_sample(**{"seed": 0, **wrong})


def test_dataset_layout(tmp_path):
    ids = write_dataset(tmp_path / "deep" / "train", 6, seed=3, shape=(64, 80))
    assert ids[0] == "fluorescence_0000" and len(set(ids)) == 6
    assert sorted(path.name for path in (tmp_path / "deep" / "train").iterdir()) == sorted(ids)
    for name in ids:
        folder = tmp_path / "deep" / "train" / name
        (image,) = (folder / "images").iterdir()
        assert image.name == f"{name}.png" and np.array(Image.open(image)).shape == (64, 80, 3)
        masks = [np.array(Image.open(path)) for path in sorted((folder / "masks").iterdir())]
        assert masks and all(mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255} for mask in masks)
        assert sum((mask > 0).astype(int) for mask in masks).max() == 1  # no pixel has two owners


def test_dataset_is_stable_and_idempotent(tmp_path):
    def read(folder):
        return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}

    write_dataset(tmp_path / "a", 3, seed=1, shape=(48, 48))
    write_dataset(tmp_path / "b", 5, seed=1, shape=(48, 48))
    short, long = read(tmp_path / "a"), read(tmp_path / "b")
    assert short.items() <= long.items()

    own = tmp_path / "a" / "fluorescence_0000" / "images" / "fluorescence_0000.png"
    own.write_bytes(b"mine")
    assert len(write_dataset(tmp_path / "a", 5, seed=1, shape=(48, 48))) == 5
    assert own.read_bytes() == b"mine"
    assert {**read(tmp_path / "a"), own.relative_to(tmp_path / "a"): None} == {
        **long,
        own.relative_to(tmp_path / "a"): None,
    }


def test_dataset_without_masks(tmp_path):
    (name,) = write_dataset(tmp_path, 1, shape=(48, 48), masks=False)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["images"]


def test_half_written_image_is_redone(tmp_path):
    stale = tmp_path / ".fluorescence_0000.1-1.part" / "images"
    stale.mkdir(parents=True)
    (stale / "fluorescence_0000.png").write_bytes(b"half")
    write_dataset(tmp_path, 1, shape=(48, 48))
    assert [record.id for record in find_records(tmp_path)] == ["fluorescence_0000"]
