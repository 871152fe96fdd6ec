"""Mask R-CNN: targets by hand, losses on odd images, and painting of detections whose label map is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from detector import LOSSES, MaskRCNN, _make_target, _paint, _paste
from encoder import PlainEncoder, build_encoder
from metric import average_precision
from synthetic import draw_sample

SIZES = [(64, 64), (37, 70), (1, 40), (40, 1), (1, 1)]
LABELS = torch.tensor(
    [
        [0, 0, 7, 7, 0, 0],
        [0, 0, 7, 7, 0, 3],
        [9, 0, 0, 7, 0, 3],
        [9, 9, 0, 0, 0, 3],
    ]
)


def fresh(seed: int = 0, **options) -> MaskRCNN:
    torch.manual_seed(seed)
    encoder = PlainEncoder((8, 8, 16, 16, 16), order="cna")
    return MaskRCNN(encoder, **{"channels": 16, "width": 32, "samples": 32, "detections": 50, **options})


def batch(shape: tuple[int, int] = (64, 64), n: int = 2, n_nuclei: int = 5) -> tuple[torch.Tensor, dict]:
    samples = [draw_sample(seed, shape, "dense", n_nuclei=n_nuclei) for seed in range(n)]
    image = np.stack([image.transpose(2, 0, 1) for image, _ in samples])
    labels = np.stack([labels[None] for _, labels in samples]).astype(np.float32)
    return torch.from_numpy(image), {"instance": torch.from_numpy(labels)}


def losses_of(model: MaskRCNN, image: torch.Tensor, targets: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)  # which anchors are learned from is drawn
    return model.losses(image, targets)


def certain(boxes: list, scores: list[float], masks: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Detections whose masks, unless given, fill their boxes."""
    masks = torch.ones(len(boxes), 1, 28, 28) if masks is None else masks
    return {"boxes": torch.tensor(boxes).view(-1, 4).float(), "scores": torch.tensor(scores), "masks": masks}


# Targets


def test_boxes_of_a_drawn_map_are_half_open():
    target = _make_target(LABELS)
    assert target["boxes"].tolist() == [[5, 1, 6, 4], [2, 0, 4, 3], [0, 2, 2, 4]]  # ids 3, 7, 9
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 1, 1] and target["labels"].dtype == torch.int64
    for mask, number in zip(target["masks"], (3, 7, 9), strict=True):
        assert torch.equal(mask, torch.eq(LABELS, number))


def test_boxes_equal_the_plain_loop():
    labels = torch.from_numpy(draw_sample(5, (96, 80), "dense")[1])
    expected = []
    for number in range(1, int(labels.max()) + 1):
        y, x = torch.nonzero(labels == number, as_tuple=True)
        expected.append([int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1])
    assert _make_target(labels)["boxes"].tolist() == expected


def test_one_pixel_is_a_box_of_area_one_and_no_nuclei_are_no_boxes():
    labels = torch.zeros(5, 6)
    assert _make_target(labels)["boxes"].shape == (0, 4)
    assert _make_target(labels)["masks"].shape == (0, 5, 6)
    labels[4, 2] = 1
    assert _make_target(labels)["boxes"].tolist() == [[2, 4, 3, 5]]


def test_ids_with_gaps_give_the_same_targets():
    image, targets = batch()
    gaps = {"instance": targets["instance"] * 300}
    for name, value in _make_target(targets["instance"][0, 0]).items():
        assert torch.equal(value, _make_target(gaps["instance"][0, 0])[name])
    a, b = losses_of(fresh().train(), image, targets), losses_of(fresh().train(), image, gaps)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_nucleus_has_anchors_to_learn_from():
    model, anchors = fresh().eval(), []
    model.rpn.anchor_generator.register_forward_hook(lambda module, args, output: anchors.append(output[0]))
    model(torch.zeros(1, 3, 128, 128))
    for kind in ("dense", "fluorescence", "tissue"):
        target = _make_target(torch.from_numpy(draw_sample(1, (128, 128), kind)[1]))
        positive, boxes = model.rpn.assign_targets_to_anchors(anchors, [target])
        taught = {tuple(box) for box in boxes[0][positive[0] == 1].tolist()}
        wanted = {tuple(box) for box in target["boxes"].tolist()}
        assert len(taught & wanted) >= 0.9 * len(wanted)  # where two boxes are alike, one takes the anchors of both


# Losses


def test_losses_are_named_and_reach_every_parameter():
    model = fresh().train()
    losses = model.losses(*batch())
    assert set(losses) == set(LOSSES.values())
    for name, value in losses.items():
        assert value.shape == () and value.dtype == torch.float32, name
        assert torch.isfinite(value) and value > 0, name
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("empty", [(0,), (0, 1)], ids=["one image", "all images"])
def test_images_without_nuclei(empty):
    model = fresh().train()
    image, targets = batch()
    targets["instance"][list(empty)] = 0
    losses = model.losses(image, targets)
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["instance/objectness"] > 0 and losses["instance/classifier"] > 0
    if len(empty) == len(image):
        assert losses["instance/box"] == losses["instance/mask"] == losses["instance/rpn_box"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_nucleus_of_one_pixel():
    image, targets = batch()
    targets["instance"][:] = 0
    targets["instance"][:, 0, 10, 20] = 1
    losses = fresh().train().losses(image, targets)
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_losses_at_any_size(shape):
    image = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    losses = fresh().train().losses(image, {"instance": torch.ones(2, 1, *shape)})
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())


def test_losses_under_autocast():
    model, (image, targets) = fresh().train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, image, targets)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
    whole = losses_of(fresh().train(), image, targets)
    assert torch.isclose(losses["instance/objectness"], whole["instance/objectness"], rtol=0.05)


