"""Compiled networks: they answer as the network they were made of, or are not used."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

import engine
import predict
from config import Config
from engine import LEAST_IMAGES, CompiledNetwork, compile_network
from helper import DEFAULT_WEIGHTS
from model import build_model
from predict import Segmenter, load_segmenter
from synthetic import draw_sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    network = build_model("camunet", widths=(4, 8, 12)).eval()
    network.active = ("semantic", "marker")
    return network, CompiledNetwork(network)


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 1, 1), (3, 37, 90), (5, 48, 16)])
def test_it_answers_as_the_network_does(pair, shape):
    network, compiled = pair
    n, height, width = shape
    images = torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, 3, height, width), np.uint8))
    with torch.inference_mode():
        expected = network(images.contiguous(memory_format=torch.channels_last))
    found = compiled(images.contiguous(memory_format=torch.channels_last))
    assert list(found) == ["semantic", "marker"]
    for head, logits in found.items():
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, expected[head], atol=1e-4)


def test_answers_stay_when_the_next_images_are_shown(pair):
    _, compiled = pair
    dark, light = (torch.full((2, 3, 32, 32), value, dtype=torch.uint8) for value in (0, 255))
    first = compiled(dark)["semantic"]
    kept = first.clone()
    assert not torch.allclose(compiled(light)["semantic"], first)
    assert torch.equal(first, kept)


class Fickle(nn.Module):
    """What it does depends on how large an image is, in a way that a trace does not see."""

    heads = active = ("semantic",)
    stride = 2

    def forward(self, image):
        x = image.float().mean(1, keepdim=True) / 255
        return {"semantic": x if int(image.shape[-1]) == 2 * self.stride else -x}


def test_a_network_it_does_not_answer_for_is_left_alone(caplog):
    with caplog.at_level(logging.INFO):
        assert compile_network(Fickle().eval()) is None
        assert compile_network(build_model("unet", widths=(4, 8)).eval(), torch.float16) is None
    assert "answers differ" in caplog.text and "float16" in caplog.text


def segmenter(**valid) -> Segmenter:
    torch.manual_seed(0)
    config = Config.model_validate({"valid": valid, "train": {"device": "cpu"}})
    return Segmenter([build_model("unet", widths=(4, 8)).eval(), Fickle().eval()], config, CPU, torch.float32)


@pytest.mark.parametrize(
    ("choice", "n_images", "expected"),
    [
        ("auto", LEAST_IMAGES - 1, False),
        ("auto", LEAST_IMAGES, True),
        ("torch", LEAST_IMAGES, False),
        ("openvino", 1, True),
    ],
)
def test_networks_are_compiled_where_that_pays(choice, n_images, expected):
    given = segmenter(engine=choice)
    found = given.for_many(n_images)
    if not expected:
        assert found is given
        return
    first, second = found.compiled
    assert isinstance(first, CompiledNetwork)
    assert second is given.networks[1]


def test_without_openvino_torch_does_it(monkeypatch):
    monkeypatch.setattr(predict, "is_installed", lambda: False)
    assert segmenter().for_many(LEAST_IMAGES).compiled == ()
    with pytest.raises(ValueError, match="engine = openvino.*not installed"):
        segmenter(engine="openvino").for_many(1)


def test_the_weights_that_ship_find_the_same_nuclei_compiled():
    config = Config.model_validate({"train": {"device": "cpu", "precision": "float32"}})
    eager = load_segmenter([DEFAULT_WEIGHTS], config)
    compiled = eager.for_many(LEAST_IMAGES)
    assert isinstance(compiled.compiled[0], CompiledNetwork)
    image, _ = draw_sample(0, (160, 200), "fluorescence", 20)
    (expected, theirs), (found, ours) = eager.predict(image), compiled.predict(image)
    assert all(np.allclose(ours[head], theirs[head], atol=1e-3) for head in theirs)
    assert expected.max() > 10 and np.mean(expected == found) > 0.999


def test_nothing_is_told_to_anyone():
    """openvino.convert_model reports each conversion; what this room imports instead does not."""
    assert "convert_model" not in engine._read_graph.__code__.co_names
