"""The loss room: every row of the table against a plain formula, at its limits, and under weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labels import adjacency
from loss import COLOR_REACH, LOSSES, MATCHERS, SIDE_FACTOR, Criterion, focal, imitate, match_colors, parse_terms
from synthetic import draw_sample

SHAPE = (2, 1, 4, 5)
every_loss = pytest.mark.parametrize("name", LOSSES)


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, SHAPE), (rng.random(SHAPE) < 0.4).astype(float), rng.uniform(0.5, 4, SHAPE)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def plain_bce(logits, target, weight):
    p = sigmoid(logits)
    return np.sum(-weight * (target * np.log(p) + (1 - target) * np.log(1 - p))) / weight.sum()


def plain_focal(logits, target, weight):
    """Equation 4 of Lin et al. 2017 with gamma = 2, pixel by pixel."""
    total = 0.0
    for x, t, w in zip(logits.flat, target.flat, weight.flat, strict=True):
        p_t = sigmoid(x) if t == 1 else 1 - sigmoid(x)
        total += -w * (1 - p_t) ** 2 * np.log(p_t)
    return total / weight.sum()


def plain_iou(logits, target, weight):
    values = []
    for p, t, w in zip(sigmoid(logits), target, weight, strict=True):
        w = w / w.mean()
        values.append(1 - ((p * t * w).sum() + 1) / (((p + t - p * t) * w).sum() + 1))
    return np.mean(values)


def plain_dice(logits, target, weight):
    values = []
    for p, t, w in zip(sigmoid(logits), target, weight, strict=True):
        w = w / w.mean()
        values.append(1 - (2 * (p * t * w).sum() + 1) / (((p + t) * w).sum() + 1))
    return np.mean(values)


def plain_mse(logits, target, weight):
    return np.sum(weight * (sigmoid(logits) - target) ** 2) / weight.sum()


PLAIN = {"bce": plain_bce, "focal": plain_focal, "iou": plain_iou, "dice": plain_dice, "mse": plain_mse}


def test_every_loss_has_a_plain_formula():
    assert PLAIN.keys() == LOSSES.keys()


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_plain_formula(name, seed):
    logits, target, weight = batch(seed)
    for w in (np.ones(SHAPE), weight):
        assert LOSSES[name](*tensors(logits, target, w)).item() == pytest.approx(
            PLAIN[name](logits, target, w), rel=1e-9
        )


def test_focal_is_taken_pixel_by_pixel():
    """By hand: at p_t = 0.5 and 0.9, (0.25 * 0.6931 + 0.01 * 0.1054) / 2; of the mean it would be 0.0433."""
    logits = torch.tensor([0.0, np.log(9)], dtype=torch.float64).view(1, 1, 1, 2)
    ones = torch.ones_like(logits)
    assert focal(logits, ones, ones).item() == pytest.approx(0.0871702, abs=1e-6)


@every_loss
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nothing_at_perfect_logits(name, share):
    target = torch.zeros(SHAPE)
    target.view(-1)[: round(share * target.numel())] = 1
    assert LOSSES[name](200 * target - 100, target, torch.ones(SHAPE)).item() == pytest.approx(0, abs=1e-6)


@every_loss
def test_more_where_wrong_than_where_right(name):
    _, target, _ = tensors(*batch())
    values = [
        LOSSES[name](scale * (2 * target - 1), target, torch.ones_like(target)).item() for scale in (-9, -1, 1, 9)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] + 0.3


@every_loss
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_finite_gradient_at_extreme_logits(name, right, share):
    target = torch.zeros(SHAPE)
    target.view(-1)[: round(share * target.numel())] = 1
    logits = (200 * target - 100) * (1 if right else -1)
    logits.requires_grad_()
    value = LOSSES[name](logits, target, torch.ones(SHAPE))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@every_loss
def test_only_the_ratio_of_weights_counts(name):
    logits, target, weight = tensors(*batch())
    loss = LOSSES[name]
    assert loss(logits, target, 2 * weight).item() == pytest.approx(loss(logits, target, weight).item(), rel=1e-9)
    assert loss(logits, target, weight).item() != pytest.approx(
        loss(logits, target, torch.ones_like(weight)).item(), rel=1e-3
    )


@every_loss
def test_a_heavy_pixel_that_is_wrong_costs_more(name):
    target = torch.zeros(SHAPE)
    target[..., :2] = 1
    logits = 10 * target - 5
    logits[:, 0, 0, 0] = -5
    weight = torch.ones(SHAPE)
    weight[:, 0, 0, 0] = 9
    assert LOSSES[name](logits, target, weight) > LOSSES[name](logits, target, torch.ones(SHAPE))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("bce", [(1.0, "bce", False)]),
        ("wbce + dice", [(1.0, "bce", True), (1.0, "dice", False)]),
        ("0.5*focal+2 * wiou", [(0.5, "focal", False), (2.0, "iou", True)]),
        ("  .25 * wdice ", [(0.25, "dice", True)]),
    ],
)
def test_terms(text, terms):
    assert parse_terms(text) == terms


@pytest.mark.parametrize(
    "text", ["", "bce +", "bce dice", "bce - dice", "-1*bce", "x*bce", "2bce", "1.2.3*bce", ".*bce"]
)
def test_bad_sums_are_refused(text):
    with pytest.raises(ValueError, match="wanted a sum such as wbce"):
        parse_terms(text)


@pytest.mark.parametrize("text", ["bxe", "wbxe", "bce + 2*bxe"])
def test_unknown_loss_suggests_the_nearest(text):
    with pytest.raises(ValueError, match="unknown loss 'bxe'; did you mean 'bce'"):
        parse_terms(text)


def test_criterion_names_and_scales_its_terms():
    logits, target, weight = tensors(*batch())
    criterion = Criterion({"semantic": "wbce + 0.5*dice", "contour": "3*focal"})
    maps = {"semantic": logits, "contour": -logits, "marker": logits}
    losses = criterion(maps, {"semantic": target, "contour": target, "marker": target, "weight": weight})
    logits, target, weight = (array.astype(np.float32) for array in batch())
    ones = np.ones(SHAPE)
    assert {name: value.item() for name, value in losses.items()} == {
        "semantic/wbce": pytest.approx(plain_bce(logits, target, weight), rel=1e-5),
        "semantic/dice": pytest.approx(0.5 * plain_dice(logits, target, ones), rel=1e-5),
        "contour/focal": pytest.approx(3 * plain_focal(-logits, target, ones), rel=1e-5),
    }


def test_w_means_plain_where_there_is_no_weight_map():
    logits, target, _ = tensors(*batch())
    maps, targets = {"semantic": logits.float()}, {"semantic": target.float()}
    weighted, plain = (Criterion({"semantic": rule})(maps, targets) for rule in ("wbce", "bce"))
    assert weighted["semantic/wbce"] == plain["semantic/bce"]


def test_a_term_named_twice_counts_twice():
    logits, target, _ = tensors(*batch())
    maps, targets = {"semantic": logits}, {"semantic": target}
    twice, once = (Criterion({"semantic": rule})(maps, targets) for rule in ("bce + 2*bce", "bce"))
    assert sum(twice.values()).item() == pytest.approx(3 * once["semantic/bce"].item())


def test_half_precision_logits_give_float32_losses():
    logits, target, _ = tensors(*batch())
    value = Criterion({"semantic": "bce"})({"semantic": logits.bfloat16()}, {"semantic": target.float()})[
        "semantic/bce"
    ]
    assert value.dtype == torch.float32


def test_side_outputs_learn_what_their_head_learns():
    logits, target, _ = tensors(*batch())
    criterion = Criterion({"semantic": "bce"})
    alone = criterion({"semantic": logits}, {"semantic": target})["semantic/bce"]
    both = criterion({"semantic": logits, "semantic@1": logits}, {"semantic": target})
    assert both["semantic/bce"].item() == pytest.approx((1 + SIDE_FACTOR) * alone.item())
    assert both.keys() == {"semantic/bce"}


def test_heads_without_a_rule_are_not_trained():
    logits, target, _ = tensors(*batch())
    maps = {"semantic": logits, "contour": logits, "contour@1": logits}
    assert Criterion({"semantic": "bce"})(maps, {"semantic": target}).keys() == {"semantic/bce"}


# A teacher


def test_imitating_is_the_plain_formula_against_what_the_teacher_gives():
    logits, _, _ = batch()
    taught = np.flip(logits, 3).copy()
    found = imitate({"marker": torch.from_numpy(logits)}, {"marker": torch.from_numpy(taught)})
    assert found.keys() == {"marker/teacher"}
    expected = plain_bce(logits, sigmoid(taught), np.ones_like(logits))
    assert found["marker/teacher"].item() == pytest.approx(expected, rel=1e-5)


def test_nothing_is_left_to_learn_of_a_teacher_that_says_the_same():
    logits = tensors(*batch())[0].requires_grad_()
    imitate({"semantic": logits}, {"semantic": logits.detach()})["semantic/teacher"].backward()
    assert logits.grad.abs().max().item() < 1e-7


def test_only_what_both_have_is_imitated_and_no_colours():
    logits = tensors(*batch())[0]
    ours = {"semantic": logits, "semantic@1": logits, "distance": logits, "color": logits}
    assert imitate(ours, {"semantic": logits, "marker": logits, "color": logits}).keys() == {"semantic/teacher"}
    assert imitate(ours, {}) == {}


# Colours


def label_batch(n: int = 3) -> torch.Tensor:
    labels = [draw_sample(seed, (64, 64), "dense", n_nuclei=9, touching=True)[1] for seed in range(n)]
    return torch.from_numpy(np.stack(labels)).float()[:, None]


@pytest.mark.parametrize("seed", range(5))
def test_every_nucleus_has_one_colour_and_neighbours_differ(seed):
    labels = label_batch()
    logits = torch.randn(3, 4, 64, 64, generator=torch.Generator().manual_seed(seed))
    colors = match_colors(logits, labels)
    assert colors.shape == logits.shape and colors.dtype == logits.dtype
    assert torch.equal(colors.sum(1, keepdim=True), (labels > 0).float())
    n_pairs = 0
    for image, picture in zip(labels[:, 0].numpy().astype(np.int32), colors.argmax(1).numpy(), strict=True):
        chosen = {i: np.unique(picture[image == i]) for i in np.unique(image[image > 0])}
        assert all(len(found) == 1 for found in chosen.values())
        pairs = adjacency(image, COLOR_REACH + 1)
        assert all(chosen[a] != chosen[b] for a, b in pairs)
        n_pairs += len(pairs)
    assert n_pairs > 10


def test_a_proper_colouring_is_kept_whatever_its_colours():
    labels = label_batch()
    random = torch.randn(3, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    first = match_colors(random, labels)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        said = 5 * first[:, order]
        assert torch.equal(match_colors(said, labels), first[:, order])


def test_the_surer_of_two_touching_nuclei_chooses_first():
    labels = torch.zeros(1, 1, 8, 12)
    labels[..., 2:6, 1:5], labels[..., 2:6, 5:11] = 7, 3
    logits = torch.zeros(1, 4, 8, 12)
    logits[:, 2, 2:6, 1:5] = 1.0
    logits[:, 2, 2:6, 5:11] = 3.0
    logits[:, 1, 2:6, 1:5] = 0.5
    colors = match_colors(logits, labels)
    assert colors[0, :, 3, 7].tolist() == [0, 0, 1, 0]
    assert colors[0, :, 3, 2].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("reach", [COLOR_REACH, COLOR_REACH + 1])
def test_nuclei_near_each_other_count_as_neighbours(reach):
    labels = torch.zeros(1, 1, 5, 20)
    labels[..., 2:6], labels[..., 6 + reach : 12 + reach] = 1, 2
    logits = torch.zeros(1, 4, 5, 20)
    logits[:, 0] = 1
    colors = match_colors(logits, labels)[0].argmax(0)
    assert (colors[2, 3] == colors[2, 8 + reach]) == (reach > COLOR_REACH)


def test_five_nuclei_around_a_point_run_out_of_four_colours_without_an_error():
    labels = torch.arange(1, 6).repeat_interleave(2).view(1, 1, 1, 10).expand(1, 1, 3, 10).float()
    colors = match_colors(torch.zeros(1, 4, 3, 10), labels)
    assert torch.equal(colors.sum(1), torch.ones(1, 3, 10))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 6)])
def test_no_nuclei_no_colours(shape):
    assert not match_colors(torch.randn(2, 4, *shape), torch.zeros(2, 1, *shape)).any()


def test_criterion_matches_the_colours():
    labels = label_batch()
    said = 20 * match_colors(torch.randn(3, 4, 64, 64), labels) - 10
    assert MATCHERS.keys() == {"color"}
    found = Criterion({"color": "wbce + dice"})({"color": said}, {"color": labels, "weight": torch.ones_like(labels)})
    assert all(value.item() == pytest.approx(0, abs=0.01) for value in found.values())
