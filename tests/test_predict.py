"""The predict room: views, borders, sizes and ensembles add up; a network only ever sees what it asked for."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from candidate import FEATURES
from config import Config, Valid
from helper import DEFAULT_WEIGHTS, save_checkpoint
from labels import overlap_table, split_fragments
from metric import average_precision
from model import build_model
from postprocess import merge
from predict import Segmenter, load_segmenter, predict_each
from synthetic import draw_sample
from view import VIEWS, combine

CPU = torch.device("cpu")
HALF = {"semantic": 0.5, "contour": 0.5, "marker": 0.5}
ONCE = {"test_time_augment": (), "border": 0}
AS_IT_IS = {"nucleus_diameter": 0}


class Toy(nn.Module):
    """A network that is a function of its input; `seen` keeps what it was given."""

    def __init__(self, stride=1, **heads):
        super().__init__()
        self.heads, self.stride, self.functions, self.seen = tuple(heads), stride, heads, []
        self.active = self.heads

    def forward(self, image):
        self.seen.append(image.clone())
        x = image.float() / 255
        return {head: function(x) for head, function in self.functions.items()}


def brightness(x):
    return 4 * x.mean(1, keepdim=True) - 2


def blurred(x):
    """Turns and flips with its input."""
    return F.avg_pool2d(brightness(x), 3, stride=1, padding=1)


def ramp(x):
    """Knows where it is, and nothing of the image."""
    n_image = len(x)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in x.shape[-2:]), indexing="ij")
    return (0.3 * y - 0.2 * x + 0.05 * x * y - 1).expand(n_image, 1, -1, -1)


def constant(prob):
    return lambda x: torch.full((len(x), 1, *x.shape[-2:]), float(np.log(prob / (1 - prob))))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def predict(image, *networks, width=64, thresholds=HALF, **valid):
    valid = Valid(**{**ONCE, **valid})
    return merge(predict_each(image, networks, valid, width, CPU), thresholds, valid.ensemble, valid.ensemble_weights)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


SQUARE = ("flips", "rotations", "dihedral")
names = [views for n in (1, 2, 3) for views in combinations(SQUARE, n)]


@pytest.mark.parametrize("views", names, ids="+".join)
@pytest.mark.parametrize("function", [brightness, blurred])
def test_views_of_an_equivariant_network_agree(views, function):
    image = picture(13, 22)
    single = predict(image, Toy(semantic=function))["semantic"]
    toy = Toy(semantic=function)
    assert np.allclose(predict(image, toy, test_time_augment=views)["semantic"], single, atol=1e-6)
    assert sum(map(len, toy.seen)) == len({view for name in views for view in VIEWS[name]})  # each once
    assert len(toy.seen) <= 2  # in batches, one lying and one standing


@pytest.mark.parametrize("name", SQUARE)
def test_views_are_averaged_as_probabilities(name):
    image = picture(6, 9)
    expected = []
    for view in VIEWS[name]:
        turned = np.rot90(np.fliplr(image) if view.mirrored else image, view.turns)
        answer = sigmoid(ramp(torch.zeros(1, 3, *turned.shape[:2]))[0, 0].numpy())
        back = np.rot90(answer, -view.turns)
        expected.append(np.fliplr(back) if view.mirrored else back)
    found = predict(image, Toy(semantic=ramp), test_time_augment=(name,))["semantic"]
    assert found.dtype == np.float32
    assert np.allclose(found, np.mean(expected, axis=0), atol=1e-6)
    assert not np.allclose(found, expected[0], atol=1e-2)


def test_an_image_is_seen_at_every_scale_and_its_maps_come_back():
    image = np.zeros((40, 64, 3), np.uint8)
    image[10:30, 16:48] = 255
    toy = Toy(stride=8, semantic=brightness)
    found = predict(image, toy, test_time_augment=("scales",))["semantic"]
    assert [tuple(x.shape[-2:]) for x in toy.seen] == [(40, 64), (32, 48), (64, 96)]  # 30 x 48 and 60 x 96, padded
    assert found.shape == (40, 64)
    assert np.allclose(found[14:26, 20:44], sigmoid(2), atol=1e-3)
    assert np.allclose(found[:6], sigmoid(-2), atol=1e-3)


def test_a_view_in_other_colours_counts_as_much_as_any():
    image = picture(8, 8)
    found = predict(image, Toy(semantic=brightness), test_time_augment=("invert",))["semantic"]
    both = [sigmoid(4 * x.mean(2) / 255 - 2) for x in (image, 255 - image)]
    assert np.allclose(found, np.mean(both, axis=0), atol=1e-6)


@pytest.mark.parametrize(("budget", "most"), [(1, 1), (8 * 9 * 3, 3), (2**20, 8)])
def test_the_size_of_a_batch_changes_nothing(monkeypatch, budget, most):
    views = ("dihedral", "flips*equalize")
    expected = predict(picture(8, 9), Toy(semantic=blurred), test_time_augment=views)["semantic"]
    monkeypatch.setattr("predict.BATCH_PIXELS", budget)
    toy = Toy(semantic=blurred)
    assert np.allclose(predict(picture(8, 9), toy, test_time_augment=views)["semantic"], expected)
    assert max(map(len, toy.seen)) == most


@pytest.mark.parametrize(
    ("padding", "mode"),
    [
        ("reflect", {"mode": "reflect"}),
        ("replicate", {"mode": "edge"}),
        ("black", {"mode": "constant", "constant_values": 0}),
        ("white", {"mode": "constant", "constant_values": 255}),
    ],
)
@pytest.mark.parametrize(("border", "before"), [(0, 0), (3, 4), (4, 4), (5, 8)])
def test_border_is_padded_to_the_stride(padding, mode, border, before):
    image, toy = picture(5, 7), Toy(stride=4, semantic=brightness)
    found = predict(image, toy, padding=padding, border=border)["semantic"]
    expected = np.pad(image, ((before, before + 3), (before, before + 1), (0, 0)), **mode)
    (seen,) = toy.seen
    assert seen.dtype == torch.uint8
    assert np.array_equal(seen[0].permute(1, 2, 0).numpy(), expected)
    assert np.allclose(found, sigmoid(4 * image.mean(2) / 255 - 2), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (37, 21), (64, 64), (65, 33)])
@pytest.mark.parametrize("orig_size", [True, False])
def test_maps_have_the_size_of_the_image(shape, orig_size):
    torch.manual_seed(0)
    model = build_model("caunet").eval()
    found = predict(picture(*shape), model, width=32, border=8, pred_orig_size=orig_size, test_time_augment=("flips",))
    assert found.keys() == {"semantic", "contour"}
    for probs in found.values():
        assert probs.shape == shape
        assert probs.dtype == np.float32
        assert probs.min() >= 0
        assert probs.max() <= 1


def test_one_squeeze_to_the_width_and_back():
    image, toy = np.zeros((40, 24, 3), np.uint8), Toy(stride=16, semantic=brightness)
    image[20:] = 255
    found = predict(image, toy, width=32, pred_orig_size=False, border=32)["semantic"]
    assert toy.seen[0].shape == (1, 3, 32, 32)
    assert found.shape == (40, 24)
    assert np.allclose(found[:18], sigmoid(-2), atol=1e-6)
    assert np.allclose(found[22:], sigmoid(2), atol=1e-6)


def test_heads_are_averaged_over_the_networks_that_have_them():
    first = Toy(stride=4, semantic=constant(0.2))
    second = Toy(stride=16, contour=constant(0.9), semantic=constant(0.6))
    found = predict(picture(20, 20), first, second)
    assert np.allclose(found["semantic"], 0.4, atol=1e-6)
    assert np.allclose(found["contour"], 0.9, atol=1e-6)
    assert (first.seen[0].shape, second.seen[0].shape) == ((1, 3, 20, 20), (1, 3, 32, 32))  # each by its stride


def test_votes_are_the_share_of_networks_above_the_threshold():
    networks = [Toy(semantic=constant(p), marker=constant(p)) for p in (0.7, 0.35, 0.6)]
    thresholds = {"semantic": 0.5, "marker": 0.3, "contour": 0.5}
    found = predict(picture(3, 4), *networks, ensemble="vote", thresholds=thresholds)
    assert np.allclose(found["semantic"], 2 / 3)
    assert np.allclose(found["marker"], 1.0)
    assert np.allclose(predict(picture(3, 4), *networks)["semantic"], 0.55, atol=1e-6)


def test_networks_count_by_their_weight():
    networks = [
        Toy(semantic=constant(0.2), contour=constant(0.3)),
        Toy(semantic=constant(0.8)),
        Toy(marker=constant(0.9)),
    ]
    found = predict(picture(3, 4), *networks, ensemble_weights=(3, 1, 0))
    assert found.keys() == {"semantic", "contour"}
    assert np.allclose(found["semantic"], (3 * 0.2 + 0.8) / 4, atol=1e-6)
    assert np.allclose(found["contour"], 0.3, atol=1e-6)
    votes = predict(picture(3, 4), *networks, ensemble_weights=(3, 1, 0), ensemble="vote")
    assert np.allclose(votes["semantic"], 1 / 4)


def test_weights_are_one_for_each_checkpoint(tmp_path):
    save(tmp_path / "1.pkl", "unet", 1)
    config = Config.model_validate({"valid": {"ensemble_weights": (1, 2)}})
    with pytest.raises(ValueError, match="2 for 1 checkpoints"):
        load_segmenter([tmp_path / "1.pkl"], config)


def test_other_colours_are_views_of_rgb_alone(tmp_path):
    save(tmp_path / "1.pkl", "unet", 1, pre={"color_space": "lab"})
    for views in (("gray",), ("flips*equalize",)):
        with pytest.raises(ValueError, match="views of other colours"):
            load_segmenter([tmp_path / "1.pkl"], Config.model_validate({"valid": {"test_time_augment": views}}))


def test_networks_that_want_nuclei_of_another_size_make_no_ensemble(tmp_path):
    save(tmp_path / "1.pkl", "unet", 1)
    save(tmp_path / "2.pkl", "unet", 2, pre={"nucleus_diameter": 28})
    with pytest.raises(ValueError, match="no ensemble"):
        load_segmenter([tmp_path / "1.pkl", tmp_path / "2.pkl"], Config())


def test_same_image_same_maps():
    torch.manual_seed(0)
    model = build_model("camunet", dropout=0.5).eval()
    first, second = (predict(picture(40, 33), model, test_time_augment=("dihedral",)) for _ in range(2))
    assert all(np.array_equal(first[head], second[head]) for head in model.heads)


def test_unknown_view_is_refused():
    with pytest.raises(ValueError, match="unknown view 'flip'; did you mean 'flips'"):
        predict(picture(4, 4), Toy(semantic=brightness), test_time_augment=("flip",))


def test_segmenter_separates_bright_disks():
    y, x = np.mgrid[:40, :60]
    left, right = (np.hypot(y - 20, x - center) <= 9 for center in (21, 37))
    image = np.where((left | right)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    config = Config.model_validate({"valid": ONCE, "pre": AS_IT_IS})
    segmenter = Segmenter([Toy(semantic=brightness)], config, CPU, torch.float32)
    labels = segmenter(image)
    assert np.array_equal(segmenter.begin(image)[1]().labels, labels)
    assert labels.dtype == np.int32
    assert labels.max() == 2
    assert np.array_equal(labels > 0, left | right)
    assert len(np.unique(labels[left & (x < 28)])) == len(np.unique(labels[right & (x > 30)])) == 1


@pytest.mark.parametrize("detect", [True, False])
def test_undetected_contour_is_left_out(detect):
    config = Config.model_validate({"valid": ONCE, "pre": AS_IT_IS, "contour": {"detect": detect}})
    toy = Toy(semantic=constant(0.9), contour=constant(0.9))
    found = Segmenter([toy], config, CPU, torch.float32).probs(picture(8, 8))
    assert found.keys() == ({"semantic", "contour"} if detect else {"semantic"})


def save(path, name: str, seed: int, **settings) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_model(name)
    config = Config.model_validate({"pre": AS_IT_IS, **settings}).to_dict()
    state = {"model": name, "options": {}, "weights": model.state_dict(), "epoch": 1, "config": config}
    save_checkpoint(path, state)
    return model.eval()


def test_load_segmenter_mixes_checkpoints_and_inherits_from_the_first(tmp_path):
    one = save(tmp_path / "1.pkl", "unet", 1, param={"threshold": 0.3, "threshold_edge": 0.4}, default={"width": 48})
    two = save(tmp_path / "2.pkl", "caunet", 2, param={"threshold": 0.9})
    asked = Config.model_validate(
        {
            "param": {"threshold_edge": 0.8},
            "train": {"device": "cpu", "precision": "float32"},
            "valid": ONCE,
            "user_set": ["param.threshold_edge"],
        }
    )
    segmenter = load_segmenter([tmp_path / "1.pkl", tmp_path / "2.pkl"], asked)
    assert segmenter.config.thresholds["semantic"] == 0.3
    assert segmenter.config.thresholds["contour"] == 0.8
    assert segmenter.config.width == 48
    image = picture(32, 32)
    found, expected = segmenter.probs(image), predict(image, one, two)
    assert found.keys() == {"semantic", "contour"}
    assert all(np.allclose(found[head], expected[head], atol=1e-6) for head in found)


@pytest.mark.parametrize(("radius", "zoom"), [(5, 2.0), (7, 15 / 8), (8, 1.0), (13, 1.0), (28, 1.0), (31, 0.625)])
def test_nuclei_far_from_the_wanted_size_are_brought_to_it(radius, zoom):
    y, x = np.indices((100, 120))
    image = np.where(np.hypot(y - 50, x - 60) <= radius, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    toy = Toy(semantic=brightness, marker=brightness)
    config = Config.model_validate({"valid": ONCE, "pre": {"nucleus_diameter": 26}})
    segmenter = Segmenter([toy], config, CPU, torch.float32)
    assert segmenter.look(image)[0] == pytest.approx(zoom, rel=0.03)
    labels, probs = segmenter.predict(image)
    assert toy.seen[-1].shape[-2] == pytest.approx(100 * zoom, rel=0.03)  # the second look, after the first
    assert labels.shape == probs["semantic"].shape == (100, 120)
    assert labels.max() == 1 and (labels > 0).sum() == pytest.approx((image[..., 0] > 0).sum(), rel=0.05)


class Trusting:
    """A second opinion that expects as much as the network is sure."""

    def judge(self, features):
        return features[:, FEATURES.index("semantic")]


@pytest.mark.parametrize(("sure", "stays"), [(1.0, False), (0.8, False), (0.2, True)])
@pytest.mark.parametrize("tile", [0, 64])
def test_an_image_whose_zoom_promises_far_less_stays_as_it_is(sure, stays, tile, monkeypatch):
    """Of a huge one, samples are asked. Then all views of it are averaged, not the first look alone."""
    monkeypatch.setattr("mosaic.PROBE", 64)  # so that several samples fit into it

    def weaker_where_enlarged(x):
        return brightness(x) * (sure if ((x > 0) & (x < 1)).any() else 1.0)

    y, x = np.indices((240, 240)) % 40
    image = np.where(np.hypot(y - 20, x - 20) <= 5, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    toy = Toy(semantic=weaker_where_enlarged, marker=brightness, contour=ramp)
    valid = {"test_time_augment": ("flips",), "border": 0, "tile": tile, "tile_overlap": 16}
    config = Config.model_validate({"valid": valid, "pre": {"nucleus_diameter": 26}})
    segmenter = Segmenter([toy], config, CPU, torch.float32, opinion=Trusting())
    as_it_is = config.model_copy(update={"pre": config.pre.model_copy(update={"nucleus_diameter": 0.0})})
    expected, found = replace(segmenter, config=as_it_is).probs(image), segmenter.probs(image)
    assert all(np.allclose(found[head], expected[head], atol=1e-6) for head in toy.heads) == stays
    assert np.array_equal(segmenter(image), segmenter.separate(found).labels)


@pytest.mark.parametrize("views", [(), ("dihedral",), ("flips*scales",)])
def test_the_first_look_is_the_first_view(views):
    """Where the image stays as it is, no view is predicted twice, and the maps are those of all views."""
    toys = Toy(semantic=ramp, marker=blurred), Toy(semantic=brightness, color=by_side)
    valid = {"test_time_augment": views, "border": 8}
    config = Config.model_validate({"valid": valid, "pre": {"nucleus_diameter": 26}})
    without = config.model_copy(update={"pre": config.pre.model_copy(update={"nucleus_diameter": 0.0})})
    image = picture(40, 50)
    found, expected = (Segmenter(toys, c, CPU, torch.float32).members(image) for c in (config, without))
    looked, straight = (sum(len(x) for x in toy.seen) for toy in toys)
    assert looked == straight == 2 * len(combine(views))
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(np.allclose(one[head], other[head], atol=1e-6) for head in one)


def test_an_image_without_nuclei_stays_as_it_is():
    config = Config.model_validate({"valid": ONCE, "pre": {"nucleus_diameter": 26}})
    toy = Toy(semantic=constant(0.1))
    assert Segmenter([toy], config, CPU, torch.float32)(picture(20, 30)).max() == 0
    assert {tuple(x.shape[-2:]) for x in toy.seen} == {(20, 30)}


# Colours, contours alone, detectors


def by_side(x):
    """Four colours: the left half has the first, the right half the second, whatever is seen."""
    logits = torch.full((len(x), 4, *x.shape[-2:]), -4.0)
    middle = x.shape[-1] // 2
    logits[:, 0, :, :middle] = logits[:, 1, :, middle:] = 4.0
    return logits


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("ensemble", ["avg", "vote"])
def test_colours_are_those_of_one_network_and_one_view(views, ensemble):
    """Mirrored, left is right: a mean over views or networks would mix the colours."""
    image = picture(24, 32)
    toys = Toy(semantic=brightness, color=by_side), Toy(semantic=brightness, color=lambda x: by_side(x).flip(1))
    found = predict(image, *toys, test_time_augment=(views,), ensemble=ensemble, thresholds={**HALF, "color": 0.5})
    assert found["color"].shape == (4, 24, 32)
    assert np.allclose(found["color"], torch.sigmoid(by_side(torch.zeros(1, 3, 24, 32)))[0], atol=1e-6)


def test_maps_of_several_channels_are_regrown():
    found = predict(picture(40, 30), Toy(semantic=brightness, color=by_side), width=16, pred_orig_size=False)
    assert found["color"].shape == (4, 40, 30)
    assert found["color"][:, 20, 5].argmax() == 0 and found["color"][:, 20, 25].argmax() == 1


@pytest.mark.parametrize(
    ("contour", "expected"),
    [
        ({}, {"semantic": 2, "contour": 2}),
        ({"detect": False}, {"semantic": 2, "contour": 1}),
        ({"exclusive": True}, {"semantic": 1, "contour": 2}),
    ],
)
def test_each_network_of_an_ensemble_says_what_it_has_learned(contour, expected, tmp_path):
    one = save(tmp_path / "1.pkl", "caunet", 1)
    two = save(tmp_path / "2.pkl", "caunet", 2, contour=contour)
    asked = Config.model_validate({"train": {"device": "cpu", "precision": "float32"}, "valid": ONCE})
    for order in ((1, 2), (2, 1)):
        segmenter = load_segmenter([tmp_path / f"{i}.pkl" for i in order], asked)
        found, (a, b) = segmenter.probs(picture(32, 32)), (predict(picture(32, 32), network) for network in (one, two))
        for head, n in expected.items():
            assert np.allclose(found[head], (a[head] + b[head]) / 2 if n == 2 else a[head], atol=1e-6)


def test_a_network_of_contours_alone_finds_no_nuclei(tmp_path):
    save(tmp_path / "1.pkl", "caunet", 1, contour={"exclusive": True})
    with pytest.raises(ValueError, match="was trained on contours alone; name it beside another"):
        load_segmenter([tmp_path / "1.pkl"], Config())
    save(tmp_path / "2.pkl", "caunet", 2)
    asked = Config.model_validate({"contour": {"exclusive": True}})  # is for training; this one has learned both heads
    assert load_segmenter([tmp_path / "2.pkl"], asked).networks[0].active == ("semantic", "contour")


@pytest.mark.parametrize("orig_size", [True, False])
def test_a_detector_goes_its_own_way_to_instances(orig_size, monkeypatch):
    torch.manual_seed(0)
    model = build_model("maskrcnn").eval()
    settings = {"valid": {"pred_orig_size": orig_size}, "default": {"width": 64}, "post": {"min_score": 0.3}}
    seen = []

    def instances(image, score, threshold):
        seen.append((tuple(image.shape), score, threshold))
        labels = torch.zeros(image.shape[1:], dtype=torch.int32)
        labels[10:30, 10:30], labels[40:42, 40:42] = 5, 9  # the second is smaller than [post] min_object_size
        return labels, labels.clamp(max=1) * 0.9

    monkeypatch.setattr(model, "instances", instances)
    segmenter = Segmenter([model], Config.model_validate(settings), CPU, torch.float32)
    labels, probs = segmenter.predict(picture(96, 80))
    assert seen == [((3, 96, 80) if orig_size else (3, 64, 64), 0.3, 0.5)]
    assert labels.shape == probs["semantic"].shape == (96, 80)
    assert labels.dtype == np.int32 and probs.keys() == {"semantic"}
    assert labels.max() == 1
    assert (labels == 1).sum() == pytest.approx(20 * 20 if orig_size else 30 * 25, rel=0.1)


# Tiles


def tiled(**valid) -> Config:
    return Config.model_validate({"valid": {**ONCE, **valid}, "pre": AS_IT_IS})


def partners(true: np.ndarray, found: np.ndarray) -> float:
    """Share of the nuclei of one map that the other has, at an IoU of 0.9."""
    shared = overlap_table(true, found)
    union = shared.sum(1)[1:, None] + shared.sum(0)[1:] - shared[1:, 1:]
    return float(np.mean((shared[1:, 1:] >= 0.9 * union).any(1)))


@pytest.mark.parametrize(("touching", "least"), [(False, 0.99), (True, 0.96)])
def test_tiles_and_whole_find_the_same_nuclei(touching, least):
    image, _ = draw_sample(0, (1024, 1024), "fluorescence", 250, touching=touching)
    networks = load_segmenter([DEFAULT_WEIGHTS], Config()).networks
    config = Config.model_validate({"valid": {"test_time_augment": (), "tile": 0}, "pre": {"nucleus_diameter": 28}})
    whole = Segmenter(networks, config, CPU, torch.float32)
    valid = config.valid.model_copy(update={"tile": 640, "tile_overlap": 0})
    tiles = Segmenter(networks, config.model_copy(update={"valid": valid}), CPU, torch.float32)
    expected, found = whole(image), tiles(image)
    assert expected.max() > 150
    assert partners(expected, found) >= least and partners(found, expected) >= least


@pytest.mark.parametrize("views", [(), ("dihedral",), ("scales",), ("double",)])
def test_views_are_averaged_in_tiles_too(views):
    image, toy = picture(150, 90), Toy(stride=4, semantic=blurred)
    whole = Segmenter([toy], tiled(tile=0, test_time_augment=views, border=8), CPU, torch.float32).probs(image)
    toy.seen.clear()
    config = tiled(tile=64, tile_overlap=16, test_time_augment=views, border=8)
    found = Segmenter([toy], config, CPU, torch.float32).probs(image)
    assert max(max(x.shape[-2:]) for x in toy.seen) <= 64
    inner = np.s_[8:-8, 8:-8]
    assert np.allclose(found["semantic"][inner], whole["semantic"][inner], atol=0.02)


def test_the_overlap_is_what_the_widest_network_looks_at():
    def far(x):
        return F.avg_pool2d(brightness(x), 41, stride=1, padding=20)

    toys = Toy(semantic=brightness), Toy(semantic=far)
    alone, both = (Segmenter(networks, tiled(), CPU, torch.float32).overlap for networks in (toys[:1], toys))
    assert alone == 1 and 15 <= both <= 20


def test_of_a_huge_image_samples_are_looked_at(monkeypatch):
    y, x = np.indices((400, 400)) % 40
    image = np.where(np.hypot(y - 20, x - 20) <= 9, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    config = Config.model_validate({"valid": {**ONCE, "tile": 64}, "pre": {"nucleus_diameter": 34}})
    toy = Toy(semantic=brightness)
    zoom, _ = Segmenter([toy], config, CPU, torch.float32).look(image)
    assert zoom == pytest.approx(1.9, abs=0.1)
    assert sum(x.shape[-1] * x.shape[-2] for x in toy.seen) <= 9 * 64 * 64


def test_a_detector_is_tiled(monkeypatch):
    """It finds bright things; those that lie across tiles are one nucleus each."""
    torch.manual_seed(0)
    model = build_model("maskrcnn").eval()
    y, x = np.indices((200, 300))
    truth = np.zeros((200, 300), np.int32)
    for cy, cx in [(30, 30), (64, 64), (64, 128), (128, 200), (190, 290), (100, 96)]:
        truth[np.hypot(y - cy, x - cx) <= 8] = truth.max() + 1
    truth[150:156, 5:250] = truth.max() + 1  # longer than a tile
    shapes = []

    def instances(image, score, threshold):
        shapes.append(tuple(image.shape))
        labels = torch.from_numpy(split_fragments((image[0] > 0).int().numpy()))
        return labels, labels.clamp(max=1) * 0.9

    monkeypatch.setattr(model, "instances", instances)
    config = Config.model_validate({"valid": {"tile": 96, "tile_overlap": 32}})
    image = np.where(truth > 0, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    labels, probs = Segmenter([model], config, CPU, torch.float32).predict(image)
    assert max(max(shape[1:]) for shape in shapes) <= 96 and len(shapes) > 4
    assert labels.max() == truth.max() and partners(truth, labels) == 1
    assert np.array_equal(probs["semantic"] > 0, truth > 0)


@pytest.mark.parametrize(
    ("post", "heads"),
    [
        ({"policy": "rw", "marker": "marker", "marker_contour": 0}, ["semantic", "marker"]),
        ({"policy": "ws", "marker": "marker"}, ["semantic", "contour", "marker"]),
    ],
)
def test_for_labels_alone_heads_that_rules_do_not_read_are_left_out(post, heads):
    network = Toy(semantic=brightness, contour=constant(0.3), marker=blurred)
    config = Config.model_validate({"post": post, "pre": AS_IT_IS, "train": {"device": "cpu"}})
    whole = Segmenter([network], config, CPU, torch.float32)
    image, _ = draw_sample(0, (96, 96), "fluorescence", 8)
    (expected, _), (found, probs) = whole.predict(image), whole.for_labels().predict(image)
    assert list(probs) == heads
    assert np.array_equal(found, expected)
    assert network.active == ("semantic", "contour", "marker")


def test_for_labels_a_network_that_counts_nothing_lends_no_head():
    networks = [
        Toy(semantic=brightness, contour=constant(0.3)),
        Toy(semantic=brightness, contour=constant(0.3), marker=blurred),
    ]
    config = Config.model_validate(
        {"post": {"policy": "rw"}, "pre": AS_IT_IS, "valid": {"ensemble_weights": (1.0, 0.0)}}
    )
    whole = Segmenter(networks, config, CPU, torch.float32)
    image, _ = draw_sample(0, (96, 96), "fluorescence", 8)
    (expected, _), (found, _) = whole.predict(image), whole.for_labels().predict(image)
    assert np.array_equal(found, expected)


def test_a_network_that_knows_nothing_else_is_asked_all_the_same():
    networks = [Toy(semantic=brightness, marker=blurred), Toy(contour=constant(0.3))]
    config = Config.model_validate({"post": {"policy": "rw", "marker": "marker", "marker_contour": 0}})
    segmenter = Segmenter(networks, config, CPU, torch.float32)
    assert segmenter.for_labels() is segmenter


@pytest.mark.parametrize("path", sorted(DEFAULT_WEIGHTS.parent.glob("*.pkl")), ids=lambda path: path.name)
def test_weights_that_ship_are_small_and_find_nuclei(path):
    assert path.stat().st_size <= 20e6
    image, labels = draw_sample(3, (192, 192), "fluorescence")
    segmenter = load_segmenter([path], Config())
    assert segmenter.opinion is not None
    assert average_precision(labels, segmenter(image), [0.5])[0] > 0.6
    others = (draw_sample(seed, (128, 128), "fluorescence") for seed in (1, 2))
    assert np.mean([average_precision(labels, segmenter(image))[0] for image, labels in others]) > 0.7
