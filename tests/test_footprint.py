"""The footprint room: costs as counted by hand, and graphs of blocks as drawn by hand."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from footprint import MANY_LAYERS, Block, Footprint, _LiveTensors, format_table, measure, measure_reach, trace_blocks
from model import MODELS, build_model


class Tiny(nn.Module):
    """Half the size and back, with a skip: (B, 3, H, W) -> {"semantic": (B, 1, H, W)}."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.out = nn.Conv2d(5, 1, 1, bias=False)

    def forward(self, image):
        x = self.up(self.act(self.down(image)))
        x = F.pad(x, (1, 1, 1, 1))[..., 1:-1, 1:-1]
        return {"semantic": self.out(torch.cat([x, image], dim=1))}


class Product(torch.autograd.Function):
    """A matrix product that autograd knows nothing about."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.bmm(weight.expand(len(x), -1, -1), x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return weight.T @ grad, (grad @ x.transpose(1, 2)).sum(0)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7, 3))

    def forward(self, image):
        return {"semantic": Product.apply(image.flatten(2), self.weight).unflatten(2, image.shape[2:])}


class Detector(nn.Module):
    """No logits in training: it makes its own loss."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, image):
        if self.training:
            raise RuntimeError("train it through losses")
        return {"instance": self.conv(image)}

    def losses(self, image):
        return {"a": self.conv(image).sum(), "b": self.conv(image).mean()}


# Cost


def test_cost_counted_by_hand():
    cost = measure(Tiny, size=8, n_batch=3, repeats=1)
    assert (cost.size, cost.n_batch) == (8, 3)
    # weights and biases of the down, up and output convolution
    assert cost.parameters == cost.trainable == (3 * 4 * 9 + 4) + (4 * 2 * 4 + 2) + 5
    # of one image: 4 x 4 outputs of 27 taps, 4 x 4 inputs spread by 4 taps, 8 x 8 outputs of 5 channels
    assert cost.multiply_adds == 16 * 4 * 27 + 16 * 4 * 2 * 4 + 64 * 5
    assert cost.forward > 0 and cost.step > 0


def test_products_within_a_custom_function_count():
    assert measure(Mixer, size=4, n_batch=2, repeats=1).multiply_adds == 7 * 3 * 16


def test_frozen_parts_are_not_trainable():
    def build():
        model = Tiny()
        model.down.requires_grad_(False)
        return model

    cost = measure(build, size=8, n_batch=1, repeats=1)
    assert cost.parameters - cost.trainable == 3 * 4 * 9 + 4


def test_a_network_may_make_its_own_loss():
    cost = measure(Detector, size=4, repeats=1, step=lambda model, image: sum(model.losses(image).values()))
    assert cost.multiply_adds == 3 * 16
    with pytest.raises(RuntimeError, match="through losses"):
        measure(Detector, size=4, repeats=1)


def test_live_tensors_go_when_nothing_holds_them():
    with _LiveTensors() as live:
        a = torch.zeros(1000, requires_grad=True)
        b = a * 2
        c = b.exp()
        assert live.now == 12000
        b.view(10, 100).add_(1)  # neither a view nor an in-place result is new
        assert live.now == 12000
        del b  # exp kept its result for the gradient, not its input
        assert live.now == 8000
        d = c.sin()
        del c  # sin kept it
        assert live.now == 12000
        d.sum().backward()
        assert a.grad is not None and live.now == 12000  # c has gone, the gradient of a has come
        del d
        assert live.now == 8000
    assert live.peak >= 16000


def test_memory_covers_activations_and_is_the_same_again():
    depth, channels, size = 6, 8, 64

    def build():
        model = nn.Sequential(nn.Conv2d(3, channels, 1), *(nn.Sigmoid() for _ in range(depth)))
        model.forward = lambda image: {"semantic": nn.Sequential.forward(model, image)}
        return model

    first, again = (measure(build, size, n_batch=2, repeats=1).memory for _ in range(2))
    kept = 4 * 2 * channels * size**2 * (depth + 1)  # float32; what the gradients of the layers need
    assert kept - 4 * 2 * channels * size**2 <= first <= 1.6 * kept
    assert first == again


def test_memory_grows_with_the_batch():
    one, four = (measure(Tiny, 32, n, repeats=1).memory for n in (1, 4))
    assert 3 * one < four < 4 * one  # the gradients of the weights come once


# Table


ROW = Footprint(256, 2, 1_234_567, 1_000_000, 12_345_000_000, 0.0123, 0.5, 371_400_000)


def test_table_is_markdown_in_line():
    lines = format_table({"camunet": ROW, "x": ROW}).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "network", "parameters (M)", "trainable (M)", "multiply-adds (G, 256 px)", "forward (ms)", "step (ms)",
        "memory (MB, batch of 2)",
    ]  # fmt: skip
    assert re.fullmatch(r"\| -+ (\| -+: ){6}\|", lines[1])
    assert " ".join(lines[2].split()) == "| camunet | 1.23 | 1.00 | 12.35 | 12.3 | 500.0 | 371 |"
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in lines}) == 1


