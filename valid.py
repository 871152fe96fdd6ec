"""Predict: show, save, score and export the nuclei of images.

    python valid.py                                  show data/test on the screen, or in a notebook cell
    python valid.py --csv                            write result.csv, the competition's run-length form
    python valid.py --dataset valid --iou            score the validation images
    python valid.py checkpoint/100.pkl checkpoint/best.pkl --csv        an ensemble
    python valid.py --input photos/ --save --label   figures and label maps of your own images
    python valid.py --input slide.tif                a slide of any size: label map and outlines, block by block
    torchrun --nproc-per-node 4 valid.py --csv       four processes share the images, one result.csv

Without a checkpoint named, best.pkl of the checkpoint folder is used, else its newest, else the weights that ship.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import parallel
import plot
from annotation import WRITERS, encode_rle, write_runs
from color import equalize
from config import Config
from division import recall_side
from engine import LEAST_IMAGES
from helper import find_checkpoint, make_parser, prepare_process, run_script
from image import ImageError, read_image, read_labels
from pipeline import ordered
from predict import Segmenter, load_segmenter
from record import Record, find_records, load_records
from score import Score, format_errors, format_summary, score_image, summarize, write_scores
from slide import is_slide, is_zarr, open_slide
from stream import segment_slide


@dataclass
class Result:
    """One image, predicted: `probs` head -> (H, W) or (C, H, W), `labels` and `truth` (H, W) int32, `quality` (N,)."""

    record: Record
    image: NDArray[np.uint8]
    probs: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int32]
    truth: NDArray[np.int32] | None
    quality: NDArray[np.float32] | None = None

    @cached_property
    def score(self) -> Score | None:
        """Against the truth, where it is known."""
        return None if self.truth is None else score_image(self.record, self.truth, self.labels)


@dataclass
class Tally:
    """What a run has come to."""

    images: int = 0
    nuclei: int = 0
    scores: list[Score] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)  # id and text; of many processes, printed at the end
    runs: list[tuple[str, list[str]]] = field(default_factory=list)  # id and nuclei for the CSV, likewise

    def tell(self, image_id: str, line: str) -> None:
        """Print a line about an image; of many processes, the main one will."""
        if parallel.world() > 1:
            self.lines.append((image_id, line))
        else:
            tqdm.write(line)


def run(config: Config, args: argparse.Namespace) -> int:
    prepare_process()
    paths = args.checkpoint or [find_checkpoint(args.checkpoint_dir)]
    segmenter = load_segmenter(paths, config)
    if len(set(parallel.merge([segmenter.fingerprint]))) > 1:
        raise ValueError(f"{paths[0]}: other weights in another process; name checkpoints that all machines share")
    print(f"Using {', '.join(str(path) for path in paths)} on {segmenter.device}")
    chosen = choose_records(args, config, segmenter.saved)
    records, slides = part_slides(chosen, args, config.valid.slide_size)
    if args.iou and all(record.masks is None for record in records):
        raise ValueError("--iou: none of the images has masks to be scored against")
    refuse_overwriting(records, args)
    if records and parallel.world() > 1 and draws(args) and not args.save:
        raise ValueError(f"{parallel.world()} processes show no figures; say --save, --csv, or what else to write")

    tally, folder, began = Tally(), args.output or Path("."), time.monotonic()
    if not draws(args):
        segmenter = segmenter.for_labels()
    segmenter = segmenter.for_many(len(records) + LEAST_IMAGES * len(slides))
    stream_slides(parallel.share(slides), segmenter, args, tally)
    delivered = deliver(predict_all(parallel.share(records), segmenter, tally), segmenter.config, args, tally)
    runs: Iterable[tuple[str, list[str]]]
    runs = ((image_id, encode_rle(labels) if args.csv else []) for image_id, labels in delivered)
    if parallel.world() > 1:
        tally.runs.extend(runs)
        tally = bring_together(parallel.to_main(tally), chosen)
        runs = tally.runs
        if not parallel.is_main():
            return 0
        print("".join(f"{line}\n" for _, line in tally.lines), end="")
    if args.csv:
        write_runs(folder / "result.csv", runs)
        print(f"{folder / 'result.csv'}: {tally.nuclei} nuclei in {tally.images} images")
    else:
        deque(runs, maxlen=0)
    if tally.scores:
        print(format_summary(summarize(tally.scores)))
    if args.iou:
        print(format_errors(tally.scores))
        write_scores(folder / "iou.csv", tally.scores)
        print(f"{folder / 'iou.csv'}: scores of {len(tally.scores)} images")
    refused = f", {len(tally.refused)} refused" if tally.refused else ""
    print(f"{tally.images} images in {time.monotonic() - began:.1f} s{refused}")
    return 3 if tally.refused else 0


def draws(args: argparse.Namespace) -> bool:
    """Whether figures are asked for, or nothing else."""
    return args.save or not any(getattr(args, name) for name in ("csv", "iou", *WRITERS))


def refuse_overwriting(records: Sequence[Record], args: argparse.Namespace) -> None:
    """Results never take the place of the images they are of, nor of their masks."""
    folder = args.output or args.data / "predict"
    suffixes = [suffix for suffix, wanted in ((".png", args.save), (".tif", args.label)) if wanted]
    for record in records if suffixes or args.mask else ():
        masks = record.masks[:1] if isinstance(record.masks, tuple) else (record.masks,)
        pairs = [(folder / f"{record.id}{s}", path) for s in suffixes for path in (record.image, *masks) if path]
        pairs += [(folder / record.id / "masks", path.parent) for path in masks if path and args.mask]
        for written, read in pairs:
            if written.exists() and written.samefile(read):
                raise ValueError(f"{read}: would be replaced by a result; choose another --output")


def bring_together(tallies: Sequence[Tally], records: Sequence[Record]) -> Tally:
    """What many processes have come to, in the order of the images, as one would have done it."""
    place = {record.id: number for number, record in enumerate(records)}
    return Tally(
        sum(tally.images for tally in tallies),
        sum(tally.nuclei for tally in tallies),
        sorted((score for tally in tallies for score in tally.scores), key=lambda score: place[score.id]),
        sorted((name for tally in tallies for name in tally.refused), key=lambda name: place[name]),
        sorted((line for tally in tallies for line in tally.lines), key=lambda line: place[line[0]]),
        sorted((run for tally in tallies for run in tally.runs), key=lambda run: place[run[0]]),
    )


def choose_records(args: argparse.Namespace, config: Config, saved: Mapping[str, Any]) -> list[Record]:
    """The images the command line asks for; those of the split that a checkpoint with the settings `saved` was
    trained on."""
    if args.input is not None and is_zarr(args.input):
        return [Record(args.input.stem, args.input)]
    if args.input is not None:
        return find_records(args.input)
    folder = args.data / args.dataset
    if args.dataset == "test":
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; name images by --input, or a split by --dataset valid")
        return load_records(folder, args.data, config.dataset)
    records = recall_side(args.data, config, saved, args.dataset)
    if not records:
        raise ValueError(f"the split holds no image for --dataset {args.dataset}; see [dataset] cv_ratio and valid_ids")
    return records


def part_slides(
    records: Sequence[Record], args: argparse.Namespace, megapixels: float
) -> tuple[list[Record], list[Record]]:
    """Images to be held in memory, and those that are too large for it."""
    slides = [record for record in records if not record.problem and is_slide(record.image, megapixels)]
    asked = [
        name for name in ("csv", "iou", "save", *WRITERS) if name not in ("label", "geojson") and getattr(args, name)
    ]
    if slides and asked:
        raise ValueError(
            f"{slides[0].image}: a Zarr, or above [valid] slide_size = {megapixels:g} megapixels: it becomes a label "
            f"map and outlines; --{asked[0]} is for images held in memory, as a larger slide_size has TIFFs held"
        )
    large = {record.id for record in slides}
    return [record for record in records if record.id not in large], slides


def stream_slides(slides: Sequence[Record], segmenter: Segmenter, args: argparse.Namespace, tally: Tally) -> None:
    """Predict slides block by block; one that cannot be used is named and passed over."""
    for record in slides:
        began = time.monotonic()
        try:
            slide = open_slide(record.image, segmenter.config.pre.policy)
            found = segment_slide(slide, segmenter, args.output or args.data / "predict", record.id)
        except ImageError as error:
            tally.refused.append(record.id)
            print(f"refused: {error}", file=sys.stderr)
            continue
        tally.images += 1
        tally.nuclei += found.nuclei
        earlier = f", {found.done} of them done before" if found.done else ""
        tally.tell(
            record.id,
            f"{' and '.join(map(str, found.files))}: {found.nuclei} nuclei in {slide.shape[0]} x {slide.shape[1]} "
            f"pixels, {found.blocks} blocks{earlier}, {time.monotonic() - began:.1f} s",
        )


def predict_all(records: Sequence[Record], segmenter: Segmenter, tally: Tally) -> Iterator[Result]:
    """Predict image by image, in order; one that cannot be used is named and passed over.

    While the network works on an image, threads read the next ones and separate the nuclei of those before.
    """
    n_worker, policy = segmenter.config.train.n_worker, segmenter.config.pre.policy
    read = ordered(lambda record: _read(record, policy), records, n_worker)
    seen = (item if isinstance(item, Refusal) else (*item, *segmenter.begin(item[1])) for item in read)
    with closing(read), closing(ordered(_finish, seen, n_worker)) as finished:
        for found in tqdm(finished, "predicting", len(records), disable=parallel.bar_off()):
            if isinstance(found, Refusal):
                tally.refused.append(found.id)
                tqdm.write(f"refused: {found.reason}", file=sys.stderr)
            else:
                yield found


class Refusal(NamedTuple):
    """An image that cannot be used, and why."""

    id: str
    reason: str


def _read(
    record: Record, policy: Sequence[Any]
) -> Refusal | tuple[Record, NDArray[np.uint8], NDArray[np.int32] | None]:
    """The image and, where it is known, the truth."""
    try:
        if record.problem:
            raise ImageError(record.problem)
        image = read_image(record.image, *policy)
        return record, image, read_labels(record.masks, image.shape[:2]) if record.masks is not None else None
    except ImageError as error:
        return Refusal(record.id, str(error))


def _finish(item: Refusal | tuple) -> Refusal | Result:
    if isinstance(item, Refusal):
        return item
    record, image, truth, probs, finish = item
    found = finish()
    return Result(record, image, probs, found.labels, truth, found.quality)


def deliver(
    results: Iterable[Result], config: Config, args: argparse.Namespace, tally: Tally
) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Score, export and draw each result as the command line asks, and hand on its id and labels."""
    writers = [name for name in WRITERS if getattr(args, name)]
    folder = args.output or args.data / "predict"
    for result in results:
        if draws(args):
            figure = draw(result, config)
            if args.save:
                plot.save(figure, folder / f"{result.record.id}.png")
            elif not plot.show(figure, config.valid.figure_position):
                print("No display here: --save writes the figures to files")
                return
        tally.images += 1
        tally.nuclei += int(result.labels.max(initial=0))
        if result.score is not None:
            tally.scores.append(result.score)
        if config.valid.print_table:
            score = (
                "" if result.score is None else f"  mAP {result.score.mean_precision:.4f}  IoU {result.score.iou:.4f}"
            )
            tally.tell(result.record.id, f"{result.record.id}  {result.labels.max(initial=0)} nuclei{score}")
        for name in writers:
            WRITERS[name](folder, result.record.id, result.labels, result.quality)
        yield result.record.id, result.labels


