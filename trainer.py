"""The training loop: steps, averages, logs, and a state that a killed run takes up again."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import parallel
from columns import one_line
from config import Config, Train, pick
from dataset import Batch, Loader, Piece
from detector import MaskRCNN
from encoder import LibraryEncoder
from helper import Meter, autocast, grouped_gradients, save_checkpoint, write_current
from loss import Criterion, imitate
from model import memory_format
from network import Network
from schedule import SCHEDULES, Stretch

logger = logging.getLogger(__name__)

#: Whether buffers are overwritten by the main process's at every step; PyTorch has renamed it.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class Learner(nn.Module):
    """A network, its losses and its teacher, if any, as one module, so that what wraps it sees all that gradients flow
    through."""

    def __init__(
        self, network: Network, criterion: Criterion, precision: torch.dtype, teacher: Network | None = None
    ) -> None:
        super().__init__()
        self.network, self.criterion, self.precision, self.teacher = network, criterion, precision, teacher

    def forward(self, image: Tensor, targets: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Named losses, and the logits they were taken of, without gradient; a detector has none to show."""
        with autocast(image.device, self.precision), grouped_gradients(image.device, self.precision):
            if isinstance(self.network, MaskRCNN):
                return self.network.losses(image, targets), {}
            logits = self.network(image)
            taught = self._ask_teacher(image)
        losses = self.criterion(logits, targets)
        losses |= imitate({head: logits[head] for head in self.criterion.terms}, taught)
        return losses, {head: value.detach() for head, value in logits.items()}

    @torch.no_grad()
    def _ask_teacher(self, image: Tensor) -> dict[str, Tensor]:
        """Logits of the heads that the teacher has learned."""
        if self.teacher is None:
            return {}
        return {head: value for head, value in self.teacher(image).items() if head in self.teacher.active}


