"""Convolution blocks, and encoders that turn an image into a list of feature maps.

An encoder is a module with ``channels`` and ``strides``, one entry a map, finest first; its ``forward`` returns the
maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from config import pick

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, 0.1, inplace=True),
    "elu": partial(nn.ELU, inplace=True),
    "silu": partial(nn.SiLU, inplace=True),
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "group": lambda channels: nn.GroupNorm(min(8, channels), channels),
    "none": lambda channels: nn.Identity(),
}


class ConvUnit(nn.Sequential):
    """One 3 x 3 convolution with its activation and norm.

    Parameters
    ----------
    order : str
        Each of the letters c (convolution), a (activation), n (norm) once, in the order they act. The seed of this
        project found ``can`` the best; ``cna`` is the common choice, ``nac`` the pre-activation one.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        order: str = "can",
        activation: str = "relu",
        norm: str = "batch",
        dropout: float = 0.0,
        dilation: int = 1,
    ) -> None:
        if sorted(order) != ["a", "c", "n"]:
            raise ValueError(f"conv_order '{order}': wanted the letters c, a, n in some order, such as can")
        width = n_out if order.index("c") < order.index("n") else n_in
        parts: dict[str, nn.Module] = {
            "c": nn.Conv2d(n_in, n_out, 3, padding=dilation, dilation=dilation),
            "a": pick(ACTIVATIONS, activation, "activation")(),
            "n": pick(NORMS, norm, "norm")(width),
        }
        layers = [parts[letter] for letter in order]
        super().__init__(*layers, *([nn.Dropout2d(dropout)] if dropout else []))


class ConvBlock(nn.Sequential):
    """Two `ConvUnit` in a row; `dilation` applies to the second."""

    def __init__(self, n_in: int, n_out: int, dilation: int = 1, **options) -> None:
        super().__init__(ConvUnit(n_in, n_out, **options), ConvUnit(n_out, n_out, dilation=dilation, **options))


class Encoder(nn.Module):
    """What every encoder tells of itself.

    Attributes
    ----------
    channels, strides : tuple of int
        Of each map that `forward` returns, finest first.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]


class PlainEncoder(Encoder):
    """A block a stage, halved by max pooling in between.

    Parameters
    ----------
    widths : sequence of int
        Channels of each stage.
    dilation : int
        Of the second convolution of each stage.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128, 256), dilation: int = 1, **options) -> None:
        super().__init__()
        self.channels = tuple(widths)
        self.strides = tuple(2**i for i in range(len(widths)))
        self.stages = nn.ModuleList(
            ConvBlock(n_in, n_out, dilation, **options) for n_in, n_out in zip((3, *widths[:-1]), widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [self.stages[0](image)]
        for stage in self.stages[1:]:
            maps.append(stage(self.pool(maps[-1])))
        return maps


ENCODERS: dict[str, Callable[..., Encoder]] = {"plain": PlainEncoder}


def build_encoder(name: str, **options) -> Encoder:
    """An encoder by name; `options` go to its row."""
    return pick(ENCODERS, name, "encoder")(**options)
