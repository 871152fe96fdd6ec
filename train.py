"""Train a network.

    python train.py                                  resume, or start where there is nothing to resume
    python train.py --no-resume --epoch 200          start anew, for 200 epochs
    python train.py --minutes 60                     the schedule follows the clock
    python train.py --init other.pkl --lr 2e-4       fine-tune
    python train.py --set param.model=caunet --set dataset.valid_ids=docs/valid_ids.txt
    torchrun --nproc-per-node 4 train.py             four GPUs; see the README for several machines

Reads data/train (and data/valid, or splits by [dataset] cv_ratio or valid_ids); writes checkpoints and a
TensorBoard log into the checkpoint folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import parallel
from config import CHECKPOINT_KEYS, Config, pick
from dataset import build_loader, open_cache
from detector import MaskRCNN
from division import format_epoch, load_split
from helper import (
    is_restarted,
    load_checkpoint,
    make_parser,
    pick_device,
    pick_precision,
    prepare_process,
    read_current,
    run_script,
    set_aside,
)
from image import Cache, ImageError
from loss import Criterion
from metric import pixel_iou
from model import build_model, load_model, model_options, place
from network import Network
from pipeline import ordered
from postprocess import Probs, Separation
from predict import Segmenter
from record import Record
from schedule import SCHEDULES, plan_stretch
from score import Score, score_image, summarize
from target import make_targets, plan_targets
from trainer import Trainer, log_graph, pick_rules


def run(config: Config, args: argparse.Namespace) -> int:
    prepare_process()
    # Of many processes the main one reads: other machines need not see the folder it writes to.
    state, restarted = parallel.from_main(lambda: _resume_state(args))
    config, changed = _inherit(config, args, state)
    device = pick_device(config.train.device)
    torch.manual_seed(config.train.seed)
    model = place(build_model(config.param.model, **model_options(config)), device)
    precision = _pick_precision(config, device, state)
    if state is None:
        fresh = _initialize(model, args.init) if args.init else list(model.state_dict())
        _load_encoder(model, config, fresh)

    _rehearse(model, config, args)
    cache = open_cache(config, args.data)
    train, valid = load_split(args.data, config.dataset)
    train, valid, n_bad = _read_all(train, valid, cache, config)
    loader = build_loader(train, cache, config, model.heads, pin=device.type == "cuda")
    as_predicted = pick_precision(config.train.precision, device, [model], precision)
    evaluate = _make_evaluate(valid, cache, config, device, as_predicted) if valid else None
    teacher = _load_teacher(config, model, device)
    trainer = Trainer(model, loader, config, args.checkpoint_dir, device, precision, evaluate, teacher)
    loader.dataset.item(0, 0)

    if state is not None:
        trainer.restore(state)
    saved = None if state is None else trainer.stretch
    n_epoch, minutes = (None, None) if restarted else (args.epoch, args.minutes)
    trainer.stretch = plan_stretch(trainer.epoch, saved, n_epoch, minutes, config.train, changed)
    if trainer.finished:
        print(f"Trained to epoch {trainer.epoch} already; --epoch N or --minutes M trains on, --no-resume starts anew")
        return 0

    print(f"{len(train)} training images, {len(valid)} for validation")
    print(format_epoch(train, valid, loader.dataset.balance))
    if config.train.drawn_share:
        print(f"{config.train.drawn_share:.0%} of an epoch are synthetic images in their place ([train] drawn_share)")
    frozen = ", its encoder frozen" if trainer.frozen else ""
    many = f" by {parallel.world()} processes" if parallel.world() > 1 else ""
    print(f"{config.param.model} on {device} in {str(precision).removeprefix('torch.')}{frozen}{many}")
    if state is None:
        previous = parallel.from_main(lambda: set_aside(args.checkpoint_dir))
        print("Grand new training ..." + (f" (the last one is in {previous})" if previous else ""))
    else:
        print(f"Resuming after epoch {trainer.epoch} ...")
    print("Training started...")
    folder = str(args.checkpoint_dir / "log" / config.train.log_name)
    with SummaryWriter(folder) if parallel.is_main() else nullcontext() as log:
        if log is not None and state is None:
            log_graph(log, trainer.average)
        trainer.run(log)
    print(f"Training finished after epoch {trainer.epoch}: {args.checkpoint_dir / 'latest.pkl'}")
    return 3 if n_bad and parallel.is_main() else 0


def _resume_state(args: argparse.Namespace) -> tuple[dict | None, bool]:
    """The checkpoint to go on with, if any, and whether it is torchrun that has started this training again."""
    restarted = is_restarted(args.checkpoint_dir)
    resume = restarted or (args.resume and not args.init)
    current = read_current(args.checkpoint_dir) if resume else None
    if current is None:
        return None, False
    print(f"Loading checkpoint '{current}'")
    return load_checkpoint(current), restarted


def _load_encoder(model: Network, config: Config, fresh: list[str]) -> None:
    """Give the encoder its pretrained weights, where it is among what is fresh."""
    wanted = model.encoder is not None and any(name.startswith("encoder.") for name in fresh)
    if wanted and model.encoder.load_weights(config.param.encoder_weights):
        print(f"Encoder weights: {config.param.encoder_weights}")


def _load_teacher(config: Config, model: Network, device: torch.device) -> Network | None:
    """The network to learn from, if any, its trained heads active; one that has nothing to teach, or sees images in
    another way, is an error."""
    path = config.train.teacher
    if path is None:
        return None
    state = load_checkpoint(path)
    theirs = Config().inherit(state["config"], CHECKPOINT_KEYS)
    teacher = place(load_model(state), device)
    teacher.active = tuple(pick_rules(theirs, teacher.heads))
    if isinstance(model, MaskRCNN) or not set(teacher.active) & set(pick_rules(config, model.heads)):
        raise ValueError(f"[train] teacher = {path}: a {teacher.name} learned no head that {model.name} is to learn")
    if theirs.pre.policy != config.pre.policy:
        raise ValueError(
            f"[train] teacher = {path}: reads images by {theirs.pre.policy}, this network by {config.pre.policy}"
        )
    return teacher


def _inherit(config: Config, args: argparse.Namespace, state: dict | None) -> tuple[Config, bool]:
    """The settings to train with, and whether the user changed the length of a training that is resumed.

    A resumed training goes on with all settings it began with, the split among them, save those the user sets now;
    fine-tuning takes over how the network wants to see images.
    """
    if state is None:
        return (config.inherit(load_checkpoint(args.init)["config"], CHECKPOINT_KEYS) if args.init else config), False
    config = config.inherit(state["config"])
    wanted = (config.param.model, model_options(config))
    if (state["model"], state["options"]) != wanted:
        raise ValueError(
            f"{args.checkpoint_dir} holds a {state['model']} {state['options']}, the settings ask for a {wanted[0]} "
            f"{wanted[1]}; start anew with --no-resume, or train in another --checkpoint-dir"
        )
    before = state["config"]["train"]
    return config, (before["n_epoch"], before["minutes"]) != (config.train.n_epoch, config.train.minutes)


def _pick_precision(config: Config, device: torch.device, state: dict | None) -> torch.dtype:
    """As `pick_precision`, but a run that is resumed on such a device keeps the one it found."""
    if state is not None and config.train.precision == "auto" and state["device"] == device.type:
        return getattr(torch, state["precision"])
    return pick_precision(config.train.precision, device)


def _read_all(
    train: list[Record], valid: list[Record], cache: Cache, config: Config
) -> tuple[list[Record], list[Record], int]:
    """Decode every image once, so that a bad one is known before training starts, and sits in the cache after."""

    def problem(record: Record) -> str:
        if record.problem or record.masks is None:
            return record.problem or f"{record.image}: has no masks"
        try:
            cache.labels(record.image, record.masks)
            cache.image(record.image)
        except ImageError as error:
            return str(error)
        return ""

    records = [*train, *valid]
    mine, off = parallel.share(records), parallel.bar_off()
    with ThreadPoolExecutor(max(config.train.n_worker, 1)) as pool:
        found = list(tqdm(pool.map(problem, mine), "reading", len(mine), leave=False, disable=off))
    problems = parallel.merge(found)
    bad = {r.id: text for r, text in zip(records, problems, strict=True) if text}
    if bad and config.dataset.on_bad == "refuse":
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ImageError(f"{next(iter(bad.values()))}{more}; [dataset] on_bad = skip leaves such images out")
    for text in bad.values() if parallel.is_main() else ():
        print(f"skipped: {text}", file=sys.stderr)
    train, valid = ([r for r in records if r.id not in bad] for records in (train, valid))
    if not train:
        raise ValueError("no image is left to train on")
    return train, valid, len(bad)


def _make_evaluate(records: list[Record], cache: Cache, config: Config, device: torch.device, precision: torch.dtype):
    """network -> competition score, and pixel IoU of each head, on the validation images, one look at each."""
    valid = config.valid.model_copy(update={"test_time_augment": ()})
    once = config.model_copy(update={"valid": valid, "pre": config.pre.model_copy(update={"nucleus_diameter": 0.0})})

    def judge(item: tuple[Record, Probs, Callable[[], Separation]]) -> tuple[Score, dict[str, float]]:
        record, probs, finish = item
        assert record.masks is not None
        truth = np.asarray(cache.labels(record.image, record.masks))
        # Where the contour alone is trained there are no nuclei to find.
        labels = np.zeros_like(truth) if config.contour.exclusive else finish().labels
        targets = make_targets(truth, plan_targets(tuple(probs), config.pre, config.contour))
        sure = {head: p.max(0) if p.ndim == 3 else p for head, p in probs.items()}
        ious = {head: pixel_iou(targets[head][0] > 0.5, p > config.thresholds[head]) for head, p in sure.items()}
        return score_image(record, truth, labels), ious

    def evaluate(model: Network) -> dict[str, float]:
        segmenter = Segmenter([model], once, device, precision)
        mine = tqdm(parallel.share(records), "validating", leave=False, disable=parallel.bar_off())
        seen = ((record, *segmenter.begin(np.asarray(cache.image(record.image)))) for record in mine)
        scores, ious = zip(*parallel.merge(list(ordered(judge, seen, config.train.n_worker))), strict=True)
        row = summarize(scores)["all"]
        each = {f"iou/{head}": float(np.mean([of_image[head] for of_image in ious])) for head in ious[0]}
        if config.contour.exclusive:
            return {"score": each["iou/contour"], **each}
        return {"score": row["score"], "ap50": row["ap50"], **each}

    return evaluate


def _rehearse(model: Network, config: Config, args: argparse.Namespace) -> None:
    """Try losses, schedule, length and separation on a blank image: a wrong name is known before any image is read."""
    Criterion(pick_rules(config, model.heads))
    pick(SCHEDULES, config.train.schedule, "schedule")
    plan_stretch(0, None, args.epoch, args.minutes, config.train)
    Segmenter([model.eval()], config, model.mean.device, torch.float32)(np.zeros((32, 32, 3), np.uint8))


def _initialize(model: Network, path: Path) -> list[str]:
    """Take over the weights that fit, and say what does not; the names of the tensors that stay fresh."""
    state = load_checkpoint(path)
    weights = state.get("average") or state["weights"]
    own = {name: value for name, value in model.state_dict().items() if name not in ("mean", "std")}  # the settings'
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise ValueError(f"--init {path}: holds a {state['model']}, none of its weights fits {model.name}")
    model.load_state_dict(fitting, strict=False)
    fresh = sorted(own.keys() - fitting.keys())
    layers = sorted({name.rsplit(".", 1)[0] for name in fresh})
    print(
        f"Initialised {len(fitting)} of {len(own)} tensors from '{path}'"
        + (f"; fresh: {', '.join(layers)}" if layers else "")
    )
    return fresh


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where training stopped"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epoch", type=int, metavar="N", help="train N further epochs")
    length.add_argument("--minutes", type=float, metavar="M", help="train M minutes; the schedule follows the clock")
    parser.add_argument(
        "--lr", dest="set", action="append", type="param.learn_rate={}".format, metavar="X", help="learning rate"
    )
    parser.add_argument("--init", type=Path, metavar="FILE", help="start from the weights of a checkpoint")
    return run_script(run, parser, argv, many=True)


if __name__ == "__main__":
    sys.exit(main())
