"""Records -> samples -> batches.

Batches are made by threads: decoding, warping and distance transforms leave the interpreter's lock alone, and what
threads make needs no shared memory, no pickling and no copy between processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import parallel
from config import Config, Policy
from image import Cache, Pixels, as_seen
from labels import fill_holes, relabel, remove_small, typical_diameter
from loss import parse_terms
from pipeline import ordered
from record import Record, balance_weights
from synthetic import draw_sample
from target import make_targets, plan_targets
from transform import Sample, build_transform, calm

Batch = dict[str, Tensor]

#: Of the images that are drawn in place of real ones: how many there are at a time, how many an epoch brings at most,
#: height and width (px), and the sub-category.
N_DRAWN, N_FRESH, DRAWN_SHAPE, DRAWN = 800, 20, (256, 256), "Drawn"


def open_cache(config: Config, data: Path) -> Cache:
    """The cache of a data folder, with the intensity policy of the settings."""
    return Cache(config.dataset.cache_dir or data / ".cache", *config.pre.policy)


class NucleiDataset:
    """Augmented samples with their targets.

    Parameters
    ----------
    records : sequence of Record
        With masks.
    cache : Cache
    config : Config
    heads : tuple of str
        What the network learns.

    Attributes
    ----------
    calm : bool
        Images are changed less, see `transform.calm`; set between epochs.

    Notes
    -----
    An item depends on ``(seed, epoch, index, position)`` and `calm` alone, and not on the number of threads.
    """

    def __init__(self, records: Sequence[Record], cache: Cache, config: Config, heads: tuple[str, ...]) -> None:
        lacking = [record.id for record in records if record.masks is None]
        if lacking:
            raise ValueError(f"{len(lacking)} images have no masks to learn from, such as '{lacking[0]}'")
        self.records = list(records)
        self.cache = cache
        self.seed = config.train.seed
        self.plan = plan_targets(heads, config.pre, config.contour)
        self.weight = config.param.weight if config.param.weight_map and _weighs(config, heads) else None
        self.calm = False
        self.transforms = [
            build_transform(pre, config.width, config.contour.precise) for pre in (config.pre, calm(config.pre))
        ]
        self.clean = build_cleaner(config)
        self.drawn_share, self.policy = config.train.drawn_share, config.pre.policy
        self.first_drawn = 1_000_000 * self.seed
        self.mixes_style = config.pre.style_mix
        self.equal_size = config.pre.equal_size
        self.diameters: dict[int, float] = {}
        strength, factors = config.train.balance_group, config.train.category_weights
        self.balance = balance_weights(records, strength, factors) if strength or factors else None

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> Sample:
        """Image and labels as they are on disk."""
        record = self.records[index]
        assert record.masks is not None
        labels = self.clean(self.cache.labels(record.image, record.masks))
        if self.equal_size and index not in self.diameters:
            self.diameters[index] = typical_diameter(labels)
        diameter = self.diameters.get(index, 0.0)
        return Sample(self.cache.image(record.image), labels, record.id, record.sub_category, diameter)

    def drawn_numbers(self, epoch: int) -> range:
        """The `N_DRAWN` images that an epoch draws from, by number.

        Each epoch brings new ones, as many as a tenth of what it draws; another seed has others altogether.
        """
        n_fresh = min(N_FRESH, math.ceil(0.1 * self.drawn_share * len(self)))
        first = self.first_drawn + epoch * n_fresh
        return range(first, first + N_DRAWN)

    def draw(self, rng: np.random.Generator, epoch: int) -> Sample:
        """An image that never was, see `synthetic`, shown as images from files are."""
        image, small = draw_once(self.drawn_numbers(epoch)[rng.integers(N_DRAWN)], self.policy)
        labels = self.clean(small.astype(np.int32))
        return Sample(image, labels, DRAWN, DRAWN, typical_diameter(labels) if self.equal_size else 0.0)

    def item(self, index: int, epoch: int, position: int = 0) -> dict[str, NDArray]:
        """One augmented item, of an image or of what is drawn in its place.

        Parameters
        ----------
        index, epoch, position : int
            Which image, when, and where in the order of the epoch, which tells its copies apart.

        Returns
        -------
        dict
            "image" -> (3, H, W) uint8, head -> (1, H, W) float32, "weight" -> (1, H, W) float32 where the settings
            ask for it.
        """
        rng = np.random.default_rng([self.seed, epoch, index, position])
        drawn = self.drawn_share and rng.random() < self.drawn_share
        sample = self.draw(rng, epoch) if drawn else self.sample(index)
        if self.mixes_style:
            sample = replace(sample, style=self.cache.image(self.records[rng.integers(len(self))].image))
        sample = self.transforms[self.calm](sample, rng)
        image = np.ascontiguousarray(sample.image.transpose(2, 0, 1))
        return {"image": image, **make_targets(sample.labels, self.plan, self.weight)}

    def order(self, epoch: int) -> list[int]:
        """Which items an epoch holds, in order: all once, or drawn by their balance weights."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.balance is None:
            return rng.permutation(len(self)).tolist()
        # Systematic resampling: each comes as often as it should, give or take one.
        steps = np.cumsum(self.balance)
        drawn = np.searchsorted(steps, np.arange(len(self)) + rng.random(), side="right")
        return rng.permutation(np.minimum(drawn, len(self) - 1)).tolist()


