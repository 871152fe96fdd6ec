"""The loss room: every row of the table against a plain formula, at its limits, and under weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loss import LOSSES, Criterion, focal, parse_terms

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


PLAIN = {"bce": plain_bce, "focal": plain_focal, "iou": plain_iou, "dice": plain_dice}


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


@pytest.mark.parametrize("text", ["bse", "wbse", "bce + 2*bse"])
def test_unknown_loss_suggests_the_nearest(text):
    with pytest.raises(ValueError, match="unknown loss 'bse'; did you mean 'bce'"):
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
