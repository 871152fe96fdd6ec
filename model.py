"""The networks and their table. A network is a row: which heads, one decoder a head or one for all, which options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, pick
from encoder import ConvBlock, build_encoder


class Decoder(nn.Module):
    """From the deepest map of an encoder back to the finest.

    Every step is a 2 x 2 transposed convolution to half the channels, concatenation with the encoder's map, and a
    block to the width of that map.
    """

    def __init__(self, channels: Sequence[int], dilation: int = 1, **options) -> None:
        super().__init__()
        deep = list(channels[:0:-1])
        skip = list(channels[-2::-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(n, n // 2, 2, stride=2) for n in deep)
        self.blocks = nn.ModuleList(
            ConvBlock(n // 2 + s, s, dilation, **options) for n, s in zip(deep, skip, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for up, block, skip in zip(self.up, self.blocks, maps[-2::-1], strict=True):
            x = block(torch.cat([up(x), skip], dim=1))
        return x


class Network(nn.Module):
    """What every network tells of itself, so that callers loop over its heads and never ask for its name.

    Attributes
    ----------
    heads : tuple of str
        Names of the maps that come out.
    stride : int
        Sides that are a multiple of it need no padding.
    name, options
        What `build_model` needs to build it again.
    mean, std : (3, 1, 1) float32
        Normalisation of RGB in [0, 1]; buffers, kept with the weights.
    """

    heads: tuple[str, ...]
    stride: int
    name: str
    options: dict[str, Any]
    mean: Tensor
    std: Tensor


class UNet(Network):
    """An encoder, one decoder a head (or one for all), and a 1 x 1 convolution a head.

    Ronneberger et al. 2015 (doi:10.1007/978-3-319-24574-4_28); the heads beside the semantic one follow Chen et al.
    2016 (DCAN, doi:10.1109/CVPR.2016.273).

    Parameters
    ----------
    heads : sequence of str
        Names of the maps that come out.
    shared : bool
        One decoder serves all heads.
    encoder : str
        Row of `encoder.ENCODERS`.
    mean, std : three floats
        Normalisation of RGB in [0, 1]; kept with the weights.
    options
        Of the convolution blocks: dilation, order, activation, norm, dropout.
    """

    def __init__(
        self,
        heads: Sequence[str],
        shared: bool = False,
        encoder: str = "plain",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.encoder = build_encoder(encoder, **options)
        self.stride = self.encoder.strides[-1]
        channels = self.encoder.channels
        self.decoders = nn.ModuleList(Decoder(channels, **options) for _ in range(1 if shared else len(heads)))
        self.outputs = nn.ModuleDict({head: nn.Conv2d(channels[0], 1, 1) for head in heads})
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Logits of each head.

        Parameters
        ----------
        image : (B, 3, H, W) uint8, or float in [0, 1]
            RGB, any size from one pixel.

        Returns
        -------
        dict
            head -> (B, 1, H, W) float logits.
        """
        height, width = image.shape[-2:]
        x = image / 255 if image.dtype == torch.uint8 else image
        x = (x - self.mean) / self.std
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        maps = self.encoder(x)
        features = [decoder(maps) for decoder in self.decoders] * (len(self.heads) // len(self.decoders))
        logits = {head: self.outputs[head](f) for head, f in zip(self.heads, features, strict=True)}
        return {head: value[..., :height, :width] for head, value in logits.items()}


_TWO = ("semantic", "contour")
_THREE = ("semantic", "contour", "marker")

#: name -> the numbers in which it differs from the others
MODELS: dict[str, dict[str, Any]] = {
    "unet": {"heads": ("semantic",)},
    "caunet": {"heads": _TWO},
    "camunet": {"heads": _THREE},
    "dunet": {"heads": ("semantic",), "dilation": 2},
    "camdunet": {"heads": _THREE, "dilation": 2},
    "scamunet": {"heads": _THREE, "shared": True},
    "scamdunet": {"heads": _THREE, "shared": True, "dilation": 2},
}


def build_model(name: str, **options: Any) -> Network:
    """A fresh network by name.

    Parameters
    ----------
    name : str
        Row of `MODELS`.
    options
        Override the row; see `UNet`.

    Raises
    ------
    ValueError
        Unknown name.
    """
    row = pick(MODELS, name, "network")
    model = UNet(**{**row, **options})
    model.name, model.options = name, dict(options)
    return model


def model_options(config: Config) -> dict[str, Any]:
    """What the settings say of a network, as options of `build_model`."""
    for name in config.widths:
        pick(MODELS, name, "network (a section of the settings)")
    param = config.param
    return {
        "order": param.conv_order,
        "activation": param.activation,
        "norm": param.norm,
        "dropout": param.dropout,
        "mean": list(config.pre.mean),
        "std": list(config.pre.std),
    }


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
        raise ValueError(
            f"the weights do not fit a {checkpoint['model']}: {' '.join(str(error).split())[:200]}"
        ) from None
    return model.eval()


def place(model: Network, device: torch.device) -> Network:
    """Move a network to a device, its weights channels-last where convolutions are fastest so."""
    model.to(device)
    return model.to(memory_format=memory_format(device))


def memory_format(device: torch.device) -> torch.memory_format:
    """Layout of images and weights: channels-last on CPU and CUDA; Apple's backend is slower in it, and has crashed."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last
