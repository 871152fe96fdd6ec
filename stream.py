"""Slides block by block: in bounded memory, every nucleus once, written as it goes, taken up again where it stopped.

What a run has come to lies in a folder beside its results until it is done: the label map, the outlines, the maps of
the tiles that later blocks need, and the last block. A block is first noted as a whole and then entered; entering it
twice changes nothing. So a run that is killed at any moment ends with the same files as one that is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import Any
from zipfile import BadZipFile

import numpy as np
import tifffile
import zarr
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

import parallel
from annotation import Quality, geojson_features
from candidate import Scene
from detector import MaskRCNN
from files import is_filled, replacing
from helper import fingerprint
from mosaic import Maps, Mosaic
from postprocess import Separation, least_area
from predict import Segmenter
from slide import Slide
from tile import Window, claim, cut_blocks, round_zoom

#: Side (px) of the tiles of a label map, and of the chunks it is collected in.
CHUNK = 512
#: How many times wider than at first a halo may become.
MAX_HALO = 4
#: Of ``[valid]`` what changes no nucleus: a run may go on under other values.
NOT_OF_NUCLEI = (
    "figure_pos_x", "figure_pos_y", "view_color_equalize", "print_table", "slide_size", "slide_labels",
)  # fmt: skip
GENERATOR = "nuclei toolkit"
#: How the outlines begin: which run they are of stands there, as the label map may be of another.
GEOJSON_START = f'{{"type":"FeatureCollection","generator":"{GENERATOR}","key":"'
GEOJSON_MIDDLE = '","features":[\n'
GEOJSON_TAIL = "\n]}\n"


@dataclass(frozen=True)
class Outcome:
    """What became of a slide.

    Attributes
    ----------
    nuclei : int
    files : tuple of Path
        Label map and outlines.
    blocks, done : int
        Of the slide, and how many of them an earlier run had done.
    """

    nuclei: int
    files: tuple[Path, Path]
    blocks: int
    done: int


@dataclass
class Ledger:
    """The unfinished results of a slide, in a folder.

    Attributes
    ----------
    folder : Path
    shape : (int, int)
        Of the slide.
    key : str
        Of the run, see `identify`.
    blocks, nuclei, length : int
        How many blocks and nuclei are entered, and how long the file of outlines is, in bytes.
    """

    folder: Path
    shape: tuple[int, int]
    key: str = ""
    blocks: int = 0
    nuclei: int = 0
    length: int = 0
    labels: Any = field(init=False)

    def __post_init__(self) -> None:
        chunks = tuple(min(CHUNK, n) for n in self.shape)
        # Opened for changes, not made anew: what is there stays.
        self.labels = zarr.open_array(
            str(self.folder / "labels.zarr"), mode="a", shape=self.shape, chunks=chunks, dtype="uint32", fill_value=0
        )
        if (self.folder / "block.npz").is_file():
            with np.load(self.folder / "block.npz") as block:
                self._enter(block)
        else:
            head = f"{GEOJSON_START}{self.key}{GEOJSON_MIDDLE}".encode()
            (self.folder / "nuclei.geojson").write_bytes(head)
            self.length = len(head)

    def read(self, window: Window) -> NDArray[np.uint32]:
        """What is written in a window, (h, w) uint32."""
        return self.labels[window.slices]

    def commit(self, window: Window, own: NDArray[np.int32], quality: Quality = None) -> None:
        """Enter the nuclei of the next block, (h, w) int32 of its window, 1..M, and what is expected of each."""
        features = geojson_features(own, (window.rows.start, window.columns.start), self.nuclei + 1, quality)
        text = ",\n".join(features)
        if text and self.nuclei:
            text = ",\n" + text
        block = {
            "before": np.array([self.blocks, self.nuclei, self.length]),
            "window": np.array(window),
            "own": own,
            "text": np.frombuffer(text.encode(), np.uint8),
        }
        with replacing(self.folder / "block.npz", sync=True) as stage, stage.open("wb") as file:
            np.savez_compressed(file, **block)  # type: ignore[arg-type]
        self._enter(block)

    def _enter(self, block: Any) -> None:
        """Draw a noted block; again and again it gives the same."""
        blocks, nuclei, length = (int(n) for n in block["before"])
        own, text = block["own"], block["text"].tobytes()
        if own.any():
            (top, bottom), (left, right) = block["window"].tolist()
            there = self.labels[top:bottom, left:right]
            self.labels[top:bottom, left:right] = np.where(own > 0, own.astype(np.uint32) + np.uint32(nuclei), there)
        with (self.folder / "nuclei.geojson").open("r+b") as file:
            file.truncate(length)
            file.seek(length)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # the note of the next block replaces the only other copy
        self.blocks, self.nuclei, self.length = blocks + 1, nuclei + int(own.max(initial=0)), length + len(text)


class TileFiles:
    """The maps of a mosaic's tiles, each computed once and kept in a folder while they are needed.

    Two threads may ask: whichever comes first computes, the other waits.
    """

    def __init__(self, folder: Path, mosaic: Mosaic) -> None:
        self.folder, self.mosaic, self.lock = folder, mosaic, Lock()
        folder.mkdir(exist_ok=True)

    def prepare(self, window: Window) -> None:
        """Compute what a window needs and is not there."""
        for index in self.mosaic.touching(window):
            self._ensure(index)

    def get(self, index: tuple[int, int]) -> list[Maps]:
        """As `Mosaic.tile`."""
        try:
            return self._load(index)
        except (OSError, ValueError, EOFError, BadZipFile):  # half of it came to the disk before a power cut
            self._path(index).unlink(missing_ok=True)
            return self._load(index)

    def forget(self, row: int) -> None:
        """Remove the tiles that end above a row of the slide."""
        strips, _ = self.mosaic.strips
        for path in self.folder.glob("*.npz"):
            if strips[int(path.name.split("-")[0])].target.stop <= row:
                path.unlink()

    def _path(self, index: tuple[int, int]) -> Path:
        return self.folder / f"{index[0]}-{index[1]}.npz"

    def _load(self, index: tuple[int, int]) -> list[Maps]:
        members: dict[int, Maps] = {}
        with np.load(self._ensure(index)) as file:
            for key in file.files:
                number, head = key.split("/")
                members.setdefault(int(number), {})[head] = file[key]
        return [members[number] for number in sorted(members)]

    def _ensure(self, index: tuple[int, int]) -> Path:
        path = self._path(index)
        if path.is_file():
            return path
        with self.lock:
            if not path.is_file():
                members = self.mosaic.tile(index)
                arrays = {f"{i}/{head}": maps for i, member in enumerate(members) for head, maps in member.items()}
                with replacing(path) as stage, stage.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
        return path


def run_blocks(
    ledger: Ledger,
    separate: Callable[[Window], Separation],
    side: int,
    halo: int,
    prepare: Callable[[Window], None] = lambda window: None,
    forget: Callable[[int], None] = lambda row: None,
) -> int:
    """Find the nuclei of a slide, block by block from where the ledger stands.

    Parameters
    ----------
    separate : callable
        A window to the instances in it.
    side, halo : int
        Of the blocks, and around them at first: it doubles where the window ends in a nucleus of the block.
    prepare : callable
        What `separate` will need of a window; runs ahead while the block before is separated.
    forget : callable
        What lies above that row of the slide is not needed any more.

    Returns
    -------
    int
        Blocks of the slide.
    """
    cores = cut_blocks(ledger.shape, side)

    def finish(core: Window) -> None:
        margin = halo
        while True:
            window = core.widen(margin, ledger.shape)
            found = separate(window)
            own, cut = claim(found.labels, window, core, ledger.shape, ledger.read(window))
            if not cut or margin >= MAX_HALO * halo:
                break
            margin *= 2
        ledger.commit(window, own, quality_of(own, found))
        if core.columns.stop == ledger.shape[1]:
            forget(core.rows.stop - MAX_HALO * halo)

    pending: Future[None] | None = None
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=len(cores), initial=ledger.blocks, disable=parallel.bar_off(), unit="block") as bar,
    ):
        for core in cores[ledger.blocks :]:
            prepare(core.widen(halo, ledger.shape))
            if pending:
                pending.result()
                bar.update()
            pending = pool.submit(finish, core)
        if pending:
            pending.result()
            bar.update()
    return len(cores)


def quality_of(own: NDArray[np.int32], found: Separation) -> Quality:
    """What is expected of some of the nuclei that were found, which have other numbers now, 1..M."""
    if found.quality is None:
        return None
    number = np.zeros(int(own.max(initial=0)) + 1, np.int32)
    number[own] = found.labels
    return found.quality[number[1:] - 1]


def segment_slide(slide: Slide, segmenter: Segmenter, folder: Path, name: str) -> Outcome:
    """Find the nuclei of a slide and write its label map and its outlines.

    Parameters
    ----------
    slide : Slide
    segmenter : Segmenter
        Its settings say how large blocks are, and what the label map becomes.
    folder, name : Path, str
        ``<name>_labels.tif`` (tiled BigTIFF, uint32) or ``.zarr``, and ``<name>_nuclei.geojson``. Until both are whole
        ``<name>_part`` holds what is done; from there an interrupted run goes on.

    Raises
    ------
    ValueError
        The folder holds a run with other settings or of another image, another process is at work on it, or the
        settings want the whole image at once.
    FileExistsError
        A file or folder of such a name is not of this toolkit.
    """
    valid = segmenter.config.valid
    if not valid.pred_orig_size:
        raise ValueError(f"{slide.path}: [valid] pred_orig_size = False squeezes an image; a slide needs True")
    labels = folder / f"{name}_labels.{valid.slide_labels}"
    outlines, part = folder / f"{name}_nuclei.geojson", folder / f"{name}_part"
    key = identify(slide, segmenter)
    n_blocks = len(cut_blocks(slide.shape, valid.slide_block))
    note, known, plan = read_note(labels), read_key(outlines), read_plan(part)
    if note is not None and note.get("key") == known == key:
        if plan is not None and plan["key"] == key:
            shutil.rmtree(part, ignore_errors=True)
        return Outcome(int(note["nuclei"]), (labels, outlines), n_blocks, n_blocks)
    if plan is None and is_filled(part):
        raise FileExistsError(f"{part}: is there, and is no unfinished run; choose another --output")
    with alone(part):
        ledger, done = fill_ledger(slide, segmenter, part, key)
        finish_files(ledger, labels, outlines, {"generator": GENERATOR, "key": key, "nuclei": ledger.nuclei})
        shutil.rmtree(part)
    return Outcome(ledger.nuclei, (labels, outlines), n_blocks, done)


def fill_ledger(slide: Slide, segmenter: Segmenter, part: Path, key: str) -> tuple[Ledger, int]:
    """The ledger of a slide with all its blocks, and how many of them it had before."""
    valid, plan = segmenter.config.valid, make_plan(slide, segmenter, part, key)
    ledger = Ledger(part, slide.shape, key)
    done = ledger.blocks
    steady = settle(segmenter, plan)
    if isinstance(segmenter.networks[0], MaskRCNN):
        run_blocks(ledger, lambda window: steady.begin(slide.read(window))[1](), valid.slide_block, valid.slide_halo)
        return ledger, done
    mosaic = segmenter.mosaic(slide.read, slide.shape, float(Fraction(plan["zoom"])))
    tiles = TileFiles(part / "tiles", mosaic)

    def separate(window: Window) -> Separation:
        return steady.separate(steady.merge(mosaic.blend(window, tiles.get)))

    run_blocks(ledger, separate, valid.slide_block, valid.slide_halo, tiles.prepare, tiles.forget)
    return ledger, done


@contextmanager
def alone(part: Path) -> Iterator[None]:
    """Be the only run at work in a folder; the system forgets it with the process, however that ends.

    Raises
    ------
    ValueError
        Another run is.
    """
    part.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{part}: another run is at work there; wait for it, or choose another --output") from None
    try:
        yield
    finally:
        lock.release()


def identify(slide: Slide, segmenter: Segmenter) -> str:
    """What image, networks and settings a run is known by: 16 hexadecimal digits."""
    file = next(
        (slide.path / name for name in ("zarr.json", ".zarray", ".zgroup") if (slide.path / name).is_file()), slide.path
    )
    stat, config = os.stat(file), segmenter.config
    opinion = segmenter.opinion and fingerprint([{"weights": segmenter.opinion.state_dict()}])
    parts = [
        stat.st_size,
        stat.st_mtime_ns,
        slide.shape,
        segmenter.fingerprint,
        opinion,
        config.valid.model_dump_json(exclude=set(NOT_OF_NUCLEI)),
        config.pre.policy,
        config.pre.nucleus_diameter,
        config.contour.detect,
        config.post.model_dump_json(),
        sorted(config.thresholds.items()),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def read_plan(part: Path) -> dict[str, Any] | None:
    """What an unfinished run has noted in its folder; None where there is none."""
    try:
        plan = json.loads((part / "plan.json").read_text())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and plan.get("generator") == GENERATOR else None


def make_plan(slide: Slide, segmenter: Segmenter, part: Path, key: str) -> dict[str, Any]:
    """What holds for all blocks: found by a look at samples, or as an earlier run of the same noted it.

    Raises
    ------
    ValueError
        That run was another one.
    """
    if plan := read_plan(part):
        if plan["key"] != key:
            raise ValueError(f"{part}: an unfinished run of another image or with other settings; finish or delete it")
        return plan
    found, labels = segmenter.zoom_of(slide.read, slide.shape)
    zoom, post = round_zoom(found), segmenter.config.post
    least = least_area(labels, post)
    plan = {"generator": GENERATOR, "key": key, "image": str(slide.path), "shape": slide.shape}
    scene = segmenter.scene_of(slide.read, slide.shape, float(zoom))
    plan |= {"zoom": str(zoom), "min_object_size": least, "scene": scene and (*scene[:2], scene.areas.tolist())}
    with replacing(part / "plan.json", sync=True) as stage:
        stage.write_text(json.dumps(plan))
    return plan


def settle(segmenter: Segmenter, plan: dict[str, Any]) -> Segmenter:
    """With rules that do not depend on what else a block holds, but for the contrast that the random walker measures
    and the typical size between peaks (``[post] policy = rw``, ``marker = peak``)."""
    rules = {"min_object_size": plan["min_object_size"], "min_object_share": 0.0, "filter_fiber": False}
    config, scene = segmenter.config, None
    if plan["scene"]:
        typical, semantic, areas = plan["scene"]
        scene = Scene(typical, semantic, np.array(areas))
    post = config.post.model_copy(update=rules)
    return replace(segmenter, config=config.model_copy(update={"post": post}), scene=scene)


def finish_files(ledger: Ledger, labels: Path, outlines: Path, note: dict[str, Any]) -> None:
    """Make the results of a ledger that is complete; the label map comes last, and says that all is there."""
    with replacing(outlines) as stage, stage.open("wb") as file:
        with (ledger.folder / "nuclei.geojson").open("rb") as source:
            shutil.copyfileobj(source, file)
        file.write(GEOJSON_TAIL.encode())
    if labels.suffix == ".zarr":
        ledger.labels.attrs.update(note)
        if labels.is_dir():
            shutil.rmtree(labels)
        os.replace(ledger.folder / "labels.zarr", labels)
        return
    with replacing(labels) as stage:
        tifffile.imwrite(
            stage,
            _cut_tiles(ledger.labels),
            shape=ledger.shape,
            dtype=np.uint32,
            tile=(CHUNK, CHUNK),
            compression="zlib",
            bigtiff=True,
            photometric="minisblack",
            description=json.dumps(note),
            metadata=None,
        )


def read_note(labels: Path) -> dict[str, Any] | None:
    """What a label map of an earlier run says of itself; None where there is none.

    Raises
    ------
    FileExistsError
        There is something, and it is no label map of a run.
    """
    if not labels.exists():
        return None
    note: Any = None
    try:
        if labels.is_dir():
            note = dict(zarr.open_array(str(labels), mode="r").attrs)
        else:
            with tifffile.TiffFile(labels) as file:
                note = json.loads(file.pages.first.description)
    except Exception:  # whatever cannot be read is not ours
        note = None
    if not isinstance(note, dict) or note.get("generator") != GENERATOR:
        raise FileExistsError(f"{labels}: is there, and is no result of a slide; choose another --output")
    return note


def read_key(outlines: Path) -> str | None:
    """Which run the outlines are of; None where there are none.

    Raises
    ------
    FileExistsError
        There is something, and it is no result of a run.
    """
    if not outlines.exists():
        return None
    with outlines.open("rb") as file:
        start, _, rest = file.read(len(GEOJSON_START) + 64).partition(GEOJSON_START.encode())
    if start or not rest:
        raise FileExistsError(f"{outlines}: is there, and is no result of a slide; choose another --output")
    return rest.partition(b'"')[0].decode()


def _cut_tiles(labels: Any) -> Iterator[NDArray[np.uint32]]:
    """Tiles of a label map row by row, those at its end filled up with background."""
    for y in range(0, labels.shape[0], CHUNK):
        for x in range(0, labels.shape[1], CHUNK):
            piece = labels[y : y + CHUNK, x : x + CHUNK]
            yield np.pad(piece, [(0, CHUNK - n) for n in piece.shape])
