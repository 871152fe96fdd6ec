"""The model room: every row of the table keeps the contract of a network, learns, and survives its checkpoint."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import Config
from detector import MaskRCNN
from helper import load_checkpoint, save_checkpoint
from loss import Criterion
from metric import average_precision
from model import MODELS, build_model, load_model, main, model_options
from network import HEAD_CHANNELS
from predict import Segmenter
from synthetic import draw_sample
from target import make_targets, plan_targets

CPU = torch.device("cpu")
SIZES = [(32, 48), (37, 21), (1, 40), (40, 1), (1, 1)]
#: Millions of parameters: trainable ones of the row as it is, and all. A dilated network has as many as its plain one.
PARAMETERS = {
    "unet": (1.94, 1.94), "caunet": (2.71, 2.71), "camunet": (3.47, 3.47), "dunet": (1.94, 1.94),
    "camdunet": (3.47, 3.47), "scamunet": (1.94, 1.94), "scamdunet": (1.94, 1.94), "distunet": (2.71, 2.71),
    "colorunet": (2.71, 2.71), "vgg_unet": (9.44, 24.16), "res_unet": (3.11, 24.40), "dense_unet": (37.45, 44.40),
    "res_camunet": (9.34, 30.63), "res_samunet": (3.12, 24.40), "lite_camunet": (5.04, 5.04),
    "lite_samunet": (3.65, 3.65), "small_samunet": (0.79, 0.79), "dcan": (5.96, 5.96), "msdnet": (0.05, 0.05),
    "maskrcnn": (5.60, 5.60),
}  # fmt: skip
#: One row of each family, tested every time; the others are slow.
QUICK = ("unet", "scamunet", "colorunet", "lite_camunet", "small_samunet", "dcan", "msdnet", "maskrcnn")
PLAIN = ("unet", "caunet", "camunet", "dunet", "camdunet", "scamunet", "scamdunet", "distunet", "colorunet")
ROWS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
#: Steps and learning rate of the rows that need their own to learn four images.
STEPS = {"msdnet": (300, 0.004), "maskrcnn": (100, 0.001)}
every_model = pytest.mark.parametrize("name", ROWS)
every_plain = pytest.mark.parametrize("name", PLAIN)


def fresh(name: str, seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(name, **options)


def loss_of(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Something to take the gradient of."""
    if isinstance(model, MaskRCNN):
        labels = torch.zeros(len(image), 1, *image.shape[2:])
        labels[..., 8:22, 8:24], labels[..., 30:50, 20:44] = 1, 2
        return sum(model.losses(image, {"instance": labels}).values())
    return sum(F.softplus(value).mean() for value in model(image).values())


def random_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@every_model
@torch.inference_mode()
def test_logits_of_each_head_at_the_size_of_the_image(name):
    model = fresh(name).eval()
    for size in SIZES:
        logits = model(random_image(1, 3, *size))
        assert tuple(logits) == model.heads
        for head, value in logits.items():
            assert value.shape == (1, HEAD_CHANNELS.get(head, 1), *size)
            assert value.dtype == torch.float32
            assert torch.isfinite(value).all()


@every_model
def test_backward_reaches_every_parameter(name):
    model = fresh(name).train()
    model.freeze(False)
    loss_of(model, random_image(2, 3, 64, 64)).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None, parameter
        assert torch.isfinite(tensor.grad).all(), parameter


@every_model
@torch.inference_mode()
def test_uint8_and_float_agree_and_a_batch_is_its_images(name):
    model = fresh(name).eval()
    image = random_image(2, 3, 32, 32)
    whole, scaled = model(image), model(image.float() / 255)
    for head in model.heads:
        assert torch.equal(whole[head], scaled[head])
        alone = torch.cat([model(image[i : i + 1])[head] for i in range(2)])
        assert torch.allclose(whole[head], alone, atol=1e-5)


@torch.inference_mode()
def test_odd_sizes_are_padded_by_the_last_pixel_and_cropped():
    model = fresh("unet").eval()
    image = random_image(1, 3, 37, 21).float() / 255
    padded = F.pad(image, (0, 11, 0, 11), mode="replicate")
    assert padded.shape[-2:] == (48, 32)
    assert torch.equal(model(image)["semantic"], model(padded)["semantic"][..., :37, :21])


@torch.inference_mode()
def test_mean_and_std_normalise_the_input():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    plain, other = fresh("unet").eval(), fresh("unet", mean=mean, std=std).eval()
    x = torch.rand(1, 3, 32, 32)
    same = (x - 0.5) / 0.5 * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert torch.allclose(plain(x)["semantic"], other(same)["semantic"], atol=1e-5)
    assert {"mean", "std"} <= other.state_dict().keys()


@every_plain
@torch.inference_mode()
def test_each_head_has_its_decoder_or_all_share_one(name):
    model = fresh(name).eval()
    image = random_image(1, 3, 32, 32)
    before = model(image)
    for i, decoder in enumerate(model.decoders):
        kept = decoder.up[0].bias.clone()
        decoder.up[0].bias += 1
        changed = {head for head, value in model(image).items() if not torch.equal(value, before[head])}
        assert changed == (set(model.heads) if len(model.decoders) == 1 else {model.heads[i]})
        decoder.up[0].bias.copy_(kept)


