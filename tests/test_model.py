"""The model room: every row of the table keeps the contract of a network, learns, and survives its checkpoint."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import Config, Valid
from helper import load_checkpoint, save_checkpoint
from loss import Criterion
from metric import average_precision
from model import MODELS, build_model, load_model, model_options
from postprocess import instances
from predict import predict_probs
from synthetic import draw_sample
from target import make_targets

CPU = torch.device("cpu")
SIZES = [(32, 48), (37, 21), (1, 40), (40, 1), (1, 1)]
# Millions of parameters; a dilated network has as many as its plain one.
PARAMETERS = {
    "unet": 1.94, "caunet": 2.71, "camunet": 3.47, "camdunet": 3.47, "scamunet": 1.94, "dunet": 1.94, "scamdunet": 1.94,
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def fresh(name: str, seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(name, **options)


def random_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@every_model
@torch.inference_mode()
def test_logits_of_each_head_at_the_size_of_the_image(name):
    model = fresh(name).eval()
    assert model.heads == tuple(MODELS[name]["heads"])
    for size in SIZES:
        logits = model(random_image(1, 3, *size))
        assert tuple(logits) == model.heads
        for value in logits.values():
            assert value.shape == (1, 1, *size)
            assert value.dtype == torch.float32
            assert torch.isfinite(value).all()


@every_model
def test_backward_reaches_every_parameter(name):
    model = fresh(name).train()
    logits = model(random_image(2, 3, 32, 32))
    sum(F.softplus(value).mean() for value in logits.values()).backward()
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


@every_model
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


def test_every_row_has_a_known_size():
    assert PARAMETERS.keys() == MODELS.keys()


@every_model
def test_number_of_parameters(name):
    assert round(sum(p.numel() for p in build_model(name).parameters()) / 1e6, 2) == PARAMETERS[name]


@every_model
def test_same_seed_same_weights_and_no_connection(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("building a network opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    first, second, other = fresh(name), fresh(name), fresh(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@every_model
def test_checkpoint_rebuilds_the_network_without_an_ini(name, tmp_path, monkeypatch):
    options = {"order": "cna", "activation": "elu", "norm": "group", "dropout": 0.2, "mean": [0.1, 0.2, 0.3]}
    model = fresh(name, **options)
    model(random_image(2, 3, 32, 32))
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


def overfit(name: str, n_steps: int) -> tuple[float, float, float]:
    """First and last loss on four images, and the mean AP at IoU 0.5 on them."""
    touching = len(MODELS[name]["heads"]) > 1
    samples = [draw_sample(seed, (64, 64), "dense", n_nuclei=5, touching=touching) for seed in range(4)]
    config = Config()
    model = fresh(name).train()
    plan = {head: head for head in model.heads}
    targets = [make_targets(labels, plan, "border") for _, labels in samples]
    batch = {key: torch.from_numpy(np.stack([t[key] for t in targets])) for key in targets[0]}
    images = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image, _ in samples]))
    criterion = Criterion({head: getattr(config.loss, head) for head in model.heads})
    optimizer = torch.optim.Adam(model.parameters(), 0.004)
    history = []
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.004 * (1 - step / n_steps)
        total = sum(criterion(model(images), batch).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    model.eval()
    valid = Valid(test_time_augment=(), border=0)
    scores = []
    for image, labels in samples:
        probs = predict_probs(image, [model], valid, config.thresholds, 64, CPU)
        scores.append(average_precision(labels, instances(probs, config.post, config.thresholds), [0.5])[0])
    return history[0], history[-1], float(np.mean(scores))


def test_a_network_learns():
    first, last, score = overfit("scamunet", 100)
    assert last < 0.5 * first
    assert score >= 0.9


@pytest.mark.slow
@every_model
def test_every_network_learns(name):
    first, last, score = overfit(name, 140)
    assert last < 0.5 * first
    assert score >= 0.9
