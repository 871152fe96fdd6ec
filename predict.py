"""Image and networks -> probability maps at the original size -> instances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from candidate import Scene
from confidence import Opinion
from config import CHECKPOINT_KEYS, Config, Valid
from detector import MaskRCNN
from engine import LEAST_IMAGES, CompiledNetwork, compile_network, is_installed
from footprint import measure_reach
from helper import autocast, fingerprint, load_checkpoint, pick_device, pick_precision
from labels import pile, typical_diameter
from model import load_model, memory_format, place
from mosaic import Mosaic, Read, busiest, needs_tiles, surround
from network import HEAD_CHANNELS, Network
from postprocess import Separation, clean, heads_read, merge, merged_thresholds, separate, survey
from tile import cut_blocks, join, round_zoom
from view import View, combine, show, undo, unzoom_maps, zoom_image

#: head -> its probabilities; those of each network, as far as they are known.
Maps = dict[str, NDArray[np.float32]]
Seen = Sequence[Maps]
#: Most pixels of a batch of views: what is gained by a batch is lost in memory beyond it.
BATCH_PIXELS = 2**20
#: Most that an image is reduced and enlarged to bring its nuclei to one size, in the steps of `tile.ZOOM_STEP`.
ZOOM_RANGE = (0.625, 2.0)
#: An image that wants a zoom between these stays as it is: networks are trained on many sizes, and among those nothing
#: is gained (docs/ablation.md).
NOT_WORTH = (0.45, 1.75)
#: Of what the first look promised, as much as the nuclei of a zoomed image have to promise; else it stays as it is. Any
#: share from 0.3 to 0.9 decided the same (docs/ablation.md).
LEAST_KEPT = 0.75
#: An image of more tiles than that is not looked at as a whole to find its zoom, but in as many samples.
N_LOOKS = 9
#: Side of a tile (px) where the settings never want one, and there must be one; overlap of the tiles of a detector.
TILE, DETECTOR_OVERLAP = 1024, 128
#: Share of what an output depends on that two tiles have in common.
REACH_SHARE = 0.995


class Look(NamedTuple):
    """A first look at an image as it is: its instances, and the view they were read off, but of a detector."""

    found: Separation
    seen: Seen = ()


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
    fingerprint : str
        See `helper.fingerprint`.
    opinion : Opinion, optional
        What ``tune.py`` has taught it; see `confidence`.
    scene : Scene, optional
        What an image of which parts are separated holds as a whole.
    compiled : sequence, optional
        The networks again, those compiled that can be; see `for_many`.
    """

    networks: Sequence[Network]
    config: Config
    device: torch.device
    precision: torch.dtype
    saved: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    opinion: Opinion | None = None
    scene: Scene | None = None
    compiled: Sequence[Network | CompiledNetwork] = ()

    def for_many(self, n_images: int) -> Segmenter:
        """One that predicts so many images fastest: on a CPU by compiled networks, where ``[valid] engine`` lets it and
        the images are worth it.

        Raises
        ------
        ValueError
            OpenVINO is asked for and is not installed, or the networks are on another device.
        """
        engine, detects = self.config.valid.engine, isinstance(self.networks[0], MaskRCNN)
        able = self.device.type == "cpu" and is_installed()
        if engine == "openvino" and not able:
            why = "it is not installed" if self.device.type == "cpu" else "set [train] device = cpu"
            raise ValueError(f"[valid] engine = openvino, on {self.device}: {why}")
        if engine == "torch" or detects or not able or (engine == "auto" and n_images < LEAST_IMAGES):
            return self
        networks = self.networks
        return replace(self, compiled=[compile_network(network, self.precision) or network for network in networks])

    @property
    def weights(self) -> Sequence[float]:
        """How much each network counts; one that is alone, as in training, counts, whatever is set."""
        given = self.config.valid.ensemble_weights if len(self.networks) > 1 else ()
        return given or [1.0] * len(self.networks)

    def for_labels(self) -> Segmenter:
        """One that gives the same instances, and maps of no other heads than they are read off."""
        if isinstance(self.networks[0], MaskRCNN):
            return self
        counting = [network for network, weight in zip(self.networks, self.weights, strict=True) if weight]
        heads = {head for network in counting for head in network.active}
        read = heads_read(heads, self.config.post, self.opinion and self.opinion.judge)
        networks = [copy(network) for network in self.networks]
        for network in networks:
            network.active = tuple(head for head in network.active if head in read)
        return replace(self, networks=networks) if all(network.active for network in networks) else self

    def predict(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.int32], Maps]:
        """The instances of an (H, W, 3) uint8 image, (H, W) int32, and the maps they were read off, as `probs` gives
        them; those of a detector are how sure it is that something is a nucleus."""
        probs, finish = self.begin(image)
        return finish().labels, probs

    def begin(self, image: NDArray[np.uint8]) -> tuple[Maps, Callable[[], Separation]]:
        """The maps of `predict`, and what gives its instances: work without a network, which any thread may do."""
        if isinstance(self.networks[0], MaskRCNN):
            labels, probs = self._detect(image, self.networks[0])
            return probs, lambda: Separation(labels)
        members, found = self._members(image)
        probs = self.merge(members)
        return probs, lambda: found or self.separate(probs)

    def _detect(self, image: NDArray[np.uint8], network: MaskRCNN) -> tuple[NDArray[np.int32], Maps]:
        """As `predict`; a detector sees the image once, or its tiles, without border or other views."""
        config, size = self.config, image.shape[1::-1]
        if not config.valid.pred_orig_size:
            image = cv2.resize(image, (config.width, config.width), interpolation=cv2.INTER_AREA)
            labels, semantic = self._detect_once(image, network)
            labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
            semantic = cv2.resize(semantic, size, interpolation=cv2.INTER_LINEAR)
        elif needs_tiles(image.shape[:2], 1, 0, config.valid.tile):
            labels, semantic = self._detect_tiles(image, network)
        else:
            labels, semantic = self._detect_once(image, network)
        return clean(labels, config.post), {"semantic": semantic}

    def _detect_once(
        self, image: NDArray[np.uint8], network: MaskRCNN
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Nuclei and foreground of an image as it is."""
        x = _to_tensor(image, self.device)
        with torch.inference_mode(), autocast(self.device, self.precision):
            found = network.instances(x, self.config.post.min_score, self.config.thresholds["semantic"])
        labels, semantic = (value.cpu().numpy() for value in found)
        return labels, semantic

    def _detect_tiles(
        self, image: NDArray[np.uint8], network: MaskRCNN
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """As `_detect_once`, tile by tile; what two tiles see of a nucleus is joined."""
        shape, valid = image.shape[:2], self.config.valid
        margin = (valid.tile_overlap or min(DETECTOR_OVERLAP, valid.tile // 2)) // 2  # half of a tile at most
        labels, semantic = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        n_known = 0
        for core in cut_blocks(shape, valid.tile - 2 * margin):
            window = core.widen(margin, shape)
            seen, foreground = self._detect_once(image[window.slices], network)
            n_known = join(labels, seen, window, core, n_known)
            np.maximum(semantic[window.slices], foreground, out=semantic[window.slices])
        return labels, semantic

    def probs(self, image: NDArray[np.uint8]) -> Maps:
        """Probability maps in [0, 1] of an (H, W, 3) uint8 image, head -> (H, W) or (C, H, W), of all networks
        together."""
        return self.merge(self.members(image))

    def members(self, image: NDArray[np.uint8]) -> list[Maps]:
        """As `probs`, of each network.

        An image whose zoom was a mistake, by what the second opinion expects of its nuclei, is seen once more as it is.
        """
        return self._members(image)[0]

    def _members(self, image: NDArray[np.uint8]) -> tuple[list[Maps], Separation | None]:
        """The members, and the instances where they had to be found already."""
        zoom, look = self.look(image)
        if zoom != 1:
            members = self._see(image, zoom, self.config.valid)
            if self.opinion is None or look is None:
                return members, None
            found = self.separate(self.merge(members))
            if found.promise >= LEAST_KEPT * look.found.promise:
                return members, found
        if look and len(combine(self.config.valid.test_time_augment)) == 1:
            return list(look.seen), look.found  # the first look was all there is to see
        return self._see(image, 1.0, self.config.valid, look.seen if look else ()), None

    def _see(self, image: NDArray[np.uint8], zoom: float, valid: Valid, seen: Seen = ()) -> list[Maps]:
        """As `members`, at a zoom; in tiles where the enlarged image with its border is larger than one."""
        shape = image.shape[:2]
        most = max(view.zoom for view in combine(valid.test_time_augment))
        if valid.pred_orig_size and needs_tiles(shape, zoom * most, valid.border, valid.tile):
            return self.mosaic(lambda window: image[window.slices], shape, zoom, valid).all()
        members = self._predict(zoom_image(image, zoom), valid, seen)
        return [{head: unzoom_maps(maps, shape) for head, maps in each.items()} for each in members]

    def mosaic(self, read: Read, shape: tuple[int, int], zoom: float, valid: Valid | None = None) -> Mosaic:
        """The tiles of an image that is read piece by piece.

        Parameters
        ----------
        read : callable
            Window -> (h, w, 3) uint8.
        shape : (int, int)
            Of the image.
        zoom : float
            How many times to enlarge it; rounded to one that tiles can have.
        """
        valid = valid or self.config.valid
        stride = lcm(*(network.stride for network in self.networks))
        # Larger views of a tile are as large as a tile may be.
        side = (valid.tile or TILE) / max(view.zoom for view in combine(valid.test_time_augment))
        whole_tile = valid.model_copy(update={"border": 0})
        return Mosaic(
            read,
            shape,
            lambda image: self._predict(image, whole_tile),
            max(int(side) // stride, 1) * stride,
            valid.tile_overlap or self.overlap,
            valid.border,
            stride,
            round_zoom(zoom),
            valid.padding,
        )

    @cached_property
    def overlap(self) -> int:
        """What two tiles have in common, in pixels that networks see, where ``[valid] tile_overlap`` does not say."""
        return max(measure_reach(network, REACH_SHARE) for network in self.networks)

    def _predict(self, image: NDArray[np.uint8], valid: Valid, seen: Seen = ()) -> list[Maps]:
        networks = self.compiled or self.networks
        members = predict_each(image, networks, valid, self.config.width, self.device, self.precision, seen)
        if not self.config.contour.detect and len(members) == 1:  # of several, each says by itself what it knows
            members[0].pop("contour", None)
        return members

    def merge(self, members: Sequence[Mapping[str, NDArray[np.float32]]]) -> Maps:
        """What the networks say together."""
        return merge(members, self.config.thresholds, self.config.valid.ensemble, self.weights)

    def look(self, image: NDArray[np.uint8]) -> tuple[float, Look | None]:
        """How many times to enlarge an (H, W, 3) uint8 image, so that its nuclei are of the size networks know best.

        A first look, one view of the image as it is, tells the typical diameter; 1 where it finds no nucleus. `members`
        asks the second opinion whether it was right. That look is returned as well; None where samples were looked at,
        as those of a huge image are (see `zoom_of`, which has asked), or nothing.
        """
        if not self.config.pre.nucleus_diameter or not self.config.valid.pred_orig_size:
            return 1.0, None
        shape, side = image.shape[:2], self.config.valid.tile
        if side and shape[0] * shape[1] > N_LOOKS * side**2:
            return self.zoom_of(lambda window: image[window.slices], shape)[0], None
        look = self._first_look(image)
        return self.fit(typical_diameter(look.found.labels)), look

    def zoom_of(self, read: Read, shape: tuple[int, int]) -> tuple[float, NDArray[np.int32]]:
        """As `look`, of a large image, by samples, unless they say that it was a mistake, as in `members`; and what
        the first look found there, as one label map."""
        samples = list(self._samples(read, shape))
        looks = [self._first_look(sample).found for sample in samples]
        labels = pile([found.labels for found in looks])
        zoom = self.fit(typical_diameter(labels))
        if zoom == 1 or self.opinion is None:
            return zoom, labels
        first = sum(found.promise for found in looks)
        zoomed = sum(
            self.separate(self.merge(self._see(sample, zoom, self.config.valid))).promise for sample in samples
        )
        return zoom if zoomed >= LEAST_KEPT * first else 1.0, labels

    def _samples(self, read: Read, shape: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
        """Parts of a large image: where it differs most from place to place."""
        valid = self.config.valid
        side = valid.tile or TILE
        return busiest(read, shape, max(side - 2 * valid.border, side // 2), N_LOOKS)

    def scene_of(self, read: Read, shape: tuple[int, int], zoom: float) -> Scene | None:
        """What a large image holds as a whole, by samples; None without a second opinion, or a nucleus in them."""
        if self.opinion is None or isinstance(self.networks[0], MaskRCNN):
            return None
        config = self.config
        samples = [self.merge(self._see(sample, zoom, config.valid)) for sample in self._samples(read, shape)]
        thresholds = merged_thresholds(samples[0], config.thresholds, config.valid.ensemble)
        scene = survey(samples, config.post, thresholds)
        return scene if len(scene.areas) else None

    def _first_look(self, image: NDArray[np.uint8]) -> Look:
        """At an (H, W, 3) uint8 image, in one view of it."""
        if isinstance(self.networks[0], MaskRCNN):
            return Look(Separation(self.predict(image)[0]))
        seen = self._see(image, 1.0, self.config.valid.model_copy(update={"test_time_augment": ()}))
        return Look(self.separate(self.merge(seen)), seen)

    def fit(self, diameter: float) -> float:
        """How many times to enlarge an image whose typical nucleus is of that diameter (px); 1 where that is close to
        what is wanted, and without nuclei.

        In the steps that tiles can have, so that an image is seen alike, whole or in tiles.
        """
        wanted = self.config.pre.nucleus_diameter
        if not diameter or not wanted or NOT_WORTH[0] <= wanted / diameter <= NOT_WORTH[1]:
            return 1.0
        return float(round_zoom(np.clip(wanted / diameter, *ZOOM_RANGE)))

    def separate(self, probs: Mapping[str, NDArray[np.float32]]) -> Separation:
        """The instances of probability maps by the rules of the settings."""
        config = self.config
        thresholds = merged_thresholds(probs, config.thresholds, config.valid.ensemble)
        return separate(probs, config.post, thresholds, self.opinion and self.opinion.judge, self.scene)

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The instances of an image, (H, W) int32."""
        return self.predict(image)[0]


def load_segmenter(paths: Sequence[str | Path], config: Config, tuned: bool = True) -> Segmenter:
    """Networks of one or several checkpoints, ready to use.

    What the user did not set, thresholds and input settings, comes from the first checkpoint; and where ``tune.py`` was
    run on just these, in this order, what it found (unless `tuned` is False).

    Raises
    ------
    FileNotFoundError, ValueError
        A checkpoint is missing or broken, or two of them want to see images differently.
    """
    checkpoints = [load_checkpoint(path) for path in paths]
    configs = [config.inherit(checkpoint["config"], CHECKPOINT_KEYS) for checkpoint in checkpoints]
    known_by = fingerprint(checkpoints)
    found = checkpoints[0].get("tuned", {}).get(known_by)
    config, opinion = configs[0], None
    if tuned and found:
        learned, post = found.get("opinion"), config.post
        if learned and post.policy in ("auto", "forest") and post.marker == "auto" and post.segmentation:
            config, opinion = config.suggest(learned["values"]), Opinion.load(learned["weights"])
        else:
            config = config.suggest(found["values"])
    for path, other in zip(paths, configs, strict=True):
        theirs, ours = ((c.pre.policy, c.pre.nucleus_diameter) for c in (other, configs[0]))
        if theirs != ours:
            raise ValueError(f"{path} reads images by {theirs}, {paths[0]} by {ours}: no ensemble")
    weights = config.valid.ensemble_weights
    if weights and len(weights) != len(paths):
        raise ValueError(f"[valid] ensemble_weights: {len(weights)} for {len(paths)} checkpoints; wanted one for each")
    if config.pre.color_space != "rgb" and any(view.color for view in combine(config.valid.test_time_augment)):
        raise ValueError("[valid] test_time_augment: views of other colours need [pre] color_space = rgb")
    device = pick_device(config.train.device)
    networks = [place(load_model(c), device) for c in checkpoints]
    if len(networks) > 1 and any(isinstance(network, MaskRCNN) for network in networks):
        raise ValueError("a maskrcnn finds nuclei, not maps that could be averaged: no ensemble; name one checkpoint")
    if len(networks) == 1 and checkpoints[0]["config"].get("contour", {}).get("exclusive"):
        raise ValueError(
            f"{paths[0]}: was trained on contours alone; name it beside another checkpoint, as an ensemble"
        )
    for network, other in zip(networks, configs, strict=True):
        if len(networks) > 1 and other.contour.exclusive:
            network.active = ("contour",)  # all that it has learned; the others know the rest
        elif not other.contour.detect:
            network.active = tuple(head for head in network.heads if head != "contour")
    precision = pick_precision(config.train.precision, device, networks)
    return Segmenter(networks, config, device, precision, checkpoints[0]["config"], known_by, opinion)


@torch.inference_mode()
def predict_each(
    image: NDArray[np.uint8],
    networks: Sequence[Network | CompiledNetwork],
    valid: Valid,
    width: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    seen: Seen = (),
) -> list[Maps]:
    """Probability maps of an image by each network, averaged over views.

    Parameters
    ----------
    image : (H, W, 3) uint8
    valid : Valid
        Views, padding, or the squeeze to `width` and back (``pred_orig_size = False``).
    width : int
        Input size of the networks, in pixels.
    seen : sequence of dict
        What this returns for the first view alone, the image as it is; not set: not known yet.

    Returns
    -------
    list of dict
        head -> (H, W) float32 in [0, 1]; (C, H, W) of a head with several channels, of the image as it is: from view to
        view the colours of nuclei differ.
    """
    shape = image.shape[:2]
    if not valid.pred_orig_size:
        image = cv2.resize(image, (width, width), interpolation=cv2.INTER_AREA)
    views = combine(valid.test_time_augment)
    each = []
    for network, first in zip(networks, seen or [{}] * len(networks), strict=True):
        maps = _average_views(image, network, views, valid, device, precision, first)
        maps = {head: unzoom_maps(value, shape) for head, value in maps.items()}
        each.append({head: value if head in HEAD_CHANNELS else value[0] for head, value in maps.items()})
    return each


def _average_views(
    image: NDArray[np.uint8],
    network: Network | CompiledNetwork,
    views: Sequence[View],
    valid: Valid,
    device: torch.device,
    precision: torch.dtype,
    first: Mapping[str, NDArray[np.float32]],
) -> Maps:
    """head -> (C, H, W), the mean over the views; of several channels the first view's, the image as it is."""
    total = {head: value.reshape(-1, *value.shape[-2:]) for head, value in first.items()}
    rest = views[1:] if first else views
    for zoom in dict.fromkeys(view.zoom for view in rest):
        mine = [view for view in rest if view.zoom == zoom]
        zoomed = zoom_image(image, zoom)
        height, width = zoomed.shape[:2]
        source, (top, left) = _pad(zoomed, valid, network.stride) if valid.pred_orig_size else (zoomed, (0, 0))
        for view, maps in _predict_views(source, network, mine, device, precision):
            for head, value in maps.items():
                value = undo(value, view)[:, top : top + height, left : left + width]
                value = unzoom_maps(np.ascontiguousarray(value), image.shape[:2])
                if head not in total:
                    total[head] = value
                elif head not in HEAD_CHANNELS:
                    total[head] = total[head] + value
    n = np.float32(len(views))
    return {head: value if head in HEAD_CHANNELS else value / n for head, value in total.items()}


def _predict_views(
    image: NDArray[np.uint8],
    network: Network | CompiledNetwork,
    views: Sequence[View],
    device: torch.device,
    precision: torch.dtype,
) -> Iterator[tuple[View, Maps]]:
    """Views of one zoom with their maps, head -> (C, h, w), as seen in the view; those of one shape are a batch."""
    for lying in (False, True):  # a quarter turn swaps the sides
        mine = [view for view in views if view.turns % 2 == lying]
        size = max(BATCH_PIXELS // (image.shape[0] * image.shape[1]), 1)
        for some in (mine[i : i + size] for i in range(0, len(mine), size)):
            batch = np.stack([show(image, view) for view in some]).transpose(0, 3, 1, 2)  # channels-last as it lies
            with autocast(device, precision):
                logits = network(torch.from_numpy(batch).to(device).contiguous(memory_format=memory_format(device)))
            probs = {head: torch.sigmoid(logits[head].float()).cpu().numpy() for head in network.active}
            for i, view in enumerate(some):
                yield view, {head: value[i] for head, value in probs.items()}


def _pad(image: NDArray[np.uint8], valid: Valid, stride: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Add the border, and what is missing to a multiple of the stride; also where the image starts."""
    height, width = image.shape[:2]
    border = -(-valid.border // stride) * stride
    bottom, right = border + -height % stride, border + -width % stride
    return surround(image, (border, bottom, border, right), valid.padding), (border, border)


def _to_tensor(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(H, W, 3) array -> (3, H, W) tensor on the device."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(device)
