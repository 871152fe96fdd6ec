"""Rows: a training step, and training with everything around it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator
from contextlib import redirect_stdout
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from benchmarks import agree
from benchmarks.inputs import Inputs
from benchmarks.row import Floor, Row
from config import Config
from dataset import Batch, Loader, NucleiDataset, draw_once
from helper import pick_precision
from image import Cache
from loss import Criterion
from model import build_model, place
from network import Network
from schedule import Stretch
from trainer import Trainer, pick_rules

CPU = torch.device("cpu")
MODEL = "camunet"
#: Steps of the row `rate`, long enough for the loader to fall behind if it can.
N_RATE_STEPS = 10


class Repeated(Loader):
    """The same batch, made before, over and over: what is left is the step."""

    def __init__(self, loader: Loader, n_steps: int) -> None:
        super().__init__(loader.dataset, loader.n_batch, 0)
        self.batch, self.n_steps = next(loader.epoch(0)), n_steps

    def __len__(self) -> int:
        return self.n_steps

    def epoch(self, epoch: int) -> Generator[Batch, None, None]:
        yield from [self.batch] * self.n_steps


class Unsaved(Trainer):
    """A trainer that writes no checkpoint."""

    def save(self) -> None:
        pass


class Losses:
    """As much of a TensorBoard log as tells the loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/loss":
            self.values.append(value)


def step(inputs: Inputs) -> Row:
    config, loader = _loader(inputs, n_steps=1)
    once = Repeated(loader, 1)
    network = build_model(MODEL)
    precision = pick_precision("auto", CPU)
    wanted = 2.2 if inputs.machine.has_bfloat16 else 0.0
    name = str(precision).removeprefix("torch.")
    return Row(
        f"a training step of {MODEL}, batch {loader.n_batch} at {config.width} px, ours in {name}",
        plain=_plain_training(copy.deepcopy(network), once.batch, config),
        ours=_training(network, once, config, precision),
        agree=agree.near,
        same=0.97,
        wanted=wanted,
        floor=Floor(n_operations=3 * loader.n_batch * _n_operations(network, config.width), dtype=precision),
        cores=0,
        rounds=2,
        note="same is the loss" + ("" if wanted else "; bfloat16 is no faster on this CPU, so no ratio is wanted"),
    )


def rate(inputs: Inputs) -> Row:
    config, loader = _loader(inputs, N_RATE_STEPS)
    # All of a step's work, but the weights stay: or the plain way would learn its one batch by heart.
    still = config.model_copy(update={"param": config.param.model_copy(update={"learn_rate": 1e-9})})
    for number in loader.dataset.drawn_numbers(0):  # as the first epochs leave them
        draw_once(number, config.pre.policy)
    network = build_model(MODEL)
    precision = pick_precision("auto", CPU)
    return Row(
        f"{N_RATE_STEPS} training steps of {MODEL} from cached images, against as many on a batch that is there",
        plain=_training(copy.deepcopy(network), Repeated(loader, N_RATE_STEPS), still, precision),
        ours=_training(network, loader, still, precision),
        agree=agree.near,
        same=0.3,
        wanted=0.85,
        floor=Floor(
            n_operations=3 * N_RATE_STEPS * loader.n_batch * _n_operations(network, config.width), dtype=precision
        ),
        cores=0,
        rounds=2,
        kin=True,
        note="the plain way is the step alone: wanted is a share of its rate; the losses are of the same weights, "
        "which are kept still, on other images",
    )


def _loader(inputs: Inputs, n_steps: int) -> tuple[Config, Loader]:
    config = inputs.config
    config = config.model_copy(
        update={
            "param": config.param.model_copy(update={"model": MODEL}),
            "train": config.train.model_copy(update={"schedule": "constant"}),
        }
    )
    cache = Cache(inputs.folder / "cache", *config.pre.policy)
    n_images = n_steps * config.train.n_batch
    records = (list(inputs.records) * n_images)[:n_images]
    dataset = NucleiDataset(records, cache, config, ("semantic", "contour", "marker"))
    return config, Loader(dataset, config.train.n_batch, inputs.machine.cores)


def _training(network: Network, loader: Loader, config: Config, precision: torch.dtype) -> Callable[[], float]:
    """An epoch as the toolkit trains it, without the checkpoint; gives the mean loss."""
    trainer = Unsaved(place(network, CPU), loader, config, Path(os.devnull), CPU, precision)

    def run() -> float:
        trainer.stretch, log = Stretch(trainer.epoch, trainer.epoch + 1), Losses()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            trainer.run(cast(SummaryWriter, log))
        return log.values[-1]

    return run


def _plain_training(network: nn.Module, batch: Batch, config: Config) -> Callable[[], float]:
    """Float32, contiguous, eager; gives the loss."""
    criterion = Criterion(pick_rules(config, ("semantic", "contour", "marker")))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.param.learn_rate, weight_decay=config.train.weight_decay
    )
    targets = {name: value for name, value in batch.items() if name != "image"}

    def run() -> float:
        network.train()
        total = torch.stack(list(criterion(network(batch["image"]), targets).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.train.clip_norm)
        optimizer.step()
        return float(total.detach())

    return run


def _n_operations(network: Network, width: int) -> int:
    """Of a forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, width, width, dtype=torch.uint8))
    return counter.get_total_flops()
