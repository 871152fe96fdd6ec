"""What every network tells of itself, so that callers loop over its heads and never ask for its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Channels of a head, where it has more than one.
HEAD_CHANNELS = {"color": 4}


class Network(nn.Module):
    """Base of all networks.

    Attributes
    ----------
    heads : tuple of str
        Names of the maps it learns.
    active : tuple of str
        Heads that predictions use; it may have others that were not trained.
    stride : int
        Sides that are a multiple of it need no padding.
    encoder : module or None
        The part that may be pretrained, frozen, and trained at a rate of its own.
    frozen : bool
        The encoder keeps its weights and the statistics of its norms; see `freeze`.
    name, options
        What `model.build_model` needs to build it again.
    mean, std : (3, 1, 1) float32
        Normalisation of RGB in [0, 1]; buffers, kept with the weights.
    """

    heads: tuple[str, ...]
    active: tuple[str, ...]
    stride: int
    encoder: Any
    frozen: bool
    name: str
    options: dict[str, Any]
    mean: Tensor
    std: Tensor

    def __init__(self, heads: Sequence[str], stride: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.heads, self.stride = tuple(heads), stride
        self.active = self.heads
        self.encoder, self.frozen = None, False
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def normalize(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float in [0, 1], to zero mean and unit deviation, float."""
        x = image / 255 if image.dtype == torch.uint8 else image
        return (x - self.mean) / self.std

    def pad(self, x: Tensor) -> Tensor:
        """Repeat the last row and column until the sides are a multiple of the stride."""
        height, width = x.shape[-2:]
        return F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")

    def freeze(self, frozen: bool = True) -> None:
        """Keep the encoder as it is while the rest is trained, or train it from now on."""
        self.frozen = frozen
        if self.encoder is not None:
            self.encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Network:
        """Training mode, but for a frozen encoder, whose norms go on using the statistics they came with."""
        super().train(mode)
        if self.frozen and self.encoder is not None:
            self.encoder.eval()
        return self


def make_output(channels: int, head: str, stride: int) -> nn.Module:
    """The last layer of a head: 1 x 1, or where the features are coarser than the image a transposed convolution."""
    n_out = HEAD_CHANNELS.get(head, 1)
    return nn.Conv2d(channels, n_out, 1) if stride == 1 else nn.ConvTranspose2d(channels, n_out, stride, stride)