def test_a_frozen_encoder_stays_as_it_is():
    model = fresh().train()
    model.freeze()
    before = copy.deepcopy(model.encoder.state_dict())
    sum(model.losses(*batch()).values()).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert model.pyramid.inner_blocks[0][0].weight.grad.abs().sum() > 0


def test_each_mode_has_its_methods():
    model, (image, targets) = fresh(), batch()
    for call in (lambda: model(image), lambda: model.instances(image[0])):
        with pytest.raises(RuntimeError, match="losses"):
            call()
    with pytest.raises(RuntimeError, match="training mode"):
        model.eval().losses(image, targets)


def test_an_encoder_without_coarse_maps_is_refused():
    encoder = nn.Identity()
    encoder.strides, encoder.channels = (1, 2), (8, 8)
    with pytest.raises(ValueError, match=r"strides \(1, 2\).*4 or more"):
        MaskRCNN(encoder)


# Predictions


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_instances_at_any_size(shape):
    model = fresh().eval()
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    labels, foreground = model.instances(image, score=0.0, threshold=0.3)
    assert labels.shape == foreground.shape == shape
    assert labels.dtype == torch.int32 and foreground.dtype == torch.float32
    assert {0, *labels.unique().tolist()} == set(range(int(labels.max()) + 1))
    assert foreground.min() >= 0 and foreground.max() <= 1
    logits = model(image[None])
    assert tuple(logits) == model.heads == ("instance",)
    assert torch.allclose(torch.sigmoid(logits["instance"][0, 0]), foreground, atol=1e-5)


def test_weights_survive_a_round_trip_and_evaluation_repeats_itself():
    model, (image, _) = fresh().eval(), batch()
    state = model.state_dict()
    assert sum(name.endswith("encoder.stages.0.0.0.weight") for name in state) == 1
    again = fresh(seed=9).eval()
    again.load_state_dict(state)
    first = model.instances(image[0], 0.0, 0.3)
    assert first[0].max() > 0
    for other in (again, model):
        assert all(torch.equal(a, b) for a, b in zip(first, other.instances(image[0], 0.0, 0.3), strict=True))


def test_the_better_detection_keeps_a_shared_pixel():
    labels, foreground = _paint(certain([[0, 0, 4, 4], [3, 0, 8, 4]], [0.6, 0.9]), (4, 10))
    assert labels[0].tolist() == [2, 2, 2, 1, 1, 1, 1, 1, 0, 0]
    assert (labels == labels[0]).all()
    assert foreground[1] == pytest.approx([0.6] * 3 + [0.9] * 5 + [0.0] * 2, abs=1e-6)


@pytest.mark.parametrize(("left", "n_nuclei"), [(5, 2), (4, 1)], ids=["half", "six tenths"])
def test_a_detection_mostly_covered_is_left_out(left, n_nuclei):
    found = certain([[0, 0, 10, 4], [left, 0, left + 10, 4]], [0.9, 0.8])
    assert _paint(found, (4, 20))[0].max() == n_nuclei


def test_weak_detections_show_in_the_foreground_alone():
    labels, foreground = _paint(certain([[1, 1, 3, 3]], [0.4]), (4, 4))
    assert not labels.any()
    assert foreground[1, 1] == np.float32(0.4)


def test_nothing_found_and_detections_in_the_padding():
    for found in (certain([], [], torch.ones(0, 1, 28, 28)), certain([[10, 2, 14, 6], [2, 8, 6, 12]], [0.9, 0.8])):
        labels, foreground = _paint(found, (8, 8))
        assert labels.shape == foreground.shape == (8, 8)
        assert not labels.any() and not foreground.any()


def test_a_mask_is_pasted_where_it_was_cut():
    """Against sampling by torch, at the centres of the pixels, on a box that is off the grid and leaves the image."""
    mask = torch.rand(28, 28, generator=torch.Generator().manual_seed(0))
    x1, y1, x2, y2 = box = np.array([2.3, 4.6, 9.1, 15.2], np.float32)
    (rows, columns), probs = _paste(mask.numpy(), box, (12, 20))
    assert (rows, columns) == (slice(4, 12), slice(2, 10))
    y, x = torch.meshgrid(torch.arange(4, 12) + 0.5, torch.arange(2, 10) + 0.5, indexing="ij")
    grid = torch.stack([(x - x1) / (x2 - x1), (y - y1) / (y2 - y1)], dim=-1) * 2 - 1
    expected = nn.functional.grid_sample(mask[None, None], grid[None].float(), align_corners=False)[0, 0]
    assert np.abs(probs - expected.numpy()).max() < 0.03  # OpenCV rounds places to 1/32 of a pixel


# Learning


@pytest.fixture
def one_thread():
    """Threads that wait for each other take ten times as long where the cores are shared with other work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_it_learns_four_images():
    torch.manual_seed(0)
    encoder = build_encoder("efficientnet_lite0")
    encoder.load_weights("imagenet")
    model = MaskRCNN(encoder, encoder.mean, encoder.std, samples=32).train()
    image, targets = batch(n=4)
    optimizer, n_steps = torch.optim.AdamW(model.parameters()), 80
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 20, 1 - step / n_steps)
        optimizer.zero_grad()
        torch.stack(list(model.losses(image, targets).values())).sum().backward()
        optimizer.step()
    model.eval()
    truth = targets["instance"][:, 0].int().numpy()
    found = [model.instances(one)[0].numpy() for one in image]
    scores = [average_precision(a, b, [0.5])[0] for a, b in zip(truth, found, strict=True)]
    assert np.mean(scores) >= 0.7, scores
