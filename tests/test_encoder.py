"""The encoder room: units of the asked order, blocks of the asked reach, maps of the promised sizes."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import nn

from encoder import ACTIVATIONS, ENCODERS, NORMS, ConvBlock, ConvUnit, build_encoder

KINDS = {"c": nn.Conv2d, "a": nn.ReLU, "n": nn.BatchNorm2d}
# f(-1) and f(2) by hand
ACTIVATED = {
    "relu": (0.0, 2.0),
    "leaky_relu": (-0.1, 2.0),
    "elu": (-0.6321206, 2.0),  # exp(-1) - 1
    "silu": (-0.2689414, 1.7615942),  # x / (1 + exp(-x))
}


@pytest.mark.parametrize("order", ["".join(letters) for letters in permutations("can")])
def test_unit_acts_in_the_asked_order(order):
    unit = ConvUnit(4, 6, order=order)
    assert [type(layer) for layer in unit] == [KINDS[letter] for letter in order]
    norm = unit[order.index("n")]
    assert norm.num_features == (6 if order.index("c") < order.index("n") else 4)
    assert unit(torch.zeros(2, 4, 5, 7)).shape == (2, 6, 5, 7)


@pytest.mark.parametrize("order", ["", "c", "ca", "cann", "cbn", "caan", "CAN"])
def test_bad_order_is_refused(order):
    with pytest.raises(ValueError, match=f"conv_order '{order}'.*letters c, a, n"):
        ConvUnit(3, 4, order=order)


def test_every_activation_has_a_known_answer():
    assert ACTIVATED.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    unit = ConvUnit(1, 1, order="can", activation=name, norm="none")
    nn.init.dirac_(unit[0].weight)
    nn.init.zeros_(unit[0].bias)
    values = unit(torch.tensor([-1.0, 2.0]).view(1, 1, 1, 2)).flatten().tolist()
    assert values == pytest.approx(ACTIVATED[name], abs=1e-6)


@pytest.mark.parametrize(("norm", "axes"), [("batch", (0, 2, 3)), ("instance", (2, 3)), ("group", (2, 3))])
def test_norm_normalises_over_its_axes(norm, axes):
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(4, 8, 9, 11) * torch.arange(1, 5).view(4, 1, 1, 1)
    y = NORMS[norm](8)(x)  # eight groups of eight channels: a channel by itself
    assert torch.allclose(y.mean(axes), torch.zeros(()), atol=1e-4)
    assert torch.allclose(y.std(axes, correction=0), torch.ones(()), atol=1e-3)


def test_no_norm_leaves_values_alone():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(NORMS["none"](3)(x), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels", [1, 4, 8, 16])
def test_norm_takes_any_width_of_the_encoder(norm, channels):
    x = torch.randn(2, channels, 4, 4)
    assert NORMS[norm](channels)(x).shape == x.shape


def test_dropout_takes_out_whole_channels_in_training_alone():
    torch.manual_seed(0)
    unit = ConvUnit(3, 64, order="can", norm="none", dropout=0.5)
    nn.init.zeros_(unit[0].weight)
    nn.init.ones_(unit[0].bias)
    out = unit(torch.zeros(1, 3, 4, 4))[0]
    assert set(out.unique().tolist()) == {0.0, 2.0}  # what is kept makes up for what is dropped
    assert all(len(channel.unique()) == 1 for channel in out)
    assert torch.equal(unit.eval()(torch.zeros(1, 3, 4, 4)), torch.ones(1, 64, 4, 4))
    assert len(ConvUnit(3, 4)) == 3


@pytest.mark.parametrize(("dilation", "reach"), [(1, 2), (2, 3), (3, 4)])
def test_dilation_widens_the_second_convolution(dilation, reach):
    block = ConvBlock(1, 1, dilation=dilation, norm="none")
    for unit in block:
        nn.init.ones_(unit[0].weight)
        nn.init.zeros_(unit[0].bias)
    impulse = torch.zeros(1, 1, 15, 15)
    impulse[0, 0, 7, 7] = 1
    y, x = torch.nonzero(block(impulse)[0, 0], as_tuple=True)
    assert (y.min(), y.max(), x.min(), x.max()) == (7 - reach, 7 + reach, 7 - reach, 7 + reach)


@pytest.mark.parametrize("name", ENCODERS)
def test_maps_are_as_promised(name):
    encoder = build_encoder(name).eval()
    assert len(encoder.channels) == len(encoder.strides) >= 2
    assert list(encoder.strides) == sorted(encoder.strides)
    side = 2 * encoder.strides[-1]
    maps = encoder(torch.randn(2, 3, side, 2 * side))
    expected = [(2, c, side // s, 2 * side // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected


def test_options_reach_the_units():
    encoder = build_encoder("plain", widths=(4, 8), order="nac", activation="silu", norm="group", dropout=0.1)
    assert encoder.channels == (4, 8)
    assert encoder.strides == (1, 2)
    kinds = [type(layer) for layer in encoder.stages[1][0]]
    assert kinds == [nn.GroupNorm, nn.SiLU, nn.Conv2d, nn.Dropout2d]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "plane"}, "unknown encoder 'plane'; did you mean 'plain'"),
        ({"name": "plain", "activation": "rely"}, "unknown activation 'rely'; did you mean 'relu'"),
        ({"name": "plain", "norm": "batsh"}, "unknown norm 'batsh'; did you mean 'batch'"),
    ],
)
def test_unknown_names_suggest_the_nearest(options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(**options)
