"""How long the real images take to read: first, with all their masks, and again from the cache.

    NUCLEI_DATA=DIR python benchmarks/reading.py         DIR holds stage1_train.zip
    python benchmarks/reading.py --data data             or a data folder

The cache is made in a folder of its own, which is deleted. "As training reads" opens every entry, as the loader does,
and touches one pixel; "every byte" reads all of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Pre, load_config
from helper import prepare_process
from image import Cache
from record import Record, load_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data folder with train/")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        records = find(args.data, Path(folder))
        n_masks = sum(len(r.masks) for r in records if isinstance(r.masks, tuple))
        print(f"{len(records)} images, {n_masks} masks, {args.workers} threads")
        rows: list[tuple[str, Callable[[Cache, Record], object]]] = [
            ("first pass, cache written", read),
            ("cached, as training reads", read),
            ("cached, every byte", read_all),
        ]
        for name, job in rows:
            print(f"{name:<28}{timed(records, Path(folder) / 'cache', job, args.workers):>8.2f} s")


def find(data: Path | None, folder: Path) -> list[Record]:
    """The records of a data folder, or of the zip that NUCLEI_DATA has, unpacked into `folder`."""
    if data is None:
        source = os.environ.get("NUCLEI_DATA")
        if not source:
            sys.exit("no data: --data DIR, or NUCLEI_DATA")
        with zipfile.ZipFile(Path(source) / "stage1_train.zip") as archive:
            archive.extractall(folder)
        return load_records(folder / "stage1_train", folder, load_config(folder=folder).dataset)
    return load_records(data / "train", data, load_config(folder=folder).dataset)


def timed(records: Sequence[Record], folder: Path, job: Callable[[Cache, Record], object], n_workers: int) -> float:
    cache = Cache(folder, *Pre().policy)
    began = time.perf_counter()
    with ThreadPoolExecutor(n_workers) as pool:
        for _ in pool.map(lambda record: job(cache, record), records):
            pass
    return time.perf_counter() - began


def read(cache: Cache, record: Record) -> int:
    assert record.masks is not None
    return int(cache.labels(record.image, record.masks)[0, 0]) + int(cache.image(record.image)[0, 0, 0])


def read_all(cache: Cache, record: Record) -> int:
    assert record.masks is not None
    return int(cache.labels(record.image, record.masks).sum()) + int(cache.image(record.image).sum())


if __name__ == "__main__":
    main()