class Trainer:
    """One network in training, by one process or many.

    Parameters
    ----------
    model : module
        On `device` already.
    loader : Loader
        Of this process's part of each step.
    config : Config
    folder : path
        Where checkpoints go.
    evaluate : callable, optional
        network -> scores of the validation images, the same in every process; "score" decides which checkpoint is the
        best.
    teacher : module, optional
        A trained network, on `device`, whose maps this one learns to give beside the truth.

    Raises
    ------
    ValueError
        The settings ask for what the network or the device does not have.

    Notes
    -----
    Every process computes a part of each step; PyTorch's DistributedDataParallel takes the mean of their gradients,
    weighted by their share of the images. So the weights are the same in all, and the same as one process would find,
    up to rounding, as far as a loss is a mean over images (see `loss.Criterion`; a detector's are not). Norms over the
    batch see the images of one process, unless ``sync_batchnorm`` is set; the statistics they keep are averaged over
    processes after every epoch. A step of several batches (``accumulate``) equals a large one as far. Checkpoints are
    written by the main process alone.
    """

    def __init__(
        self,
        model: Network,
        loader: Loader,
        config: Config,
        folder: Path,
        device: torch.device,
        precision: torch.dtype,
        evaluate: Callable[[Network], Mapping[str, float]] | None = None,
        teacher: Network | None = None,
    ) -> None:
        self.loader, self.config, self.folder = loader, config, folder
        self.device, self.precision, self.evaluate = device, precision, evaluate
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.model = adapt(model, config.train, device)
        self.criterion = Criterion(pick_rules(config, model.heads))
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.learner: nn.Module | None = None
        kind = torch.optim.AdamW if config.train.optimizer == "adamw" else torch.optim.Adam
        decay = config.train.weight_decay if config.train.optimizer == "adamw" else 0.0
        self.optimizer = kind(group_parameters(model, encoder_rate(config, model)), weight_decay=decay)
        self.thaw_epoch = thaw_epoch(config, model)
        self.schedule = pick(SCHEDULES, config.train.schedule, "schedule")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.stretch = Stretch(0, config.train.n_epoch)
        self.epoch = 0
        self.step = 0
        self.best = -math.inf
        self.scores: dict[str, float] = {}
        self.judged = 0
        self.lasted = 0.0  # seconds, of the last epoch; what the next one may take

    # State

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds, in tensors and plain types."""
        many = parallel.world() > 1  # they start each epoch from its number; asking for other GPUs would wake them
        return {
            "model": self.model.name,
            "options": self.model.options,
            "weights": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "span": asdict(self.stretch),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "scores": self.scores,
            "judged": self.judged,
            "random": {"cpu": torch.get_rng_state(), "cuda": [] if many else torch.cuda.get_rng_state_all()},
            "device": self.device.type,
            "precision": str(self.precision).removeprefix("torch."),
            "config": self.config.to_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up where `state` was saved."""
        self.model.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        # Rates and decay are the settings', which may have changed; what the steps have gathered is the checkpoint's.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.stretch = Stretch(**state["span"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.scores, self.judged = dict(state["scores"]), state.get("judged", state["epoch"])
        torch.set_rng_state(state["random"]["cpu"])
        if len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])

    def save(self) -> None:
        """Write the checkpoints that this epoch is due; no process goes on before they are there."""
        parallel.from_main(self._write)

    def _write(self) -> None:
        state = self.state()
        if self.epoch % self.config.train.n_ckpt_epoch == 0:
            save_checkpoint(self.folder / f"{self.epoch}.pkl", state)
        save_checkpoint(self.folder / "latest.pkl", state)
        write_current(self.folder, "latest.pkl", self.epoch)

    # Training

    def run(self, log: SummaryWriter | None) -> None:
        """Train to the end of the stretch, with a checkpoint after every epoch; `log` is the main process's, or None.

        A run that was killed while it validated validates first.
        """
        while not self.finished:
            if not self.owes_scores:
                self._train_epoch(log)
                self.save()
            if self.owes_scores:
                self._validate(log)
                self.save()

    @property
    def finished(self) -> bool:
        """Whether the stretch is over, and its last scores are known."""
        return self.stretch.done(self.epoch) and not self.owes_scores

    @property
    def owes_scores(self) -> bool:
        """Whether this epoch is one to validate after, and was not."""
        due = self.epoch % self.config.train.n_cv_epoch == 0 or self.stretch.done(self.epoch)
        return self.evaluate is not None and self.epoch > 0 and due and self.judged != self.epoch

    @property
    def frozen(self) -> bool:
        """Whether the next step leaves the encoder as it is."""
        return self._freezes(self.stretch.progress(self.epoch, self.stretch.elapsed))

    def _freezes(self, progress: float) -> bool:
        """Whether the encoder stays as it is in this epoch, when so much of the stretch is done, 0 to 1."""
        if self.thaw_epoch is None:
            return progress < self.config.train.warm_up
        return self.epoch < self.thaw_epoch

    def _train_epoch(self, log: SummaryWriter | None) -> None:
        """One epoch, or what the clock leaves of it."""
        self._start_epoch()
        began, spent = time.monotonic(), self.stretch.elapsed
        meters = Meters(self.criterion.terms)
        steps = self.loader.steps()
        bar = tqdm(total=len(steps), desc=f"epoch {self.epoch + 1}", leave=False, disable=parallel.bar_off())
        with closing(self.loader.epoch(self.epoch)) as batches, autotuned_convolutions():
            for i, (parts, waited) in enumerate(_timed(batches, steps)):
                progress = self._progress(i / len(steps), spent + time.monotonic() - began)
                if self.stretch.minutes and progress >= 1 and (i or spent):  # one step at least in a stretch
                    break
                self._set_rates(progress)
                self._wrap(self._freezes(progress))
                self._train_step(parts, meters)
                meters.tick(waited)
                bar.update()
                if i % self.config.train.print_freq == 0:
                    tqdm.write(meters.settle().line(self.epoch + 1, i, len(steps)))
        bar.close()
        self._end_epoch(meters.settle().means(), spent + time.monotonic() - began, log)

    def _start_epoch(self) -> None:
        """Near the end of the stretch, change images less."""
        share = self.config.train.calm_share
        middle = self.stretch.progress(self.epoch + 0.5, self.stretch.elapsed + self.lasted / 2)
        self.loader.dataset.calm = share > 0 and middle >= 1 - share
        self.model.train()
        if parallel.world() > 1:  # each draws its own numbers, in dropout for one, and the same again after a resume
            seeds = np.random.SeedSequence([self.config.train.seed, self.epoch, parallel.rank()])
            torch.manual_seed(int(seeds.generate_state(1)[0]))

    def _wrap(self, frozen: bool) -> None:
        """Freeze or thaw the encoder, and wrap the network in what a step calls, where that has changed."""
        if self.learner is not None and frozen == self.model.frozen:
            return
        self.model.freeze(frozen)
        self.learner = None
        gc.collect()  # or the hooks of the old wrapper would be called, too
        self.learner = share_gradients(Learner(self.model, self.criterion, self.precision, self.teacher))

    def _progress(self, done: float, elapsed: float) -> float:
        """How much of the stretch is done, after so much of the epoch; by the clock of the main process."""
        if self.stretch.minutes:  # or one process would leave the epoch, and the others wait for it
            elapsed = parallel.from_main(lambda: elapsed)
        return self.stretch.progress(self.epoch + done, elapsed)

    def _set_rates(self, progress: float) -> None:
        factor = self.schedule(progress, self.epoch, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.param.learn_rate * factor * group["rate"]

    def _end_epoch(self, means: Mapping[str, float], elapsed: float, log: SummaryWriter | None) -> None:
        for network in (self.model, self.average):
            parallel.average(norm_statistics(network))
        self.epoch += 1
        elapsed = parallel.from_main(lambda: elapsed)
        self.lasted = elapsed - self.stretch.elapsed
        self.stretch = replace(self.stretch, elapsed=elapsed)
        if log is not None and means:
            for name, value in means.items():
                log.add_scalar(f"train/{name}", value, self.epoch)
            log.add_scalar("train/learn_rate", self.optimizer.param_groups[-1]["lr"], self.epoch)

    def _train_step(self, parts: Sequence[tuple[Batch, Piece]], meters: Meters) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        notes = []
        for i, (batch, piece) in enumerate(parts, 1):
            with nullcontext() if i == len(parts) else self._alone():
                notes.append(self._learn(batch, piece))
        if self.config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        # Early in training the average forgets fast, or it would still hold the random start.
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step))
        update_average(self.average, self.model, decay)
        meters.note(torch.stack(notes).sum(0))

    def _learn(self, batch: Batch, piece: Piece) -> Tensor:
        """Add the gradients of one batch, by its share of the step; what `Meters.note` wants to know of it."""
        assert self.learner is not None
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        image = batch.pop("image").contiguous(memory_format=memory_format(self.device))
        losses, logits = self.learner(image, batch)
        total = torch.stack(list(losses.values())).sum()
        # The mean over the processes is taken of what is to be summed.
        self.scaler.scale(total * (piece.n / piece.n_step * parallel.world())).backward()
        refuse_infinite(losses)  # not before the gradients, for which a GPU would have to wait
        counts = [count_pixels(logits[head], batch[head]) for head in self.criterion.terms]
        noted = torch.stack([total.detach().new_tensor(piece.n), piece.n * total.detach()])
        return torch.cat([noted, *(bool(piece.n) * count for count in counts)])

    def _alone(self) -> AbstractContextManager:
        """Let gradients add up in this process; they are exchanged with the last batch of a step."""
        return self.learner.no_sync() if isinstance(self.learner, DistributedDataParallel) else nullcontext()

    def _validate(self, log: SummaryWriter | None) -> None:
        assert self.evaluate is not None
        began = time.monotonic()
        self.scores, self.judged = dict(self.evaluate(self.average)), self.epoch
        spent = parallel.from_main(lambda: time.monotonic() - began)
        self.stretch = replace(self.stretch, elapsed=self.stretch.elapsed + spent)
        text = "    ".join(f"{name}: {value:.4f}" for name, value in self.scores.items())
        tqdm.write(f"Valid: [{self.epoch}]    {text}")
        if log is not None:
            for name, value in self.scores.items():
                log.add_scalar(f"valid/{name}", value, self.epoch)
            self._log_images(log)
        if self.scores["score"] > self.best:
            self.best = self.scores["score"]
            if parallel.is_main():
                save_checkpoint(self.folder / "best.pkl", self.state())

    @torch.inference_mode()
    def _log_images(self, log: SummaryWriter) -> None:
        """A few training images beside their targets and predictions, the first three heads as red, green and blue."""
        n = min(self.config.train.n_image_log, len(self.loader.dataset))
        for index in range(n):
            item = self.loader.dataset.item(index, self.epoch)
            logits = self.average(torch.from_numpy(item["image"])[None].to(self.device))
            heads = [head for head in self.average.heads if head in item]
            truth = np.concatenate([np.minimum(item[head], 1) for head in heads])
            guess = np.concatenate([torch.sigmoid(logits[head][0].float()).amax(0, True).cpu() for head in heads])
            panels: list[NDArray] = [item["image"] / 255, _as_rgb(truth), _as_rgb(guess)]
            log.add_image(f"train/{index}", np.concatenate(panels, axis=2), self.epoch)