def test_table_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"\[\(128, 2\), \(256, 2\)\]"):
        format_table({"a": ROW, "b": Footprint(128, 2, 1, 1, 1, 1.0, 1.0, 1)})
    with pytest.raises(ValueError, match=r"\[\]"):
        format_table({})


# Blocks


def test_blocks_of_a_tiny_network():
    model = Tiny()
    blocks, edges = trace_blocks(model, size=16)
    assert blocks == [
        Block("image", "image", (3, 16, 16), 1),
        Block("down", "Conv2d", (4, 8, 8), 2),
        Block("up", "ConvTranspose2d", (2, 16, 16), 1),
        Block("out", "Conv2d", (1, 16, 16), 1),
    ]
    assert edges == [(0, 1), (1, 2), (0, 3), (2, 3)]  # across activation, padding and concatenation


def test_tracing_leaves_the_network_as_it_was():
    model = Tiny().train()
    trace_blocks(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_block_that_runs_twice_and_one_that_does_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.same = nn.Sequential(nn.Identity())

        def forward(self, image):
            once = self.same(self.conv(image))
            return {"semantic": self.conv(once.relu_()) + image}

    blocks, edges = trace_blocks(Net())
    assert [block.name for block in blocks] == ["image", "conv", "conv"]
    assert edges == [(0, 1), (1, 2)]


def test_no_edge_where_the_gradient_is_cut():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 6, 1)

        def forward(self, image):
            with torch.no_grad():
                x = self.a(image)
            return {"b": self.b(x), "c": self.c(x.detach())}

    blocks, edges = trace_blocks(Net())
    assert [block.name for block in blocks] == ["image", "b", "c"] and edges == []


def stage(n_in, n_out):
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, 2, 1), nn.ReLU(True), nn.Conv2d(n_out, n_out, 3, 1, 1), nn.ReLU(True)
    )


def test_a_sequence_says_what_it_consists_of():
    net = nn.Sequential(
        stage(3, 4), nn.Sequential(stage(4, 5), stage(5, 6)), nn.Sequential(nn.Conv2d(6, 7, 1), nn.ReLU())
    )
    blocks, _ = trace_blocks(net)
    assert [block.kind for block in blocks[1:]] == ["2 x Conv2d", "2 x 2 x Conv2d", "Conv2d"]


def test_an_encoder_of_many_layers_is_drawn_as_its_maps():
    class Encoder(nn.Module):
        """Calls layers, never the stages that hold them, as torchvision's feature extractors do."""

        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(nn.ModuleList(stage(8 if i else 3, 8)) for i in range(MANY_LAYERS // 2 + 1))

        def forward(self, x):
            maps = []
            for layers in self.stages:
                for layer in layers:
                    x = layer(x)
                maps.append(x)
            return maps

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()

        def forward(self, image):
            return {"semantic": self.encoder(image)[-1]}

    blocks, edges = trace_blocks(Net(), size=256)
    count = MANY_LAYERS // 2 + 1
    assert [block.name for block in blocks[1:]] == [f"encoder.{i}" for i in range(count)]
    assert {block.kind for block in blocks[1:]} == {"2 x Conv2d"}
    assert edges == [(i, i + 1) for i in range(count)]


def test_camunet_has_three_decoders_on_one_encoder():
    blocks, edges = trace_blocks(build_model("camunet"))
    at = {block.name: i for i, block in enumerate(blocks) if block.kind != "MaxPool2d"}
    assert len(blocks) == 1 + (5 + 4) + 3 * (4 + 4) + 3
    skips = {(at[f"encoder.stages.{i}"], at[f"decoders.{d}.blocks.{3 - i}"]) for d in range(3) for i in range(4)}
    assert skips <= set(edges)
    # beside them: one into each block, whose decoder blocks have one more
    assert len(edges) == len(set(edges)) == len(blocks) - 1 + len(skips)
    strides = [blocks[at[f"encoder.stages.{i}"]].stride for i in range(5)]
    assert strides == [1, 2, 4, 8, 16]
    assert [blocks[at[f"outputs.{head}"]].shape for head in ("semantic", "contour", "marker")] == [(1, 64, 64)] * 3


UNLIKE = ("scamunet", "vgg_unet", "dcan", "msdnet")  # each built in a way of its own, and quickly


@pytest.mark.parametrize("name", [n if n in UNLIKE else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_every_network_can_be_drawn(name):
    blocks, edges = trace_blocks(build_model(name))
    assert 3 < len(blocks) < 50
    assert all(source < target for source, target in edges)
    assert {target for _, target in edges} == set(range(1, len(blocks)))


def test_reach_is_how_far_a_network_looks():
    class Once(torch.nn.Module):
        def __init__(self, side):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 1, side, padding=side // 2)
            torch.nn.init.ones_(self.layer.weight)

        def forward(self, image):
            return {"semantic": self.layer(image)}

    assert measure_reach(Once(1), 1.0, 64) == 1
    assert 8 <= measure_reach(Once(21), 1.0, 64) <= 10
    assert measure_reach(Once(21), 0.5, 64) < measure_reach(Once(21), 1.0, 64)
