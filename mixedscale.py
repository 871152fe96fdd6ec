"""The trunk of the mixed-scale dense network: every layer sees every earlier map, at a dilation of its own.

Written plainly, each layer concatenates all maps before it, and training keeps every one of those copies. Here all
maps lie in one buffer, each layer reads a slice of it and writes the next, and so does the gradient on its way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class MixedScaleTrunk(nn.Module):
    """All maps of a mixed-scale dense network; the 1 x 1 convolutions over them are left to the caller.

    Pelt and Sethian 2018 (doi:10.1073/pnas.1715832114). A layer convolves the image and all earlier maps with 3 x 3
    kernels, zeros beyond the border, adds a bias and applies ReLU. As in the paper every map has its own dilation,
    also within a layer: map n, counted through all layers, has ``dilations[n % len(dilations)]``.

    Parameters
    ----------
    depth, width : int
        Layers, and new maps of each.
    dilations : sequence of int
        Taken in turn; one larger than the image is allowed, only its middle tap meets pixels.
    channels_in : int
        Channels of the image.

    Attributes
    ----------
    channels_out : int
        ``channels_in + depth * width``, what `forward` returns.
    weights : depth tensors (width, channels so far, 3, 3) float32
        As `torch.nn.Conv2d` has them.
    bias : (depth * width,) float32

    Raises
    ------
    ValueError
        A count or a dilation below 1, or no dilations.
    """

    def __init__(
        self, depth: int = 50, width: int = 2, dilations: Sequence[int] = tuple(range(1, 11)), channels_in: int = 3
    ) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("width", width), ("channels_in", channels_in)):
            if value < 1:
                raise ValueError(f"{name} {value}: wanted at least 1")
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilations {tuple(dilations)}: wanted one or more, each at least 1")
        self.channels_in, self.channels_out = channels_in, channels_in + depth * width
        self.dilations = tuple(dilations[n % len(dilations)] for n in range(depth * width))
        self.weights = nn.ParameterList(
            torch.empty(width, channels, 3, 3) for channels in range(channels_in, self.channels_out, width)
        )
        self.bias = nn.Parameter(torch.zeros(depth * width))
        # The paper draws every layer at the scale of the last (it also counts the outputs, not known here): the energy
        # of all maps together is then about e times that of the image, however deep the network.
        for weight in self.weights:
            nn.init.normal_(weight, std=(2 / self.weights[-1][0].numel()) ** 0.5)

    def forward(self, image: Tensor) -> Tensor:
        """The image and all maps made from it.

        Parameters
        ----------
        image : (B, channels_in, H, W) float
            Any size from one pixel, any memory format.

        Returns
        -------
        Tensor
            (B, channels_out, H, W), contiguous, the image's channels first; of the weights' type, or of autocast's
            where that is on. Needed for the gradient: do not change it in place.
        """
        if image.shape[1] != self.channels_in:
            raise ValueError(f"image of shape {tuple(image.shape)}: wanted {self.channels_in} channels")
        kind = image.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.bias.dtype
        return _MixedScale.apply(image.to(dtype), self.dilations, self.bias, *self.weights)


class _MixedScale(torch.autograd.Function):
    """All layers as one step of autograd, so that it keeps the maps once and no copies of them.

    A convolution is done as one matrix product, nine products a pixel and new map, which are then shifted and added:
    the many maps are read once, in place, and only the few products move. `image` sets the type of everything large.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, dilations: Sequence[int], bias: Tensor, *weights: Tensor) -> Tensor:
        batch, channels, *size = image.shape
        maps = image.new_empty(batch, channels + len(bias), *size)
        maps[:, :channels] = image
        flat = maps.flatten(2)
        taps = _nine_per_map(maps, len(weights[0]))
        for weight in weights:
            known = weight.shape[1]
            torch.bmm(_matrix(weight, maps), flat[:, :known], out=taps.flatten(1, 3).flatten(2))
            for n, products in enumerate(taps.unbind(1), start=known - channels):
                torch.add(_shift_and_add(products, dilations[n]), bias[n], out=maps[:, channels + n]).relu_()
        ctx.save_for_backward(maps, bias, *weights)
        ctx.dilations = dilations
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_maps: Tensor) -> tuple[Tensor | None, ...]:
        maps, bias, *weights = ctx.saved_tensors
        channels, width = weights[0].shape[1], len(weights[0])
        grad = grad_maps.clone(memory_format=torch.contiguous_format)
        flat, flat_grad = maps.flatten(2), grad.flatten(2)
        taps = _nine_per_map(maps, width)
        columns = taps.flatten(1, 3).flatten(2)
        grad_weights = []
        for weight in reversed(weights):
            known = weight.shape[1]
            new = slice(known, known + width)
            grad[:, new] *= maps[:, new].sign()  # the slope of ReLU
            for n, products in enumerate(taps.unbind(1), start=known - channels):
                products.copy_(_shifts(grad[:, channels + n], ctx.dilations[n]))
            flat_grad[:, :known].baddbmm_(_matrix(weight, maps).transpose(1, 2), columns)
            # This way round the product takes half the time of its transpose on a CPU.
            grad_matrix = (flat[:, :known] @ columns.transpose(1, 2)).sum(0, dtype=weight.dtype)
            grad_weights.append(grad_matrix.view(known, width, 3, 3).transpose(0, 1).flip(2, 3))
        grad_bias = grad[:, channels:].sum((0, 2, 3), dtype=bias.dtype)
        return grad[:, :channels], None, grad_bias, *reversed(grad_weights)


def _nine_per_map(maps: Tensor, width: int) -> Tensor:
    """Room for the products of one layer: (B, width, 3, 3, H, W), of the type of `maps` (B, C, H, W)."""
    return maps.new_empty(len(maps), width, 3, 3, *maps.shape[2:])


def _matrix(weight: Tensor, maps: Tensor) -> Tensor:
    """Kernels (width, C, 3, 3) as (B, 9 * width, C), turned by 180 degrees, of the type and batch of `maps`."""
    return weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2).to(maps.dtype).expand(len(maps), -1, -1)


def _shift_and_add(taps: Tensor, dilation: int) -> Tensor:
    """Sum the taps (B, 3, 3, H, W), each moved to the pixel it belongs to; (B, H, W), a part of `taps`, overwritten."""
    for dim in (-2, -1):
        before, middle, after = taps.unbind(1)
        inner = middle.shape[dim] - dilation
        if inner > 0:
            middle.narrow(dim, 0, inner).add_(before.narrow(dim, dilation, inner))
            middle.narrow(dim, dilation, inner).add_(after.narrow(dim, 0, inner))
        taps = middle
    return taps


def _shifts(grad: Tensor, dilation: int) -> Tensor:
    """The reverse of `_shift_and_add`: (B, H, W) as a view (B, 3, 3, H, W) of its nine shifts, zeros moving in."""
    height, width = grad.shape[1:]
    return F.pad(grad, (dilation,) * 4).unfold(1, height, dilation).unfold(2, width, dilation)