class Meters:
    """Time, loss and pixel IoU a head, of the last batch and of the epoch."""

    def __init__(self, heads: Mapping[str, Any]) -> None:
        self.time, self.io, self.loss = Meter(), Meter(), Meter()
        self.iou = {head: Meter() for head in heads}
        self._rows: list[Tensor] = []
        self._last = time.monotonic()

    def tick(self, waited: float) -> None:
        now = time.monotonic()
        self.time.update(now - self._last)
        self.io.update(waited)
        self._last = now

    def note(self, row: Tensor) -> None:
        """What a process has seen in a step: images, their summed loss, and `count_pixels` of each head; (2 + 2 * n,).

        It stays on the device, which a number that is read would have to wait for.
        """
        self._rows.append(row)

    def settle(self) -> Meters:
        """Bring in what was noted since the last time, over all processes; every process has to call it then."""
        if self._rows:
            rows = torch.stack(self._rows)
            for n, loss, *counts in np.reshape(parallel.sums(rows.flatten().tolist()), rows.shape).tolist():
                self.loss.update(loss / n, round(n))
                for meter, both, either in zip(self.iou.values(), counts[::2], counts[1::2], strict=True):
                    meter.update(both / max(either, 1), round(n))
        self._rows.clear()
        return self

    def line(self, epoch: int, step: int, n_steps: int) -> str:
        """The progress line of a step."""
        ious = "    ".join(f"IoU({head.title()}): {m.value:.3f} ({m.mean:.3f})" for head, m in self.iou.items())
        return (
            f"Epoch: [{epoch}][{step}/{n_steps}]    Time: {self.time.mean:.3f} (io: {self.io.mean:.3f})    "
            f"Loss: {self.loss.value:.4f} ({self.loss.mean:.4f})    {ious}"
        )

    def means(self) -> dict[str, float]:
        """The mean loss, and the pixel IoU of each head; nothing where there was no step."""
        if not self.loss.count:
            return {}
        return {"loss": self.loss.mean, **{f"iou/{head}": m.mean for head, m in self.iou.items()}}


