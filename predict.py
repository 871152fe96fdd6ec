"""Image and networks -> probability maps at the original size -> instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from config import CHECKPOINT_KEYS, Config, Valid, pick
from detector import MaskRCNN
from helper import autocast, load_checkpoint, pick_device, pick_precision, tuned_values
from model import load_model, memory_format, place
from network import HEAD_CHANNELS, Network
from postprocess import clean, instances

_PADDING = {
    "reflect": (cv2.BORDER_REFLECT_101, 0),
    "replicate": (cv2.BORDER_REPLICATE, 0),
    "black": (cv2.BORDER_CONSTANT, 0),
    "white": (cv2.BORDER_CONSTANT, 255),
}

#: Names of views -> (quarter turns, mirrored?) of the dihedral group; several names make the union.
VIEWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "rotations": ((0, False), (1, False), (2, False), (3, False)),
    "dihedral": tuple((k, mirrored) for k in range(4) for mirrored in (False, True)),
}


@dataclass(frozen=True)
class Segmenter:
    """Networks with everything they need to turn an image into instances.

    Attributes
    ----------
    networks : sequence of modules
        In evaluation mode, on `device`.
    config : Config
        ``valid``, ``post`` and the thresholds are used.
    saved : mapping
        The settings that the first network was trained with, as `Config.to_dict` gives them; empty in training.
    """

    networks: Sequence[Network]
    config: Config
    device: torch.device
    precision: torch.dtype
    saved: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.int32], dict[str, NDArray[np.float32]]]:
        """The instances of an (H, W, 3) uint8 image, (H, W) int32, and the maps they were read off, as `probs` gives
        them; those of a detector are how sure it is that something is a nucleus."""
        if isinstance(self.networks[0], MaskRCNN):
            return self._detect(image, self.networks[0])
        probs = self.probs(image)
        return self.separate(probs), probs

    def _detect(
        self, image: NDArray[np.uint8], network: MaskRCNN
    ) -> tuple[NDArray[np.int32], dict[str, NDArray[np.float32]]]:
        """As `predict`; a detector sees the image once, without border or other views."""
        config, size = self.config, image.shape[1::-1]
        if not config.valid.pred_orig_size:
            image = cv2.resize(image, (config.width, config.width), interpolation=cv2.INTER_AREA)
        x = _to_tensor(image, self.device)
        with torch.inference_mode(), autocast(self.device, self.precision):
            found = network.instances(x, config.post.min_score, config.thresholds["semantic"])
        labels, semantic = (value.cpu().numpy() for value in found)
        if not config.valid.pred_orig_size:
            labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
            semantic = cv2.resize(semantic, size, interpolation=cv2.INTER_LINEAR)
        return clean(labels, config.post), {"semantic": semantic}

    def probs(self, image: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Probability maps in [0, 1] of an (H, W, 3) uint8 image; see `predict_probs`."""
        config = self.config
        probs = predict_probs(
            image, self.networks, config.valid, config.thresholds, config.width, self.device, self.precision
        )
        if not config.contour.detect and len(self.networks) == 1:  # of several, each says by itself what it knows
            probs.pop("contour", None)
        return probs

    def separate(self, probs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.int32]:
        """The instances of probability maps by the rules of the settings, (H, W) int32."""
        thresholds = self.config.thresholds
        if self.config.valid.ensemble == "vote":  # each network has used its threshold; now the majority counts
            thresholds = {head: t if head in HEAD_CHANNELS else 0.5 for head, t in thresholds.items()}
        return instances(probs, self.config.post, thresholds)

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The instances of an image, (H, W) int32."""
        return self.predict(image)[0]


def load_segmenter(paths: Sequence[str | Path], config: Config) -> Segmenter:
    """Networks of one or several checkpoints, ready to use.

    What the user did not set, thresholds and input settings, comes from the first checkpoint; and where ``tune.py`` was
    run on just these, what it found.

    Raises
    ------
    FileNotFoundError, ValueError
        A checkpoint is missing or broken, or two of them want to see images differently.
    """
    checkpoints = [load_checkpoint(path) for path in paths]
    configs = [config.inherit(checkpoint["config"], CHECKPOINT_KEYS) for checkpoint in checkpoints]
    config = configs[0].suggest(tuned_values(checkpoints))
    for path, other in zip(paths, configs, strict=True):
        if other.pre.policy != config.pre.policy:
            raise ValueError(
                f"{path} reads images by {other.pre.policy}, {paths[0]} by {config.pre.policy}: no ensemble"
            )
    device = pick_device(config.train.device)
    networks = [place(load_model(c), device) for c in checkpoints]
    if len(networks) > 1 and any(isinstance(network, MaskRCNN) for network in networks):
        raise ValueError("a maskrcnn finds nuclei, not maps that could be averaged: no ensemble; name one checkpoint")
    for network, other in zip(networks, configs, strict=True):
        if len(networks) > 1 and other.contour.exclusive:
            network.active = ("contour",)  # all that it has learned; the others know the rest
        elif not other.contour.detect:
            network.active = tuple(head for head in network.heads if head != "contour")
    precision = pick_precision(config.train.precision, device)
    return Segmenter(networks, config, device, precision, checkpoints[0]["config"])


@torch.inference_mode()
def predict_probs(
    image: NDArray[np.uint8],
    networks: Sequence[Network],
    valid: Valid,
    thresholds: Mapping[str, float],
    width: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> dict[str, NDArray[np.float32]]:
    """Probability maps of an image, averaged over views and networks.

    Parameters
    ----------
    image : (H, W, 3) uint8
    networks : sequence of modules
        They may differ in their heads: each head is averaged over those that have it. A colour head is not averaged:
        which nucleus has which colour differs from network to network, and from view to view.
    valid : Valid
        Views, padding, or the squeeze to `width` and back (``pred_orig_size = False``), and how networks are combined:
        ``avg`` is the mean probability, ``vote`` the share of networks above the threshold.
    thresholds : mapping
        head -> probability, for votes.
    width : int
        Input size of the networks, in pixels.

    Returns
    -------
    dict
        head -> (H, W) float32 in [0, 1]; (C, H, W) of a head with several channels.
    """
    height_width = image.shape[:2]
    if valid.pred_orig_size:
        source, (top, left) = _pad(image, valid, max(network.stride for network in networks))
    else:
        source, (top, left) = cv2.resize(image, (width, width), interpolation=cv2.INTER_AREA), (0, 0)
    each: dict[str, list[NDArray[np.float32]]] = {}
    for network in networks:
        for head, probs in _average_views(source, network, valid.test_time_augment, device, precision).items():
            if valid.pred_orig_size:
                probs = probs[:, top : top + height_width[0], left : left + height_width[1]]
            else:
                probs = np.stack([cv2.resize(p, height_width[::-1], interpolation=cv2.INTER_LINEAR) for p in probs])
            each.setdefault(head, []).append(np.ascontiguousarray(probs))
    if valid.ensemble == "vote":
        each |= {
            head: [(p > thresholds[head]).astype(np.float32) for p in maps]
            for head, maps in each.items()
            if head not in HEAD_CHANNELS
        }
    return {head: maps[0] if head in HEAD_CHANNELS else np.mean(maps, axis=0)[0] for head, maps in each.items()}


def _pad(image: NDArray[np.uint8], valid: Valid, stride: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Add the border, and what is missing to a multiple of the stride; also where the image starts."""
    height, width = image.shape[:2]
    border = -(-valid.border // stride) * stride
    bottom, right = border + -height % stride, border + -width % stride
    mode, value = _PADDING[valid.padding]
    padded = cv2.copyMakeBorder(np.ascontiguousarray(image), border, bottom, border, right, mode, value=(value,) * 3)
    return padded, (border, border)


def _to_tensor(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(H, W, 3) array -> (3, H, W) tensor on the device."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(device)


def _average_views(
    image: NDArray[np.uint8],
    network: Network,
    names: Sequence[str],
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, NDArray[np.float32]]:
    """head -> (C, H, W), the mean over the views."""
    views = sorted({view for name in names for view in pick(VIEWS, name, "view")}) or [(0, False)]
    x = _to_tensor(image, device)
    each: dict[str, list[Tensor]] = {}
    for turns, mirrored in views:
        view = torch.rot90(x.flip(-1) if mirrored else x, turns, (-2, -1))[None]
        with autocast(device, precision):
            logits = network(view.contiguous(memory_format=memory_format(device)))
        for head in network.active:
            value = logits[head]
            probs = torch.rot90(torch.sigmoid(value[0].float()), -turns, (-2, -1))
            each.setdefault(head, []).append(probs.flip(-1) if mirrored else probs)
    # The first view is the image as it is, in any set of views.
    means = {head: maps[0] if head in HEAD_CHANNELS else torch.stack(maps).mean(0) for head, maps in each.items()}
    return {head: mean.cpu().numpy() for head, mean in means.items()}
