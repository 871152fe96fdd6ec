"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = False) -> Iterator[Path]:
    """Yield a hidden name beside `path`; what is made there becomes `path` if the block ends well, else goes.

    Parameters
    ----------
    path : path
        The file or folder to be written. Its parent is made where it is missing; a file, or an empty folder, of that
        name is replaced.
    sync : bool
        Wait until the file is on the disk, so that not even a power cut leaves half of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield stage
        if sync:
            with open(stage, "rb") as file:
                os.fsync(file.fileno())
        os.replace(stage, path)
    finally:
        if stage.is_dir():
            shutil.rmtree(stage)
        else:
            stage.unlink(missing_ok=True)


def is_filled(folder: Path) -> bool:
    """Whether a folder is there and holds something that is not hidden."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
