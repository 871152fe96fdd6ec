"""The mixed-scale room: the one-buffer trunk is, number for number, the plain network that concatenates."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixedscale import MixedScaleTrunk

# (B, channels, H, W): one pixel, less than a dilation, odd, one row
SHAPES = [(1, 3, 1, 1), (2, 3, 1, 7), (2, 3, 37, 21), (1, 3, 9, 1)]


def plain(trunk: MixedScaleTrunk, image: Tensor) -> Tensor:
    """The oracle: a concatenation and a convolution for every map."""
    maps, biases = image, iter(trunk.bias.unbind())
    dilations = iter(trunk.dilations)
    for weight in trunk.weights:
        new = []
        for kernel in weight:
            d = next(dilations)
            new.append(F.conv2d(maps, kernel[None], next(biases)[None], padding=d, dilation=d))
        maps = torch.cat([maps, torch.relu(torch.cat(new, 1))], 1)
    return maps


def fresh(dtype: torch.dtype = torch.float64, **options) -> MixedScaleTrunk:
    torch.manual_seed(0)
    trunk = MixedScaleTrunk(**options).to(dtype)
    torch.nn.init.normal_(trunk.bias, std=0.1)
    return trunk


def random_image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("depth", "width"), [(12, 1), (6, 2), (4, 3)])
def test_maps_and_gradients_are_those_of_the_plain_network(depth, width, shape):
    trunk, image = fresh(depth=depth, width=width), random_image(*shape).requires_grad_()
    maps, wanted = trunk(image), plain(trunk, image)
    assert maps.shape == (shape[0], trunk.channels_out, *shape[2:])
    assert torch.allclose(maps, wanted, atol=1e-12)
    direction = random_image(*maps.shape)
    inputs = [image, *trunk.parameters()]
    grads = torch.autograd.grad((maps * direction).sum(), inputs)
    for grad, other in zip(grads, torch.autograd.grad((wanted * direction).sum(), inputs), strict=True):
        assert torch.allclose(grad, other, atol=1e-11)


def test_gradcheck():
    trunk = fresh(depth=3, width=2, dilations=(1, 3), channels_in=2)
    image = random_image(2, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda image, *_: trunk(image), (image, *trunk.parameters()))


def test_every_map_has_its_own_dilation():
    assert MixedScaleTrunk(3, 2, (1, 4, 9)).dilations == (1, 4, 9, 1, 4, 9)
    assert MixedScaleTrunk(12, 1).dilations == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2)


def test_one_tap_moves_a_pixel_by_the_dilation():
    trunk = MixedScaleTrunk(1, 1, (2,), 1)
    torch.nn.init.zeros_(trunk.weights[0])
    with torch.no_grad():
        trunk.weights[0][0, 0, 0, 2] = 1  # looks up and to the right
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 1, 3] = 1
    assert trunk(image)[0, 1].nonzero().tolist() == [[3, 1]]


@pytest.mark.parametrize(("depth", "width", "channels"), [(1, 1, 1), (50, 2, 3), (100, 1, 3)])
def test_number_of_parameters(depth, width, channels):
    trunk = MixedScaleTrunk(depth, width, channels_in=channels)
    # kernels: 9 w (c + (c + w) + ... + (c + (d - 1) w)); one bias a map
    wanted = 9 * width * (depth * channels + width * depth * (depth - 1) // 2) + depth * width
    assert sum(p.numel() for p in trunk.parameters()) == wanted
    assert trunk.channels_out == channels + depth * width


def test_energy_stays_in_bounds_however_deep():
    torch.manual_seed(0)
    image = random_image(2, 3, 64, 64, dtype=torch.float32)
    for depth in (10, 100):
        energy = MixedScaleTrunk(depth, 1)(image).square().sum()
        assert 1 < energy / image.square().sum() < 4  # about e


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    trunk, image = fresh(torch.float32, depth=8), random_image(2, 3, 24, 40, dtype=torch.float32)
    exact = trunk(image)
    wanted = torch.autograd.grad(exact.square().mean(), list(trunk.parameters()))
    with torch.autocast("cpu", dtype):
        maps = trunk(image)
    assert maps.dtype == dtype
    assert torch.allclose(maps.float(), exact, atol=0.03)
    grads = torch.autograd.grad(maps.float().square().mean(), list(trunk.parameters()))
    for grad, other in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - other).norm() < 0.03 * other.norm()


def test_memory_format_changes_nothing():
    trunk, image = fresh(depth=5), random_image(2, 3, 8, 11)
    wanted = trunk(image)
    maps = trunk.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
    assert maps.is_contiguous()
    assert torch.equal(maps, wanted)
    maps.permute(0, 2, 3, 1).contiguous().square().sum().backward()
    assert all(p.grad is not None for p in trunk.parameters())


def test_inference_mode():
    trunk, image = fresh(depth=5), random_image(1, 3, 8, 11)
    wanted = trunk(image)
    assert wanted.requires_grad
    with torch.inference_mode():
        maps = trunk(image)
    assert maps.is_inference()
    assert torch.equal(maps, wanted)


def test_maps_may_not_change_before_backward():
    maps = fresh(depth=2)(random_image(1, 3, 4, 4))
    maps.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        maps.sum().backward()


def test_copies_and_state_dict_give_the_same_maps():
    trunk, image = fresh(depth=4), random_image(1, 3, 6, 6)
    other = MixedScaleTrunk(depth=4).double()
    other.load_state_dict(trunk.state_dict())
    for twin in (copy.deepcopy(trunk), other):
        assert torch.equal(twin(image), trunk(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth 0: wanted at least 1"),
        ({"width": -1}, "width -1: wanted at least 1"),
        ({"channels_in": 0}, "channels_in 0: wanted at least 1"),
        ({"dilations": ()}, r"dilations \(\): wanted one or more"),
        ({"dilations": (1, 0)}, r"dilations \(1, 0\): wanted one or more, each at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixedScaleTrunk(**options)


def test_wrong_channels_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\): wanted 3 channels"):
        MixedScaleTrunk(2)(torch.zeros(1, 1, 4, 4))
