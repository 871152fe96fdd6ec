"""Train a network.

    python train.py                                  resume, or start where there is nothing to resume
    python train.py --no-resume --epoch 200          start anew, for 200 epochs
    python train.py --minutes 60                     the schedule follows the clock
    python train.py --init weights/default.pkl       fine-tune
    python train.py --set param.model=caunet --set dataset.valid_ids=valid_ids.txt

Reads data/train (and data/valid, or splits by [dataset] cv_ratio or valid_ids); writes checkpoints and a
TensorBoard log into the checkpoint folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tensorboardX import SummaryWriter
from tqdm import tqdm

from config import Config
from dataset import build_loader, open_cache
from helper import (
    load_checkpoint,
    make_parser,
    pick_device,
    pick_precision,
    prepare_process,
    read_current,
    run_script,
    set_aside,
)  # fmt: skip
from image import Cache, ImageError
from model import Network, build_model, model_options, place
from predict import Segmenter
from record import Record, count_by, load_split
from score import score_image, summarize
from trainer import Span, Trainer, plan_span


def run(config: Config, args: argparse.Namespace) -> int:
    prepare_process()
    torch.manual_seed(config.train.seed)
    device = pick_device(config.train.device)
    precision = pick_precision(config.train.precision, device)
    state = _resume_state(config, args)
    model = place(build_model(config.param.model, **model_options(config)), device)

    cache = open_cache(config, args.data)
    train, valid = load_split(args.data, config.dataset)
    train, valid, n_bad = _read_all(train, valid, cache, config)
    loader = build_loader(train, cache, config, model.heads)
    evaluate = _make_evaluate(valid, cache, config, device, precision) if valid else None
    trainer = Trainer(model, loader, config, args.checkpoint_dir, device, precision, evaluate)

    saved: Span | None = None
    if state is not None:
        trainer.restore(state)
        saved = trainer.span
    elif args.init:
        _initialize(model, trainer.average, args.init)
    trainer.span = plan_span(trainer.epoch, saved, args.epoch, args.minutes, config.train)
    if trainer.span.done(trainer.epoch):
        print(f"Trained to epoch {trainer.epoch} already; --epoch N or --minutes M trains on, --no-resume starts anew")
        return 0

    kinds = ", ".join(f"{name or 'uncategorised'} {n}" for name, n in count_by(train).items())
    print(f"{len(train)} training images ({kinds}), {len(valid)} for validation")
    print(f"{config.param.model} on {device} in {str(precision).removeprefix('torch.')}")
    if state is None:
        previous = set_aside(args.checkpoint_dir)
        print("Grand new training ..." + (f" (the last one is in {previous})" if previous else ""))
    else:
        print(f"Resuming after epoch {trainer.epoch} ...")
    print("Training started...")
    with SummaryWriter(str(args.checkpoint_dir / "log" / config.train.log_name)) as log:
        trainer.run(log)
    print(f"Training finished after epoch {trainer.epoch}: {args.checkpoint_dir / 'latest.pkl'}")
    return 3 if n_bad else 0


def _resume_state(config: Config, args: argparse.Namespace) -> dict | None:
    current = read_current(args.checkpoint_dir)
    if current is None or not args.resume or args.init:
        return None
    print(f"Loading checkpoint '{current}'")
    state = load_checkpoint(current)
    wanted = (config.param.model, model_options(config))
    if (state["model"], state["options"]) != wanted:
        raise ValueError(
            f"{current} holds a {state['model']} {state['options']}, the settings ask for a {wanted[0]} {wanted[1]}; "
            "start anew with --no-resume, or train in another --checkpoint-dir"
        )
    return state


def _read_all(
    train: list[Record], valid: list[Record], cache: Cache, config: Config
) -> tuple[list[Record], list[Record], int]:
    """Decode every image once, so that a bad one is known before training starts, and sits in the cache after."""

    def problem(record: Record) -> str | None:
        try:
            if record.masks is not None:
                cache.labels(record.image, record.masks)
            cache.image(record.image)
            return None if record.masks is not None else f"{record.image}: has no masks"
        except ImageError as error:
            return str(error)

    records = [*train, *valid]
    with ThreadPoolExecutor(max(config.train.n_worker, 1)) as pool:
        problems = list(tqdm(pool.map(problem, records), "reading", len(records), leave=False, disable=None))
    bad = {r.id: text for r, text in zip(records, problems, strict=True) if text}
    if bad and config.dataset.on_bad == "refuse":
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ImageError(f"{next(iter(bad.values()))}{more}; [dataset] on_bad = skip leaves such images out")
    for text in bad.values():
        print(f"skipped: {text}", file=sys.stderr)
    train, valid = ([r for r in records if r.id not in bad] for records in (train, valid))
    if not train:
        raise ValueError("no image is left to train on")
    return train, valid, len(bad)


def _make_evaluate(records: list[Record], cache: Cache, config: Config, device: torch.device, precision: torch.dtype):
    """network -> competition score and pixel IoU on the validation images, one view an image."""
    once = config.model_copy(update={"valid": config.valid.model_copy(update={"test_time_augment": ()})})

    def evaluate(model: Network) -> dict[str, float]:
        segmenter = Segmenter([model], once, device, precision)
        scores = []
        for record in tqdm(records, "validating", leave=False, disable=None):
            assert record.masks is not None
            labels = segmenter(np.asarray(cache.image(record.image)))
            scores.append(score_image(record, np.asarray(cache.labels(record.image, record.masks)), labels))
        row = summarize(scores)["all"]
        return {"score": row["score"], "ap50": row["ap50"], "iou": row["iou"]}

    return evaluate


def _initialize(model: Network, average: Network, path: Path) -> None:
    """Take over the weights that fit, and say what does not."""
    state = load_checkpoint(path)
    weights = state.get("average") or state["weights"]
    own = model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise ValueError(f"--init {path}: holds a {state['model']}, none of its weights fits {model.name}")
    for target in (model, average):
        target.load_state_dict(fitting, strict=False)
    fresh = sorted({name.rsplit(".", 1)[0] for name in own.keys() - fitting.keys()})
    print(
        f"Initialised {len(fitting)} of {len(own)} tensors from '{path}'"
        + (f"; fresh: {', '.join(fresh)}" if fresh else "")
    )


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
    return run_script(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
