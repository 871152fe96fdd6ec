"""Give the files of records further names by hard links, which take no space; across drives they are copied."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from files import replacing
from record import Record

#: What was linked and is not yet moved into place, inside the folder it belongs to.
STAGE = ".linked"


def link_record(record: Record, source: Path, target: Path, name: str = "") -> int:
    """Link the files of a record to the same places below another folder.

    Parameters
    ----------
    source, target : path
        Where the record was found, and where it is to be found too.
    name : str
        Its id there, where it is to be another.

    Returns
    -------
    int
        How many files had to be copied instead.
    """

    def place(file: Path) -> Path:
        return target / _rename(file.relative_to(source), record.id, name or record.id)

    if record.masks == ():  # no nuclei, which is not the same as no ground truth
        place(record.image.parent.with_name("masks")).mkdir(parents=True)
    masks = record.masks or ()
    files = [record.image, *([masks] if isinstance(masks, Path) else masks)]
    return sum(not _link(file, place(file)) for file in files)


def add_links(pairs: Sequence[tuple[Record, str]], source: Path, target: Path) -> int:
    """Link records into a folder that holds others, all or, until `finish_links` is called, none.

    Parameters
    ----------
    pairs : sequence of (Record, str)
        What to link, and its id in `target`.

    Returns
    -------
    int
        How many files had to be copied instead.
    """
    with replacing(target / STAGE) as stage:
        stage.mkdir()
        copied = sum(link_record(record, source, stage, name) for record, name in pairs)
    finish_links(target)
    return copied


def finish_links(folder: Path) -> int:
    """Move into place what was linked for a folder, by this run or one that was cut off; how many moves it took."""
    stage = folder / STAGE
    if not stage.is_dir():
        return 0
    moved = _merge(stage, folder)
    shutil.rmtree(stage)
    return moved


def _merge(source: Path, target: Path) -> int:
    moved = 0
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and (target / entry.name).is_dir():
            moved += _merge(entry, target / entry.name)
        else:
            os.replace(entry, target / entry.name)
            moved += 1
    return moved


def _rename(path: Path, id: str, name: str) -> Path:
    """The path with `name` in place of the id, as name of its first folder, else of the file."""
    if path.parts[0] == id:
        return Path(name, *path.parts[1:])
    return path.with_name(name + path.suffix) if path.stem == id else path


def _link(source: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copy2(source, target)
        return False
    return True
