"""Find the thresholds and rules that separate nuclei best, form a second opinion, and keep both with the checkpoint.

    python tune.py                                   of best.pkl, on the validation images
    python tune.py checkpoint/a.pkl checkpoint/b.pkl of that ensemble: kept in the first
    python tune.py --dry-run                         only say what was found
    python tune.py --export weights/mine.pkl         also write a small file: the network alone, in half precision
    python tune.py --training-images 600             let the second opinion learn of more of them (default: 300)
    python tune.py all.pkl --like checkpoint/a.pkl   take over what was found for another, and look at no image

Probability maps are predicted once; `[param] threshold`, `threshold_mark` and rules of `[post]` are tried on them.
What you set yourself (config.ini, --set) is not searched. Then a second opinion learns how good each candidate for a
nucleus is, and chooses among all ways to cut ([post] policy = forest): one from training images, and one from the
validation images, both judged on each kind of image by what other kinds taught. The better of the two is kept where it
does better than thresholds judged in that way, and these where they do no worse than the settings as they are. valid.py
then uses what was found, unless you set it.

--like is for a network that was trained further, from another, with all images: none is left to tune it on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from confidence import Opinion
from config import CHECKPOINT_KEYS, Config, look_up
from detector import MaskRCNN
from division import group_records, recall_side
from helper import (
    DEFAULT_WEIGHTS,
    find_checkpoint,
    fingerprint,
    load_checkpoint,
    make_parser,
    prepare_process,
    run_script,
    save_checkpoint,
    slim,
)
from image import ImageError, read_image, read_labels
from model import build_model
from pipeline import ordered
from predict import Segmenter, load_segmenter
from record import Record
from tuning import GRID, WITH_OPINION, Case, Lesson, Tuner, examine, form_from_lessons, form_opinion

#: Processes that judge, at most: each holds all maps.
MOST_WORKERS = 8


def run(config: Config, args: argparse.Namespace) -> int:
    prepare_process()
    paths = args.checkpoint or [find_checkpoint(args.checkpoint_dir)]
    refuse_nonsense(config, args, paths)
    if args.like is not None:
        adopt(paths[0], args.like, args.export, args.dry_run)
        return 0
    segmenter = load_segmenter(paths, config, tuned=False)
    if isinstance(segmenter.networks[0], MaskRCNN):
        raise ValueError("a maskrcnn makes no maps to tune on; set [post] min_score by hand")
    print(f"Tuning {', '.join(str(path) for path in paths)} on {segmenter.device}")
    records = recall_side(args.data, config, segmenter.saved, "valid")
    if not records:
        raise ValueError("the split holds no validation image; see [dataset] cv_ratio and valid_ids")
    known = pick_known(segmenter, config, args.data, args.training_images) if wants_opinion(config) else []
    segmenter = segmenter.for_many(len(records) + len(known))
    began = time.monotonic()
    cases = list(predict_cases(segmenter, config, records))
    if not cases:
        raise ValueError("no validation image could be read; see above")
    lessons = study(segmenter, config, known)
    predicted = time.monotonic()
    with Tuner(cases, segmenter.config, n_worker=min(os.cpu_count() or 1, len(cases), MOST_WORKERS)) as tuner:
        best = tuner.search()
        before, after, honest = tuner.scores(tuner.start), tuner.scores(best), tuner.cross_validate()
    columns = {"before": before, "tuned": after, "tuned on others": honest}
    if honest.mean() < before.mean():  # what looks better on these images is worse on others
        best, after, honest = tuner.start, before, before
    found: dict[str, Any] = {"values": dict(best), "scores": {"score": after.mean(), "cross_validated": honest.mean()}}
    formed = form_opinions(cases, lessons, segmenter.config) if wants_opinion(config) else {}
    for title, (opinion, scores) in formed.items():
        columns[title] = scores
        if scores.mean() > found["scores"]["cross_validated"]:
            found["opinion"] = {"values": dict(WITH_OPINION), "weights": opinion.state_dict()}
            found["scores"]["cross_validated"] = scores.mean()
    print(format_gain([case.kind for case in cases], columns))
    print(format_choice(found, segmenter.config))
    print(
        f"{len(cases) + len(lessons)} images predicted in {predicted - began:.0f} s, {tuner.n_judged} choices judged"
        f"{' and opinions formed' if formed else ''} in {time.monotonic() - predicted:.0f} s"
    )
    if not args.dry_run:
        for way in (found, found.get("opinion", found)):
            way["values"] |= chosen(segmenter.config)
        found["scores"] = {name: float(value) for name, value in found["scores"].items()}
        keep(paths, segmenter.fingerprint, found, args.export)
    return 0


def adopt(path: Path, other: Path, export: Path | None, dry_run: bool) -> None:
    """Keep with the checkpoint `path` what was found for `other`, whose maps must mean the same.

    Raises
    ------
    ValueError
        Nothing was found for the other by itself, or it has other heads, or sees or learns something else.
    """
    states = [load_checkpoint(p) for p in (path, other)]
    found = states[1].get("tuned", {}).get(fingerprint(states[1:]))
    if not found:
        raise ValueError(f"--like {other}: holds nothing that was found for it alone, as it is; run tune.py on it")
    ours, theirs = map(meaning, states)
    for name, value in theirs.items():
        if value != ours[name]:
            raise ValueError(f"--like {other}: another {name}, {value}; that of {path} is {ours[name]}")
    print(format_choice(found, Config().inherit(states[0]["config"], CHECKPOINT_KEYS)))
    if not dry_run:
        keep([path], fingerprint(states[:1]), {key: value for key, value in found.items() if key != "scores"}, export)


def meaning(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same where thresholds for the maps of one network are to hold for another's."""
    config = Config().inherit(checkpoint["config"])
    return {
        "choice of heads": build_model(checkpoint["model"], **checkpoint["options"]).heads,
        "section [contour]": config.contour,
        "way to read images": config.pre.policy,
        "nucleus_diameter": config.pre.nucleus_diameter,
    }