def count_pixels(logits: Tensor, target: Tensor) -> Tensor:
    """Pixels that are something, of any colour or label, by network and target both, and by either; (2,) float32."""
    guess, truth = logits.amax(1, keepdim=True) > 0, target > 0.5
    return torch.stack([torch.count_nonzero(guess & truth), torch.count_nonzero(guess | truth)]).float()


def adapt(model: Network, train: Train, device: torch.device) -> Network:
    """The network as the settings of training want it, its tensors and their names unchanged.

    Raises
    ------
    ValueError
        ``sync_batchnorm`` without GPUs.
    """
    if train.sync_batchnorm and parallel.world() > 1:
        if device.type != "cuda":
            raise ValueError(
                f"[train] sync_batchnorm = True: PyTorch has it on GPUs, this is {device}; set it to False"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if train.compile:  # in place: a compiled copy would have other names in its checkpoints
        (model.encoder if isinstance(model, MaskRCNN) else model).compile()
    return model


def share_gradients(learner: Learner) -> nn.Module:
    """Of many processes, let all have the mean of their gradients; the weights are the main one's.

    Only where a head is not trained, which leaves its own layers without gradient, does every step look for such.
    Buffers stay each process's own: see `norm_statistics`.
    """
    if parallel.world() == 1:
        return learner
    idle = set(learner.network.heads) - set(learner.criterion.terms) - {"instance"}
    options: dict[str, Any] = {
        _SYNC_BUFFERS: False,
        "gradient_as_bucket_view": True,
        "find_unused_parameters": bool(idle),
    }
    return DistributedDataParallel(learner, **options)


def norm_statistics(network: nn.Module) -> list[Tensor]:
    """The running means and variances of all norms that keep such, in the order of the network."""
    norms = [part for part in network.modules() if isinstance(part, _NormBase) and part.track_running_stats]
    found = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    return [value for value in found if value is not None]


@contextmanager
def autotuned_convolutions() -> Iterator[None]:
    """Let cuDNN try which kernels are fastest; for inputs of one size, since it tries again for each."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def log_graph(log: SummaryWriter, network: Network) -> None:
    """Write the graph of a network to the TensorBoard log; one that cannot be traced is trained all the same."""
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=network.mean.device)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # about what a trace must not be used for; this one is looked at
            log.add_graph(network, image, use_strict_trace=False)
    except Exception as error:  # whatever a network of some library does that a trace cannot follow
        logger.warning("no graph in the TensorBoard log: %s", one_line(error))


def group_parameters(model: Network, encoder_rate: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: the encoder's and the rest, in the order of the model; "rate" scales their learning
    rate."""
    encoder = set() if model.encoder is None else set(model.encoder.parameters())
    groups = [
        {"params": [p for p in model.parameters() if p in encoder], "rate": encoder_rate},
        {"params": [p for p in model.parameters() if p not in encoder], "rate": 1.0},
    ]
    return [group for group in groups if group["params"]]


def _is_pretrained(config: Config, model: Network) -> bool:
    """Whether the encoder begins with weights that are worth keeping."""
    return isinstance(model.encoder, LibraryEncoder) and config.param.encoder_weights != "none"


def encoder_rate(config: Config, model: Network) -> float:
    """The learning rate of the encoder, as a multiple of the others'."""
    wanted = config.param.encoder_rate
    if wanted == "auto":
        return 0.5 if _is_pretrained(config, model) else 1.0
    return wanted


def thaw_epoch(config: Config, model: Network) -> float | None:
    """The epoch from which the encoder is trained: at once where there are no weights to keep; None: when the learning
    rate has risen, so that what other layers learn in haste does not spoil it."""
    if not _is_pretrained(config, model):
        return 0
    wanted = config.param.freeze_epochs
    if wanted == "auto" and not model.frozen:
        return None
    return wanted if isinstance(wanted, int) else math.inf


def pick_rules(config: Config, heads: tuple[str, ...]) -> dict[str, str]:
    """head -> its losses, of the heads that the settings want trained.

    Raises
    ------
    ValueError
        ``[contour] exclusive`` with a network without contour head.
    """
    wanted = [head for head in heads if head != "contour" or config.contour.detect]
    if config.contour.exclusive:
        wanted = [head for head in wanted if head == "contour"]
        if not wanted:
            raise ValueError(f"[contour] exclusive = True trains the contour alone, {config.param.model} does not")
    return {head: getattr(config.loss, head) for head in wanted if head != "instance"}  # a detector brings its own


def refuse_infinite(losses: Mapping[str, Tensor]) -> None:
    """A term that is not finite is an error that names its head."""
    finite = torch.isfinite(torch.stack([value.detach() for value in losses.values()])).tolist()
    if not all(finite):
        broken = [name for name, fine in zip(losses, finite, strict=True) if not fine]
        raise ValueError(f"the loss {', '.join(broken)} is not finite; a lower [param] learn_rate may help")


@torch.no_grad()
def update_average(average: Network, model: Network, decay: float) -> None:
    """Move the averaged weights, and the statistics of its norms, a step towards the model's."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def _as_rgb(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, H, W) in [0, 1] -> (3, H, W): at most three maps as colours, absent ones black."""
    return np.concatenate([maps[:3], np.zeros((max(3 - len(maps), 0), *maps.shape[1:]), np.float32)])


def _timed(
    batches: Generator[Batch, None, None], steps: Sequence[Sequence[Piece]]
) -> Iterator[tuple[list[tuple[Batch, Piece]], float]]:
    """The batches of each step, and the seconds they were waited for."""
    for pieces in steps:
        began = time.monotonic()
        parts = [(next(batches), piece) for piece in pieces]
        yield parts, time.monotonic() - began
