"""A large slide, streamed: time, peak memory and nuclei; killed in its middle and taken up again.

    python benchmarks/slide.py                       16,384 x 16,384 pixels, of drawn images
    NUCLEI_DATA=DIR python benchmarks/slide.py       of real ones: DIR holds stage1_train.zip
    python benchmarks/slide.py --side 4096 --set valid.test_time_augment=none

The slide is laid of images and their mirror images, so that nothing shows where one ends, and written as a compressed
tiled BigTIFF into a temporary folder (--folder names one), which is deleted. Memory is the process's peak (ru_maxrss)
over what it was when the network was loaded. --once leaves out the kill.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import valid
from config import load_config
from files import replacing
from helper import DEFAULT_WEIGHTS, find_checkpoint
from image import read_image
from synthetic import draw_sample
from tile import cut_blocks

#: Least side (px) of the real images that are taken, how many of them, and the side of a tile of the slide.
LEAST, N_IMAGES, TILE = 1000, 4, 512
MEGABYTE = 1024 if sys.platform == "linux" else 2**20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16384, help="of the slide, in pixels")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--once", action="store_true", help="without the kill and the second run")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return stream(args.child, args.folder, args.set)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return measure(Path(folder), args)


def measure(folder: Path, args: argparse.Namespace) -> int:
    slide = folder / "slide.tif"
    began = time.monotonic()
    write_slide(slide, args.side, sources(folder))
    print(f"{args.side} x {args.side} pixels, {slide.stat().st_size / 1e6:.0f} MB, made in {since(began)}")
    if not args.once:
        interrupt(slide, folder / "two", args)
    began = time.monotonic()
    report("in one go", run(slide, folder / "one", args.set), began)
    if args.once:
        return 0
    first, second = (fingerprints(folder / name) for name in ("one", "two"))
    print("the same files" if first == second else f"DIFFERENT files: {first} and {second}")
    return 0 if first == second else 1


def interrupt(slide: Path, output: Path, args: argparse.Namespace) -> None:
    """Kill a run after half of its blocks, and take it up again."""
    n_blocks = len(cut_blocks((args.side, args.side), load_config(None, args.set).valid.slide_block))
    began = time.monotonic()
    killed = kill_at(n_blocks // 2, slide, output, args.set)
    print(f"killed after {killed} of {n_blocks} blocks, {since(began)}")
    began = time.monotonic()
    report("taken up again", run(slide, output, args.set), began)


def sources(folder: Path) -> list[NDArray[np.uint8]]:
    """Some large images of the zip that NUCLEI_DATA has, or drawn ones, cut to one size."""
    data, images = os.environ.get("NUCLEI_DATA"), []
    if data:
        with zipfile.ZipFile(Path(data) / "stage1_train.zip") as archive:
            names = sorted(name for name in archive.namelist() if "/images/" in name and name.endswith(".png"))
            large = (name for name in names if min(png_size(archive, name)) >= LEAST)
            for name in islice(large, N_IMAGES):
                images.append(read_image(archive.extract(name, folder / "images"))[:LEAST, :LEAST])
    return images or [draw_sample(seed, (LEAST, LEAST), n_nuclei=250)[0] for seed in range(N_IMAGES)]


def png_size(archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """(width, height) of an image in a zip, by the head of its file alone."""
    with archive.open(name) as file:
        width, height = struct.unpack(">II", file.read(24)[16:])
    return width, height


def write_slide(path: Path, side: int, images: Sequence[NDArray[np.uint8]]) -> None:
    mirrored = [np.block([[[i], [i[:, ::-1]]], [[i[::-1]], [i[::-1, ::-1]]]]) for i in images]
    size = mirrored[0].shape[0]

    def pick(y: int, x: int) -> NDArray[np.uint8]:
        """One tile; the images come in turn along rows and columns."""
        rows, columns = np.arange(y, y + TILE), np.arange(x, x + TILE)
        tile = np.zeros((TILE, TILE, 3), np.uint8)
        for row in np.unique(rows // size):
            for column in np.unique(columns // size):
                inside = np.ix_(rows // size == row, columns // size == column)
                image = mirrored[(row + 2 * column) % len(mirrored)]
                tile[inside] = image[
                    np.ix_(rows[rows // size == row] % size, columns[columns // size == column] % size)
                ]
        return tile

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for y in range(0, side, TILE):
            for x in range(0, side, TILE):
                yield pick(y, x)

    with replacing(path) as stage:
        options: dict[str, Any] = {"tile": (TILE, TILE), "photometric": "rgb", "compression": "zlib", "bigtiff": True}
        tifffile.imwrite(stage, tiles(), shape=(side, side, 3), dtype=np.uint8, **options)


def command(slide: Path, output: Path, settings: Sequence[str]) -> list[str]:
    chosen = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, __file__, "--child", str(slide), "--folder", str(output), *chosen]


def run(slide: Path, output: Path, settings: Sequence[str]) -> dict[str, float]:
    """Stream in a process of its own, and what it said."""
    done = subprocess.run(command(slide, output, settings), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    *lines, last = done.stdout.splitlines()
    print("  " + "\n  ".join(lines))
    return json.loads(last)


def kill_at(block: int, slide: Path, output: Path, settings: Sequence[str]) -> int:
    """Stream until so many blocks are noted, then kill without warning; how many there were."""
    process, done = subprocess.Popen(command(slide, output, settings), stdout=subprocess.DEVNULL), 0
    while done < block and process.poll() is None:
        time.sleep(0.5)
        note = output / f"{slide.stem}_part" / "block.npz"
        if note.is_file():
            with np.load(note) as noted:
                done = int(noted["before"][0]) + 1
    process.kill()
    process.wait()
    return done


def stream(slide: Path, output: Path, settings: Sequence[str]) -> int:
    """What the child does: valid.py, and the memory it took."""
    load, loaded = valid.load_segmenter, []

    def loading(*args):
        segmenter = load(*args)
        loaded.append(peak())
        return segmenter

    valid.load_segmenter = loading
    chosen = [part for setting in settings for part in ("--set", setting)]
    weights = find_checkpoint(DEFAULT_WEIGHTS.parent)
    small = ["--set", "valid.slide_size=1"]
    code = valid.main([str(weights), "--input", str(slide), "--output", str(output), *small, *chosen])
    print(json.dumps({"loaded": loaded[0] if loaded else 0, "peak": peak()}))
    return code


def peak() -> float:
    """The most memory this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE


def report(what: str, memory: dict[str, float], began: float) -> None:
    beyond = memory["peak"] - memory["loaded"]
    print(f"{what}: {since(began)}, peak {memory['peak']:.0f} MB, {beyond:.0f} MB beyond the loaded network")


def since(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"


def fingerprints(folder: Path) -> dict[str, str]:
    """Of all files; those of a Zarr lie in folders of their own."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


if __name__ == "__main__":
    sys.exit(main())
