"""The networks and their table. A network is a row: which heads, one decoder a head or one for all, which encoder.

    python model.py                                     size, speed and memory of every row
    python model.py camunet res_unet:resnet101          of some; behind the colon another encoder than the row's
    python model.py camunet --graph docs/model.png      a picture of one

Nothing is trained or downloaded for that: networks are measured and drawn as they start, at random.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from columns import one_line
from config import Config, Loss, pick
from detector import MaskRCNN
from encoder import WIDTHS, ConvBlock, build_encoder
from footprint import format_table, mean_squares, measure, trace_blocks
from helper import make_parser, pick_device, prepare_process, run_script
from mixedscale import MixedScaleTrunk
from network import Network, make_output
from plot import draw_network, save

logger = logging.getLogger(__name__)


class Decoder(nn.Module):
    """From the deepest map of an encoder back to the finest.

    Every step is a transposed convolution to half the channels (2 x 2 where the maps double in size), concatenation
    with the encoder's map, and a block to the width of that map, or to the `least` width where that is more.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], dilation: int = 1, least: int = 0, **options
    ) -> None:
        super().__init__()
        skip = channels[-2::-1]
        wide = [max(n, least) for n in skip]
        #: channels of the map that comes out
        self.channels = wide[-1]
        deep = [channels[-1], *wide[:-1]]
        steps = [below // above for below, above in zip(strides[:0:-1], strides[-2::-1], strict=True)]
        self.up = nn.ModuleList(nn.ConvTranspose2d(n, n // 2, k, stride=k) for n, k in zip(deep, steps, strict=True))
        self.blocks = nn.ModuleList(
            ConvBlock(n // 2 + s, w, dilation, **options) for n, s, w in zip(deep, skip, wide, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for up, block, skip in zip(self.up, self.blocks, maps[-2::-1], strict=True):
            x = block(torch.cat([up(x), skip], dim=1))
        return x


class UNet(Network):
    """An encoder, one decoder a head (or one for all), and an output layer a head.

    Ronneberger et al. 2015 (doi:10.1007/978-3-319-24574-4_28); the heads beside the semantic one follow Chen et al.
    2016 (DCAN, doi:10.1109/CVPR.2016.273).

    Parameters
    ----------
    heads : sequence of str
        Names of the maps that come out.
    shared : bool
        One decoder serves all heads.
    encoder : str
        See `encoder.build_encoder`.
    frozen : bool
        The encoder is not trained; see `Network.freeze`.
    widths, finest
        Channels of the stages of a plain encoder, and the stride of its first map.
    mean, std : three floats, optional
        Normalisation of RGB in [0, 1]; what the encoder wants, where not given.
    least : int
        Channels that no block of a decoder is below, however few the encoder's map has.
    blocks
        Of the convolution blocks: dilation, order, activation, norm, dropout.
    """

    def __init__(
        self,
        heads: Sequence[str],
        shared: bool = False,
        encoder: str = "plain",
        frozen: bool = False,
        widths: Sequence[int] = WIDTHS,
        finest: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        least: int = 0,
        **blocks: Any,
    ) -> None:
        body = build_encoder(encoder, widths=widths, finest=finest, **blocks)
        super().__init__(heads, body.strides[-1], mean or body.mean, std or body.std)
        self.encoder = body
        count = 1 if shared else len(self.heads)
        decoders = [Decoder(body.channels, body.strides, least=least, **blocks) for _ in range(count)]
        self.decoders = nn.ModuleList(decoders)
        width, stride = decoders[0].channels, body.strides[0]
        self.outputs = nn.ModuleDict({head: make_output(width, head, stride) for head in self.heads})
        self.freeze(frozen)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Logits of each head.

        Parameters
        ----------
        image : (B, 3, H, W) uint8, or float in [0, 1]
            RGB, any size from one pixel.

        Returns
        -------
        dict
            head -> (B, C, H, W) float logits; C is 1 unless `network.HEAD_CHANNELS` says otherwise.
        """
        height, width = image.shape[-2:]
        maps = self.encoder(self.pad(self.normalize(image)))
        features = [decoder(maps) for decoder in self.decoders] * (len(self.heads) // len(self.decoders))
        logits = {head: self.outputs[head](f) for head, f in zip(self.heads, features, strict=True)}
        return {head: value[..., :height, :width] for head, value in logits.items()}


class DCAN(Network):
    """Deep contour-aware network: each head adds up what it reads off the deepest maps of one encoder.

    Chen et al. 2016 (doi:10.1109/CVPR.2016.273). Each map is brought to full size by a transposed convolution and
    classified; the sum is the answer, and in training every summand is supervised too ("semantic@1" and so on, see
    `loss.Criterion`). A plain encoder's lie at strides 4, 8, 16 rather than the paper's 8, 16, 32: nuclei are smaller
    than glands.

    Parameters
    ----------
    levels : int
        How many of the deepest maps are read.
    features : int
        Channels of each after the transposed convolution.
    others
        See `UNet`.
    """

    def __init__(
        self,
        heads: Sequence[str],
        encoder: str = "plain",
        frozen: bool = False,
        levels: int = 3,
        features: int = 8,
        widths: Sequence[int] = WIDTHS,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **blocks: Any,
    ) -> None:
        body = build_encoder(encoder, widths=widths, **blocks)
        super().__init__(heads, body.strides[-1], mean or body.mean, std or body.std)
        self.encoder, self.levels = body, levels
        maps = list(zip(body.channels, body.strides, strict=True))[-levels:]
        self.readers = nn.ModuleDict(
            {head: nn.ModuleList(_reader(n, stride, features, head) for n, stride in maps) for head in self.heads}
        )
        self.freeze(frozen)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """As `UNet.forward`; in training also the summands, "head@1" from the finest map on."""
        height, width = image.shape[-2:]
        maps = self.encoder(self.pad(self.normalize(image)))[-self.levels :]
        logits: dict[str, Tensor] = {}
        for head in self.heads:
            readers: Any = self.readers[head]
            parts = [reader(m)[..., :height, :width] for reader, m in zip(readers, maps, strict=True)]
            logits[head] = torch.stack(parts).sum(0)
            if self.training:
                logits |= {f"{head}@{i}": part for i, part in enumerate(parts, 1)}
        return logits


def _reader(n_in: int, stride: int, features: int, head: str) -> nn.Module:
    """Features at full size, by overlapping windows that leave no grid, and their classifier."""
    grow = nn.ConvTranspose2d(n_in, features, 2 * stride, stride, stride // 2)
    return nn.Sequential(
        grow if stride > 1 else nn.Conv2d(n_in, features, 1), nn.ReLU(inplace=True), make_output(features, head, 1)
    )


class MixedScaleNet(Network):
    """A mixed-scale dense trunk (see `mixedscale.MixedScaleTrunk`) and a 1 x 1 convolution a head.

    Parameters
    ----------
    heads : sequence of str
    depth, width, dilations
        Layers, maps a layer, and the dilations the layers take in turn.
    mean, std : three floats
    """

    def __init__(
        self,
        heads: Sequence[str],
        depth: int = 50,
        width: int = 2,
        dilations: Sequence[int] = tuple(range(1, 11)),
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__(heads, 1, mean, std)
        self.trunk = MixedScaleTrunk(depth, width, dilations)
        self.outputs = nn.ModuleDict({head: make_output(self.trunk.channels_out, head, 1) for head in self.heads})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """As `UNet.forward`."""
        maps = self.trunk(self.normalize(image))
        return {head: output(maps) for head, output in self.outputs.items()}


def _detector(
    encoder: str = "efficientnet_lite0",
    frozen: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> MaskRCNN:
    body = build_encoder(encoder)
    model = MaskRCNN(body, mean or body.mean, std or body.std, **options)
    model.freeze(frozen)
    return model


_ONE = ("semantic",)
_TWO = ("semantic", "contour")
_THREE = ("semantic", "contour", "marker")

#: name -> the numbers in which it differs from the others
MODELS: dict[str, Callable[..., Network]] = {
    "unet": partial(UNet, heads=_ONE),
    "caunet": partial(UNet, heads=_TWO),
    "camunet": partial(UNet, heads=_THREE),
    "dunet": partial(UNet, heads=_ONE, dilation=2),
    "camdunet": partial(UNet, heads=_THREE, dilation=2),
    "scamunet": partial(UNet, heads=_THREE, shared=True),
    "scamdunet": partial(UNet, heads=_THREE, shared=True, dilation=2),
    "distunet": partial(UNet, heads=("semantic", "distance")),
    "colorunet": partial(UNet, heads=("semantic", "color")),
    "vgg_unet": partial(UNet, heads=_ONE, encoder="vgg16_bn", frozen=True),
    "res_unet": partial(UNet, heads=_ONE, encoder="resnet34", frozen=True),
    "dense_unet": partial(UNet, heads=_ONE, encoder="densenet121", frozen=True),
    "res_camunet": partial(UNet, heads=_THREE, encoder="resnet34", frozen=True),
    "res_samunet": partial(UNet, heads=_THREE, encoder="resnet34", frozen=True, shared=True),
    "lite_camunet": partial(UNet, heads=_THREE, encoder="efficientnet_lite0"),
    "lite_samunet": partial(UNet, heads=_THREE, encoder="efficientnet_lite0", shared=True),
    "small_samunet": partial(UNet, heads=_THREE, shared=True, finest=2, widths=(16, 24, 48, 96, 128)),
    "dcan": partial(DCAN, heads=_TWO),
    "msdnet": partial(MixedScaleNet, heads=_THREE),
    "maskrcnn": _detector,
}
#: What the footprint table shows beside the rows: other encoders of three of them.
VARIANTS = ("res_unet:resnet18", "res_unet:resnet101", "dense_unet:densenet201")
#: Figures given elsewhere for three rows, and why they differ.
NOTE = (
    "The document that this toolkit grew from gives 4.84, 3.74 and 9.85 M trainable parameters for ResNet101, "
    "DenseNet121 and DenseNet201: a tenth of what these widths make."
)


def build_model(name: str, **options: Any) -> Network:
    """A fresh network by name, without pretrained weights.

    Parameters
    ----------
    name : str
        Row of `MODELS`.
    options
        Override the row; see its class.

    Raises
    ------
    ValueError
        Unknown name, or an option the network does not have.
    """
    row = pick(MODELS, name, "network")
    try:
        model = row(**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    model.name, model.options = name, dict(options)
    return model


def model_options(config: Config) -> dict[str, Any]:
    """What the settings say of a network, as options of `build_model`.

    Raises
    ------
    ValueError
        Heads or an encoder are chosen for a network that does not let them be chosen, or there is no such head.
    """
    for name in config.widths:
        pick(MODELS, name, "network (a section of the settings)")
    param, pre = config.param, config.pre
    known = inspect.signature(pick(MODELS, param.model, "network")).parameters
    chosen: dict[str, Any] = {"mean": list(pre.mean or ()), "std": list(pre.std or ())}
    chosen |= {"heads": list(param.heads), "encoder": "" if param.encoder == "auto" else param.encoder}
    for key in ("heads", "encoder"):
        if chosen[key] and key not in known:
            raise ValueError(f"[param] {key} = {chosen[key]}: {param.model} leaves no choice of {key}")
    for head in param.heads:
        pick(Loss.model_fields, head, "head")
    if len(set(param.heads)) < len(param.heads):
        raise ValueError(f"[param] heads = {', '.join(param.heads)}: one of them twice")
    options = {key: value for key, value in chosen.items() if value}
    if "blocks" in known:
        options |= {"order": param.conv_order, "activation": param.activation}
        options |= {"norm": param.norm, "dropout": param.dropout}
    elif unused := config.user_set & {"param.conv_order", "param.activation", "param.norm", "param.dropout"}:
        logger.warning("%s has blocks of its own: %s is ignored", param.model, ", ".join(sorted(unused)))
    return options | param.options


def load_model(checkpoint: Mapping[str, Any], averaged: bool = True) -> Network:
    """The network of a checkpoint, in evaluation mode.

    Parameters
    ----------
    checkpoint : mapping
        As `helper.load_checkpoint` gives it.
    averaged : bool
        Take the moving average of the weights where there is one.
    """
    model = build_model(checkpoint["model"], **checkpoint["options"])
    weights = checkpoint.get("average") if averaged else None
    try:
        model.load_state_dict(weights or checkpoint["weights"])
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit a {checkpoint['model']}: {one_line(error)}") from None
    return model.eval()


def place(model: Network, device: torch.device) -> Network:
    """Move a network to a device, its weights channels-last where convolutions are fastest so."""
    model.to(device)
    return model.to(memory_format=memory_format(device))


def memory_format(device: torch.device) -> torch.memory_format:
    """Layout of images and weights: channels-last on CPU and CUDA; Apple's backend is slower in it, and has crashed."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def _build_variant(name: str) -> Network:
    """A network by name, or ``name:encoder``."""
    row, _, encoder = name.partition(":")
    return place(build_model(row, **({"encoder": encoder} if encoder else {})), torch.device("cpu"))


def _step_loss(model: nn.Module, image: Tensor) -> Tensor:
    """What a training step takes the gradient of: the logits, or a detector's losses on a grid of squares."""
    if not isinstance(model, MaskRCNN):
        return mean_squares(model, image)
    index = torch.arange(image.shape[-1], device=image.device)
    inside, number = index % 32 < 20, index // 32 + 1
    labels = torch.where(inside[:, None] & inside, number[:, None] * 1000 + number, 0)
    return torch.stack(
        list(model.losses(image, {"instance": labels.expand(len(image), 1, -1, -1).float()}).values())
    ).sum()


def run(config: Config, args: argparse.Namespace) -> int:
    prepare_process()
    names = args.network or [*MODELS, *VARIANTS]
    if args.graph is not None:
        if len(args.network) != 1:
            raise ValueError(f"--graph draws one network, {len(args.network)} are named")
        blocks, edges = trace_blocks(_build_variant(names[0]))
        save(draw_network(blocks, edges, names[0]), args.graph)
        print(args.graph)
        return 0
    device = pick_device(config.train.device)
    rows = {}
    for name in tqdm(names, "measuring", leave=False, disable=None):
        rows[name] = measure(partial(_build_variant, name), args.size, step=_step_loss, device=device)
    print(format_table(rows))
    if not args.network:
        print(f"\n{NOTE}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("network", nargs="*", metavar="NAME[:ENCODER]", help="rows of the table; default: all")
    parser.add_argument("--graph", type=Path, metavar="FILE", help="draw the network instead, as PNG")
    parser.add_argument("--size", type=int, default=256, metavar="PX", help="side of the image (default: 256)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