@lru_cache(N_DRAWN + 10 * N_FRESH)  # or what has gone by would push out what is still drawn
def draw_once(number: int, policy: Policy) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """Image and labels, kept: all take 330 MB, and drawing one as long as augmenting five.

    The channels of the policy are those of files, and not asked for here.
    """
    image, labels = draw_sample(number, DRAWN_SHAPE)
    image = as_seen(Pixels(image, False), policy._replace(channels=()), f"drawn image {number}")
    return image, labels.astype(np.int16)


def _weighs(config: Config, heads: tuple[str, ...]) -> bool:
    """Whether any head has a loss that weighs its pixels."""
    rules = [getattr(config.loss, head, "") for head in heads]
    return any(weighted for rule in rules if rule for *_, weighted in parse_terms(rule))


def build_cleaner(config: Config) -> Callable[[NDArray[np.int32]], NDArray[np.int32]]:
    """What ``[pre] fill_holes`` and ``min_object_size`` do to the ground truth."""
    pre = config.pre
    if not (pre.fill_holes or pre.min_object_size):
        return lambda labels: labels

    def clean(labels: NDArray[np.int32]) -> NDArray[np.int32]:
        labels = np.array(labels)
        labels = fill_holes(labels) if pre.fill_holes else labels
        return relabel(remove_small(labels, pre.min_object_size))

    return clean


def collate(items: Sequence[dict[str, NDArray]]) -> Batch:
    """Stack items to a batch; the image stays uint8."""
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}


@dataclass(frozen=True)
class Piece:
    """What a process computes at a time.

    Attributes
    ----------
    positions : range
        In the order of the epoch; at least one.
    n : int
        Images of it that count: all, or none where it only stands in, in a step of fewer images than pieces.
    n_step : int
        Images of its step, over all processes.
    """

    positions: range
    n: int
    n_step: int


class Loader:
    """Batches of an epoch, made ahead by threads, in a fixed order.

    Parameters
    ----------
    dataset : NucleiDataset
    n_batch : int
        Images of a step, over all processes.
    n_worker : int
        Threads; 0 makes each batch when it is asked for.
    accumulate : int
        Batches a step, in each process.
    place : (int, int)
        Number of this process, and how many there are.
    pin : bool
        Put batches where a GPU of CUDA fetches them by itself.

    Raises
    ------
    ValueError
        A step has fewer images than there are batches to be made of it.
    """

    def __init__(
        self,
        dataset: NucleiDataset,
        n_batch: int,
        n_worker: int,
        accumulate: int = 1,
        place: tuple[int, int] = (0, 1),
        pin: bool = False,
    ) -> None:
        if n_batch < accumulate * place[1]:
            raise ValueError(
                f"[train] n_batch = {n_batch}: wanted at least {accumulate * place[1]}, an image for each of "
                f"{place[1]} processes, {accumulate} times a step ([train] accumulate)"
            )
        self.dataset, self.n_batch, self.n_worker = dataset, n_batch, n_worker
        self.accumulate, self.place, self.pin = accumulate, place, pin

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.dataset) // self.n_batch)

    def steps(self) -> list[list[Piece]]:
        """The pieces of each step that are this process's; all processes together have each image once."""
        n = len(self.dataset)
        return [self._divide(range(i, min(i + self.n_batch, n))) for i in range(0, n, self.n_batch)]

    def _divide(self, step: range) -> list[Piece]:
        """As even as can be. The last step of an epoch may have no image for some: they stand in with the first."""
        rank, world = self.place
        n_pieces = world * self.accumulate
        bounds = [len(step) * i // n_pieces for i in range(n_pieces + 1)]
        mine = range(rank * self.accumulate, (rank + 1) * self.accumulate)
        parts = [step[bounds[i] : bounds[i + 1]] for i in mine]
        return [Piece(part or step[:1], len(part), len(step)) for part in parts]

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        """The batches of one epoch, those of `steps` one after another; at most ``n_worker + 1`` wait at a time."""
        order = self.dataset.order(epoch)
        pieces = [piece for step in self.steps() for piece in step]

        def make(piece: Piece) -> Batch:
            batch = collate([self.dataset.item(order[position], epoch, position) for position in piece.positions])
            return {name: value.pin_memory() for name, value in batch.items()} if self.pin else batch

        yield from ordered(make, pieces, self.n_worker)


def build_loader(
    records: Sequence[Record], cache: Cache, config: Config, heads: tuple[str, ...], pin: bool = False
) -> Loader:
    """The loader of the training records, as the settings have it, for this process."""
    train, place = config.train, (parallel.rank(), parallel.world())
    dataset = NucleiDataset(records, cache, config, heads)
    return Loader(dataset, train.n_batch, train.n_worker, train.accumulate, place, pin)
