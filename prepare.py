"""Prepare data.

    python prepare.py demo                               draw a small data set into data/demo
    python prepare.py demo --images 40 --seed 7
    python prepare.py download                           fetch the public set, unpack it into data/stage1_train
    python prepare.py add DIR --source TCGA              check images, copy them into data/train, book them
    python prepare.py add DIR --source TCGA --dry-run    say what it would do
    python prepare.py remove --source TCGA               move them to data/removed
    python prepare.py verify                             what is wrong with images and masks; data/verify.csv
    python prepare.py verify --csv labels.csv --blacklist data/blacklist.txt
    python prepare.py stats                              intensities, sizes, nuclei by kind; stats.png
    python prepare.py stats --write-config config.ini    and put mean and std into [pre] of that file

DIR is in the Kaggle layout, or images with label maps, or images with outlines: <id>.xml (Aperio ImageScope),
<id>.geojson (QuPath) or one COCO .json for all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from annotation import read_csv
from audit import BANNED, PROBLEMS, UNUSABLE, audit, extend_blacklist, write_report
from collect import (
    Outcome,
    add_images,
    describe_sources,
    find_sources,
    ids_in,
    name_some,
    records_in,
    remove_images,
    sides_of,
)
from columns import align
from config import Config, add_arguments, edit_ini, load_config
from dataset import open_cache
from division import load_split
from download import fetch, file_name, unpack
from files import replacing
from helper import make_parser, run_script
from plot import histograms, save
from record import describe_records, find_records, format_counts, read_table, table_path
from survey import COLUMNS, Survey, alpha_lines, channel_statistics, series, survey, table
from synthetic import image_ids, write_dataset


def demo(config: Config, args: argparse.Namespace) -> int:
    """Draw images with exact masks: for training, a quarter as many for validation, and as many without masks."""
    if args.images < 1:
        raise ValueError(f"--images {args.images}: at least one")
    folder, few = args.data / "demo", max(1, args.images // 4)
    sides = (
        ("train", args.images, "", True),
        ("valid", few, "valid_", True),  # an id is one image, and images of one id are kin
        ("test", few, "test_", False),
    )
    for seed, (name, n, prefix, masks) in enumerate(sides, start=args.seed):
        there = set(os.listdir(folder / name)) if (folder / name).is_dir() else set()
        ids = (
            image_ids(n, prefix) if args.dry_run else write_dataset(folder / name, n, seed, prefix=prefix, masks=masks)
        )
        kept = len(there.intersection(ids))
        print(
            f"{folder / name}: {n} images{' to draw' if args.dry_run else ''}"
            + (f", {kept} of them there already and kept as they are" if kept else "")
        )
    return 0


def download(config: Config, args: argparse.Namespace) -> int:
    """Fetch the zip that [download] names, go on where an earlier call was cut off, check and unpack it."""
    options = config.download
    path = args.data / file_name(options.url)
    target = args.data / path.stem
    if args.dry_run:
        print(f"{path}: {'is there' if path.is_file() else f'would be fetched from {options.url}'}")
        print(f"{target}: {'is there' if target.is_dir() else 'would be unpacked'}")
        return 0
    path, digest, fresh = fetch(options, args.data)
    print(f"{path}: {path.stat().st_size} bytes, SHA-256 {digest}{'' if fresh else ', was there already'}")
    if target.is_dir() and any(target.iterdir()):
        print(f"{target}: is there already, kept as it is")
    else:
        n_files, n_bytes = unpack(path, target, options)
        print(f"{target}: {n_files} files unpacked, {n_bytes / 1e6:.0f} MB")
    print(f"{target}: {len(find_records(target))} images; divide them by: python split.py {target}")
    return 0


def add(config: Config, args: argparse.Namespace) -> int:
    """Copy labelled images into the data set, book them in its CSV; what is there already, by content, is skipped."""
    sources, unused = find_sources(args.folder, args.outlines)
    own = args.folder / "dataset.csv"
    if args.source is None and not own.is_file():
        raise ValueError(f"--source: wanted a name for where these images come from, as {own} does not say")
    table = table_path(args.data, config.dataset)
    given = {"source": args.source, "major_category": args.major, "sub_category": args.sub, "patient": args.patient}
    chosen = {column: value for column, value in given.items() if value is not None}
    described, rows, unknown = describe_sources(sources, own, chosen)
    outcome = add_images(
        described,
        args.data,
        table,
        rows,
        side=args.to,
        prefix=args.prefix,
        policy=config.pre.policy,
        by="" if config.dataset.divides else config.dataset.cv_group,
        dry_run=args.dry_run,
    )
    outcome.refused = unused + unknown + outcome.refused
    would = "would be " if args.dry_run else ""
    n_outlines = sum(len(found.outlines) + len(found.refused) for _, found in sources if found)
    print(f"{args.folder}: {len(sources)} images" + (f", {n_outlines} outlines" if n_outlines else ""))
    print(f"{outcome.folder}: {len(outcome.done)} images {would}added, with {outcome.n_nuclei} nuclei")
    if outcome.present:
        print(f"{len(outcome.present)} are there already, skipped: {', '.join(outcome.present[:3])}, ..."[:200])
    return finish(config, args, outcome, table, "booked")


def remove(config: Config, args: argparse.Namespace) -> int:
    """Move images out of the data set, with their rows; adding the folder they go to brings them back."""
    if not args.ids and not args.source:
        raise ValueError("remove: wanted --source NAME, or ids of images")
    table = table_path(args.data, config.dataset)
    outcome = remove_images(args.data, table, args.ids, args.source, derived=args.derived, dry_run=args.dry_run)
    print(f"{len(outcome.done)} images {'would be ' if args.dry_run else ''}moved to {outcome.folder}")
    for side, path in outcome.tables.items():
        print(f"{path}: their rows; back by: python prepare.py add {path.parent} --to {side}")
    if outcome.derived:
        print(f"made from them, and still there: {name_some(outcome.derived)}; --derived takes such along")
    return finish(config, args, outcome, table, "removed")


def verify(config: Config, args: argparse.Namespace) -> int:
    """Check masks against images and against a run-length CSV, and look for images alike across train and valid."""
    train, valid = load_split(args.data, config.dataset)
    sides = {"train": train, "valid": valid}
    runs = read_csv(args.csv) if args.csv else None
    if runs is not None and (filtered := set(runs) & (ids_in(args.data) - {r.id for r in [*train, *valid]})):
        runs = {image_id: texts for image_id, texts in runs.items() if image_id not in filtered}
        print(f"{args.csv}: {len(filtered)} of its images are left out by the settings")
    result = audit(sides, config.pre.policy, runs)
    print(f"{result.n_images} images ({len(train)} train, {len(valid)} valid), {result.n_masks} nuclei")
    for problem, (n, n_images) in result.summary().items():
        print(f"{problem:<20}{n:>6} in {n_images:>4} images    {PROBLEMS[problem]}")
    if not result.findings:
        print("nothing wrong was found")
    report = args.report or args.data / "verify.csv"
    if not args.dry_run:
        write_report(report, result.findings)
        print(f"{report}: {len(result.findings)} rows")
    if args.blacklist:
        ids = result.ids(args.ban or BANNED)
        n = extend_blacklist(args.blacklist, ids, args.dry_run)
        print(f"{args.blacklist}: {n} ids {'would be ' if args.dry_run else ''}added")
        print(
            "use it as [dataset] train_blacklist and valid_blacklist: as blacklist it may change which images validate"
        )
    return 3 if result.ids(UNUSABLE) else 0


def stats(config: Config, args: argparse.Namespace) -> int:
    """Describe the data set: channels, opacity, sizes and nuclei, by kind."""
    train, valid = load_split(args.data, config.dataset)
    trained, held = (survey(records, open_cache(config, args.data)) for records in (train, valid))
    result = Survey(trained.measures + held.measures, trained.refused + held.refused)
    print(align([COLUMNS, *table(result)]))
    print("\n".join(alpha_lines(result.measures)))
    mean, std = ([round(float(value), 4) for value in values] for values in channel_statistics(trained.measures))
    print(f"of the {len(trained.measures)} training images:\n[pre] mean = {mean}\n[pre] std = {std}")
    if not args.dry_run:
        figure = args.figure or Path("stats.png")
        save(histograms(series(result)), figure)
        print(f"{figure}: histograms")
    if args.write_config:
        store(args.write_config, {"mean": f"{mean}", "std": f"{std}"}, args.dry_run)
    for line in result.refused:
        print(f"refused: {line}", file=sys.stderr)
    return 3 if result.refused else 0


def store(path: Path, values: dict[str, str], dry_run: bool) -> None:
    """Put values into [pre] of an INI file; the rest of it stays as it is."""
    text = edit_ini(path.read_text(encoding="utf-8-sig") if path.is_file() else "", "pre", values)
    if not dry_run:
        with replacing(path) as stage:
            stage.write_text(text, encoding="utf-8")
            load_config(stage)  # whatever is wrong with the new text leaves the old file
    print(f"{path}: mean and std {'would be ' if dry_run else ''}written")


def finish(config: Config, args: argparse.Namespace, outcome: Outcome, table: Path, verb: str) -> int:
    """Say what became of the table and of the data set, and what was refused."""
    print(f"{table}: {outcome.n_rows} rows {'would be ' if args.dry_run else ''}{verb}")
    for side, folder in sides_of(args.data).items():
        records = describe_records(records_in(folder), read_table(table) if table.is_file() else {})
        print(f"{side}: {len(records)} images" + (f" ({format_counts(records)})" if records else ""))
    for line in outcome.refused:
        print(f"refused: {line}", file=sys.stderr)
    return 3 if outcome.refused else 0


def run(config: Config, args: argparse.Namespace) -> int:
    """Do the task, by the settings that stand before it and those behind it."""
    behind = getattr(args, "set_behind", None)
    return args.run(load_config(args.config, [*args.set, *behind]) if behind else config, args)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for function, options in (
        (demo, demo_options),
        (download, download_options),
        (add, add_options),
        (remove, remove_options),
        (verify, verify_options),
        (stats, stats_options),
    ):
        task = tasks.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        add_arguments(task)
        for action in task._actions:  # what stands before the task counts as well
            action.default = argparse.SUPPRESS
            if action.dest == "set":
                action.dest = "set_behind"  # argparse would let it replace the settings before the task
        options(task)
        task.set_defaults(run=function)
    return run_script(run, parser, argv)


def demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=40, metavar="N", help="images to draw (default: 40)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other images")
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, draw nothing")


def download_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, fetch nothing")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="labelled images")
    parser.add_argument("--source", metavar="NAME", help="where they come from; needed where DIR has no dataset.csv")
    parser.add_argument("--major", metavar="NAME", help="their major_category")
    parser.add_argument("--sub", metavar="NAME", help="their sub_category")
    parser.add_argument("--patient", metavar="NAME", help="specimen, if all are of one; else each is one of its own")
    parser.add_argument("--outlines", type=Path, metavar="DIR", help="where the outlines are, if not beside the images")
    parser.add_argument("--to", default="train", metavar="NAME", help="folder of the data folder (default: train)")
    parser.add_argument("--prefix", default="", metavar="TEXT", help="stands before each id")
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, write nothing")


def remove_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="images")
    parser.add_argument("--source", action="append", default=[], metavar="NAME", help="all images of it; repeatable")
    parser.add_argument("--derived", action="store_true", help="and what was made from them: pieces, copies, mixtures")
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, write nothing")


def verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, metavar="FILE", help="run-length table to compare with")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="where every finding goes (default: verify.csv in data)"
    )
    parser.add_argument(
        "--blacklist",
        type=Path,
        metavar="FILE",
        help="add the ids of bad images to this list",
    )
    parser.add_argument(
        "--ban",
        action="append",
        choices=PROBLEMS,
        metavar="PROBLEM",
        help=f"what makes an image bad; repeatable (default: {', '.join(BANNED)}; there are: {', '.join(PROBLEMS)})",
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing")


def stats_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figure", type=Path, metavar="FILE", help="histograms (default: stats.png here)")
    parser.add_argument(
        "--write-config",
        type=Path,
        metavar="FILE",
        help="put mean and std of the training images into [pre] of this INI file",
    )
    parser.add_argument("--dry-run", action="store_true", help="write no figure and no settings")


if __name__ == "__main__":
    sys.exit(main())