def draw(result: Result, config: Config):
    """The image beside its nuclei, the truth where it is known, and the probability maps, as a figure."""
    image = result.image
    if config.pre.color_space != "rgb":  # the network was shown false colours
        image = read_image(result.record.image, *config.pre.policy.shown)
    if config.valid.view_color_equalize:
        image = equalize(image)
    panels: dict[str, NDArray[Any]] = {
        "image": image,
        f"{result.labels.max()} nuclei": plot.overlay(image, result.labels),
    }
    title = result.record.id
    if result.truth is not None and (score := result.score) is not None:
        panels[f"{result.truth.max()} true"] = plot.overlay(image, result.truth)
        panels["truth, prediction, both"] = plot.compare(image, result.labels, result.truth)
        title = f"{title}   mAP {score.mean_precision:.3f}   IoU {score.iou:.3f}"
    for head, probs in result.probs.items():
        panels[head] = probs
        if probs.ndim == 3:  # of several channels the most certain one, as a label
            panels[head] = np.where(probs.max(0) > config.thresholds[head], probs.argmax(0) + 1, 0)
    return plot.side_by_side(panels, title)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "checkpoint", nargs="*", type=Path, metavar="CKPT", help="checkpoints; several make an ensemble"
    )
    parser.add_argument("--dataset", choices=("test", "valid", "train"), default="test", help="default: test")
    parser.add_argument("--input", type=Path, metavar="PATH", help="an image, a folder of images, or the Kaggle layout")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write")
    parser.add_argument("--save", action="store_true", help="write side-by-side figures")
    parser.add_argument("--csv", action="store_true", help="write result.csv, run-length coded")
    parser.add_argument("--iou", action="store_true", help="score against the masks, write iou.csv")
    for name, write in WRITERS.items():
        parser.add_argument(
            f"--{name}", action="store_true", help=f"write {str(write.__doc__).splitlines()[0].rstrip('.')}"
        )
    return run_script(run, parser, argv, many=True)


if __name__ == "__main__":
    sys.exit(main())