def pick_known(segmenter: Segmenter, config: Config, data: Path, most: int) -> list[Record]:
    """Images that the first checkpoint was trained on, at most so many, evenly of all kinds; none, and a line that says
    why, where there are none."""
    if not most:
        return []
    try:
        records = recall_side(data, config, segmenter.saved, "train")
    except ValueError as error:  # a folder that holds what validates alone, or lists that leave no other
        print(f"no training images to learn of: {error}", file=sys.stderr)
        return []
    return sorted(records, key=lambda record: record.sub_category)[:: -(-len(records) // most) or 1]


def study(segmenter: Segmenter, config: Config, records: Sequence[Record]) -> list[Lesson]:
    """The candidates of each image, as `tuning.examine` gives them.

    The network knows these images, so its maps of them are better than those of others will be; that many more
    candidates can be learned from is worth more than that.
    """
    asked = segmenter.config.suggest(WITH_OPINION)
    seen = predict_cases(segmenter, config, records)
    return list(ordered(lambda case: examine(case, asked), seen, config.train.n_worker))


def form_opinions(
    cases: Sequence[Case], lessons: Sequence[Lesson], config: Config
) -> dict[str, tuple[Opinion, NDArray[np.float64]]]:
    """Title -> a second opinion, and the scores of the cases by one that has seen neither them nor their kin, nor
    their kinds where there are several."""
    asked, formed = config.suggest(WITH_OPINION), {}
    if (of_others := form_opinion(cases, asked)) is not None:
        formed["opinion of others"] = of_others
    if (of_training := form_from_lessons(lessons, cases, asked)) is not None:
        formed["opinion of training"] = of_training
    return formed


def wants_opinion(config: Config) -> bool:
    """Whether the settings leave it open how nuclei are separated."""
    return not {"post.policy", "post.marker", "post.segmentation"} & config.user_set


def format_choice(found: Mapping[str, Any], config: Config) -> str:
    """What changes, to print: the settings one a line, and whether there is a second opinion."""
    values = found.get("opinion", found)["values"]
    changed = {key: value for key, value in values.items() if config.suggest({key: value}) != config}
    lines = [f"{key} = {value}" for key, value in changed.items()] or ["nothing to change"]
    return "\n".join([*lines, f"second opinion: {'kept' if 'opinion' in found else 'none is kept'}"])


def refuse_nonsense(config: Config, args: argparse.Namespace, paths: Sequence[Path]) -> None:
    """What can be known to be wrong before anything is predicted."""
    if args.training_images < 0:
        raise ValueError(f"--training-images {args.training_images}: wanted 0 or more")
    if args.like is not None and len(paths) > 1:
        raise ValueError(f"--like {args.like}: holds for one network, several are named")
    if args.export is not None and (args.dry_run or len(paths) > 1):
        why = "--dry-run writes nothing" if args.dry_run else "it writes one network, several are named"
        raise ValueError(f"--export {args.export}: {why}")
    ships = [path for path in paths if path.resolve().parent == DEFAULT_WEIGHTS.resolve().parent]
    if ships and not args.dry_run:
        raise ValueError(f"{ships[0]} ships with the toolkit and is not changed; tune a copy, or say --dry-run")
    if args.export is not None and args.export.resolve() in [path.resolve() for path in paths]:
        raise ValueError(
            f"--export {args.export}: is what is tuned, and holds more than the network; name another file"
        )
    if all(key in config.user_set for key in GRID):
        raise ValueError("everything that could be tuned is set by the settings")
    if config.post.policy == "forest":
        raise ValueError("[post] policy = forest: tune.py finds out itself where that helps; leave it at auto")


def chosen(config: Config) -> dict[str, object]:
    """What the user has set and the search took for granted."""
    keys = {
        *GRID,
        *WITH_OPINION,
        *CHECKPOINT_KEYS,
        "post.min_quality",
        "valid.ensemble",
        "valid.ensemble_weights",
    } & config.user_set
    dump = config.to_dict()
    return {key: look_up(dump, key) for key in sorted(keys)}


def predict_cases(segmenter: Segmenter, config: Config, records: Sequence[Record]) -> Iterator[Case]:
    """The images with their masks, predicted one by one."""
    groups = group_records(records, config.dataset.cv_group)
    kin = {record.id: str(number) for number, group in enumerate(groups) for record in group}
    for record in tqdm(records, "predicting", disable=None):
        try:
            if record.problem or record.masks is None:
                raise ImageError(record.problem or f"{record.image}: has no masks to tune against")
            image = read_image(record.image, *segmenter.config.pre.policy)
            truth = read_labels(record.masks, image.shape[:2])
        except ImageError as error:
            if config.dataset.on_bad == "refuse":
                raise
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        yield Case.pack(record.sub_category, segmenter.members(image), truth, kin[record.id])


def format_gain(kinds: Sequence[str], columns: Mapping[str, NDArray[np.float64]]) -> str:
    """A table of scores by kind; a column the scores of all images in some way."""
    names, kind = sorted(set(kinds)), np.array(kinds)
    rows = [(name or "uncategorised", kind == name) for name in names] + [("all", np.ones(len(kind), bool))]
    lines = [f"{'category':<20}{'images':>7}" + "".join(f"  {title:>8}" for title in columns)]
    for name, mine in rows:
        scores = (f"  {values[mine].mean():>{max(len(title), 8)}.4f}" for title, values in columns.items())
        lines.append(f"{name:<20}{mine.sum():>7}" + "".join(scores))
    return "\n".join(lines)


def keep(
    paths: Sequence[Path],
    fingerprint_then: str,
    found: Mapping[str, Any],
    export: Path | None,
) -> None:
    """Store what was found in the first checkpoint, and write the small one where it is wanted."""
    states = [load_checkpoint(path) for path in paths]
    if fingerprint(states) != fingerprint_then:
        raise ValueError(f"{', '.join(map(str, paths))}: changed while being tuned; is a training running?")
    first = states[0] | {"tuned": {**states[0].get("tuned", {}), fingerprint_then: dict(found)}}
    save_checkpoint(paths[0], first)
    print(f"kept in {paths[0]}")
    if export is not None:
        save_checkpoint(export, slim(first))
        print(f"{export}: {export.stat().st_size / 1e6:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", nargs="*", type=Path, metavar="CKPT", help="checkpoints; several: an ensemble")
    parser.add_argument("--dry-run", action="store_true", help="store nothing")
    parser.add_argument(
        "--training-images", type=int, default=300, metavar="N", help="most to learn of (default: 300; 0: none)"
    )
    parser.add_argument("--like", type=Path, metavar="FILE", help="take over what was found for this checkpoint")
    parser.add_argument("--export", type=Path, metavar="FILE", help="also write the network alone, in half precision")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