@torch.inference_mode()
def test_no_block_of_a_decoder_is_below_the_least_width():
    thin = fresh("lite_camunet", shared=True)
    wide = fresh("lite_camunet", shared=True, least=32)
    channels = [[block[0][0].out_channels for block in model.decoders[0].blocks] for model in (thin, wide)]
    assert channels == [[112, 40, 24, 16], [112, 40, 32, 32]]
    logits = wide(random_image(1, 3, 33, 50))
    assert {value.shape for value in logits.values()} == {(1, 1, 33, 50)}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PARAMETERS])
def test_number_of_parameters(name):
    model = build_model(name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    assert (round(trainable / 1e6, 2), round(whole / 1e6, 2)) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "encoder", "trainable"),
    [
        ("res_unet", "resnet18", 3.11),
        ("res_unet", "resnet101", 48.46),
        ("dense_unet", "densenet201", 98.52),
        ("res_camunet", "resnet18", 9.34),
    ],
)
def test_trainable_parameters_of_other_encoders(name, encoder, trainable):
    """Counted by hand from the widths; the plan's own figures for the large ones are a tenth of these."""
    model = build_model(name, encoder=encoder)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 2) == trainable


@every_model
def test_same_seed_same_weights_and_no_connection(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("building a network opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    first, second, other = fresh(name), fresh(name), fresh(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


BLOCKS = {"order": "cna", "activation": "elu", "norm": "group", "dropout": 0.2}


@every_model
def test_checkpoint_rebuilds_the_network_without_an_ini(name, tmp_path, monkeypatch):
    options = {**(BLOCKS if name in PLAIN else {}), "mean": [0.1, 0.2, 0.3]}
    model = fresh(name, **options)
    loss_of(model, random_image(2, 3, 64, 64))
    state = {"model": model.name, "options": model.options, "weights": model.state_dict(), "epoch": 3, "config": {}}
    save_checkpoint(tmp_path / "a.pkl", state)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("config.load_config", None)
    torch.manual_seed(99)
    again = load_model(load_checkpoint("a.pkl"))
    assert not again.training
    assert (again.name, again.options) == (name, options)
    image = random_image(1, 3, 37, 32, seed=1)
    with torch.inference_mode():
        expected, found = model.eval()(image), again(image)
    assert all(torch.equal(expected[head], found[head]) for head in model.heads)


def test_load_model_prefers_the_averaged_weights():
    model, average = fresh("unet"), fresh("unet", seed=1)
    state = {"model": "unet", "options": {}, "weights": model.state_dict(), "average": average.state_dict()}

    def first(network):
        return network.state_dict()["encoder.stages.0.0.0.weight"]

    assert torch.equal(first(load_model(state)), first(average))
    assert torch.equal(first(load_model(state, averaged=False)), first(model))
    del state["average"]
    assert torch.equal(first(load_model(state)), first(model))


@pytest.mark.parametrize(
    "options",
    [
        {"order": "nac"},
        {"activation": "elu"},
        {"norm": "group"},
        {"norm": "instance"},
        {"norm": "none"},
        {"dilation": 2},
    ],
    ids=str,
)
@torch.inference_mode()
def test_option_takes_effect(options):
    image = random_image(2, 3, 32, 32)
    plain, other = fresh("unet")(image), fresh("unet", **options)(image)
    assert not torch.allclose(plain["semantic"], other["semantic"], atol=1e-4)


def test_dropout_makes_training_random_and_leaves_evaluation_alone():
    model, image = fresh("unet", dropout=0.3, norm="none"), random_image(1, 3, 32, 32)
    with torch.inference_mode():
        assert not torch.equal(model(image)["semantic"], model(image)["semantic"])
        model.eval()
        assert torch.equal(model(image)["semantic"], model(image)["semantic"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("camunett", {}, "unknown network 'camunett'; did you mean 'camunet'"),
        ("unet", {"order": "cab"}, "conv_order 'cab'"),
        ("unet", {"norm": "group2"}, "unknown norm 'group2'; did you mean 'group'"),
        ("unet", {"activation": "prelu"}, "unknown activation 'prelu'; did you mean"),
        ("unet", {"encoder": "plian"}, "unknown encoder 'plian'; did you mean 'plain'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **options)


def test_model_options_come_from_the_settings():
    config = Config.model_validate(
        {"param": {"conv_order": "nac", "norm": "group", "dropout": 0.1}, "pre": {"mean": [0.1, 0.2, 0.3]}}
    )
    model = build_model("unet", **model_options(config))
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert [type(layer).__name__ for layer in model.encoder.stages[0][0]] == [
        "GroupNorm",
        "ReLU",
        "Conv2d",
        "Dropout2d",
    ]
    with pytest.raises(ValueError, match="unknown network .* 'camunte'; did you mean 'camunet'"):
        model_options(Config(widths={"camunte": 64}))


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ({"model": "msdnet", "encoder": "resnet18"}, "encoder = resnet18: msdnet leaves no choice of encoder"),
        ({"model": "maskrcnn", "heads": ("contour",)}, r"heads = \['contour'\]: maskrcnn leaves no choice of heads"),
        ({"model": "unet", "heads": ("semantc",)}, "unknown head 'semantc'; did you mean 'semantic'"),
        ({"model": "unet", "heads": ("semantic", "labels")}, "unknown head 'labels'"),
        ({"model": "unet", "heads": ("semantic", "semantic")}, "heads = semantic, semantic: one of them twice"),
    ],
)
def test_what_a_network_does_not_let_one_choose_is_named(param, message):
    with pytest.raises(ValueError, match=message):
        model_options(Config.model_validate({"param": param}))


def test_heads_encoder_and_arguments_are_free_to_combine():
    param = {"model": "dcan", "encoder": "efficientnet_lite0", "heads": "distance, color", "options": '{"features": 4}'}
    options = model_options(Config.model_validate({"param": param, "pre": {"std": [1, 1, 1]}}))
    model = build_model("dcan", **options).eval()
    assert model.heads == ("distance", "color")
    assert model.std.flatten().tolist() == [1, 1, 1]
    assert model.mean.flatten().tolist() == pytest.approx([127 / 255] * 3)  # the encoder's own
    assert model.readers["color"][0][0].out_channels == 4
    assert model(random_image(1, 3, 40, 33))["color"].shape == (1, 4, 40, 33)


def test_msdnet_takes_depth_width_and_dilations():
    model = build_model("msdnet", depth=4, width=3, dilations=(1, 5), heads=("semantic",))
    assert sum(p.numel() for p in model.parameters()) == 9 * 3 * (3 + 6 + 9 + 12) + 12 + 16
    assert model(random_image(1, 3, 9, 8))["semantic"].shape == (1, 1, 9, 8)


def test_dcan_supervises_its_summands_in_training():
    model, image = fresh("dcan").train(), random_image(2, 3, 32, 48)
    logits = model(image)
    assert list(logits)[:4] == ["semantic", "semantic@1", "semantic@2", "semantic@3"]
    total = sum(logits[f"contour@{i}"] for i in (1, 2, 3))
    assert torch.allclose(logits["contour"], total, atol=1e-5)
    assert tuple(model.eval()(image)) == ("semantic", "contour")


def test_a_frozen_encoder_stays_as_it_is():
    model, image = fresh("lite_camunet", frozen=True).train(), random_image(2, 3, 64, 64)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    loss_of(model, image).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.decoders.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    model.freeze(False)
    assert model.encoder.training
    loss_of(model, image).backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert not all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())


def test_the_table_and_the_picture_on_the_command_line(tmp_path, capsys):
    assert main(["unet", "unet:resnet18", "--size", "32"]) == 0
    head, _, plain, res = capsys.readouterr().out.strip().splitlines()
    assert "trainable (M)" in head and "32 px" in head
    assert plain.split("|")[2:4] != res.split("|")[2:4] and "1.94" in plain
    assert main(["msdnet", "--graph", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert main(["unet", "caunet", "--graph", str(tmp_path / "b.png")]) == 2
    assert main(["unett"]) == 2
    assert "did you mean 'unet'" in capsys.readouterr().err


def draw_four(touching: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_sample(seed, (64, 64), "dense", n_nuclei=5, touching=touching) for seed in range(4)]


def overfit(name: str, n_steps: int, rate: float = 0.004) -> tuple[float, float, float]:
    """First and last loss on four images, and the mean AP at IoU 0.5 on them."""
    config = Config.model_validate({"valid": {"test_time_augment": (), "border": 0}, "pre": {"nucleus_diameter": 0}})
    model = fresh(name).train()
    model.freeze(False)  # as `train.py` does where an encoder starts without weights
    if getattr(model.encoder, "name", "") == "efficientnet_lite0":
        model.encoder.load_weights("imagenet")  # they need no connection
    samples = draw_four(touching=model.heads != ("semantic",))
    plan = plan_targets(model.heads, config.pre, config.contour)
    targets = [make_targets(labels, plan, "border") for _, labels in samples]
    batch = {key: torch.from_numpy(np.stack([t[key] for t in targets])) for key in targets[0]}
    images = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image, _ in samples]))
    criterion = Criterion({head: getattr(config.loss, head) for head in model.heads if head != "instance"})
    optimizer = torch.optim.Adam(model.parameters(), rate)
    history = []
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 10) * (1 - step / n_steps)
        losses = model.losses(images, batch) if isinstance(model, MaskRCNN) else criterion(model(images), batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(float(total.detach()))
    segmenter = Segmenter([model.eval()], config, CPU, torch.float32)
    scores = [average_precision(labels, segmenter(image), [0.5])[0] for image, labels in samples]
    return history[0], history[-1], float(np.mean(scores))


def test_a_network_learns():
    first, last, score = overfit("scamunet", 100)
    assert last < 0.5 * first
    assert score >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_network_learns(name):
    n_steps, rate = STEPS.get(name, (140, 0.004))
    first, last, score = overfit(name, n_steps, rate)
    assert last < 0.5 * first
    assert score >= (0.7 if name == "maskrcnn" else 0.9)
