"""What the tests of scripts share: a network small enough to train in a second, and a way to run a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


SMALL = [
    "--set", "param.model=unet", "--set", "DEFAULT.width=32", "--set", "train.n_batch=3", "--set", "train.n_cv_epoch=1",
    "--set", "train.n_worker=1", "--set", "train.precision=float32", "--set", "train.print_freq=1",
]  # fmt: skip


def run_script(name: str, *args: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / name), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)


def choose(*settings: str) -> list[str]:
    """Small training with these settings on top."""
    return [*SMALL, *(part for text in ("DEFAULT.width=64", *settings) for part in ("--set", text))]
