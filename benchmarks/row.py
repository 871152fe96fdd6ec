"""What a row of the table is, and how its contenders are timed: in turn, in one process, on the same inputs."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import torch

from benchmarks.machine import Machine
from helper import prepare_process

Job = Callable[[], Any]
#: Seconds from which a contender is timed once only.
SLOW = 40.0
#: M_MMAP_THRESHOLD, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: where glibc's own adaption ends.
_MALLOC_DEFAULTS = ((-3, 2**25), (-4, 2**16), (-1, 2**26), (-2, 2**17))


@dataclass(frozen=True)
class Floor:
    """What the hardware asks for at least: bytes to move, and operations in a type."""

    n_bytes: float = 0.0
    n_operations: float = 0.0
    dtype: torch.dtype = torch.float32

    def seconds(self, machine: Machine) -> float:
        return max(self.n_bytes / machine.bandwidth, self.n_operations / machine.peaks[self.dtype])


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    work : str
        What is done, and on what.
    plain, ours : callable
        Each does the work from the same inputs and returns its answer.
    agree : callable
        (answer, our answer) -> share of the answer that is the same, 0 to 1; also for the libraries'.
    same : float
        Least share.
    wanted : float
        Least time of the plain way over ours; 0: not wanted here.
    libraries : mapping
        name -> callable; the fastest counts.
    wanted_library : float
        Least time of the fastest library over ours.
    library_same : float, optional
        Least share for the libraries, where they may differ from ours for a reason; 0: not compared.
    floor : Floor
    cores : int
        1, or 0 for all.
    rounds : int
        Least number of turns; fast rows take more.
    kin : bool
        The plain way is the toolkit's own, and keeps freed memory as ours does.
    note : str
        What a reader has to know.
    """

    work: str
    plain: Job
    ours: Job
    agree: Callable[[Any, Any], float]
    wanted: float
    floor: Floor
    same: float = 1.0
    libraries: Mapping[str, Job | None] = field(default_factory=dict)
    wanted_library: float = 1.0
    library_same: float | None = None
    cores: int = 1
    rounds: int = 3
    kin: bool = False
    note: str = ""


@dataclass(frozen=True)
class Result:
    """A row, measured: seconds of each contender and the share of its answer that is as ours."""

    name: str
    row: Row
    seconds: Mapping[str, float]
    shares: Mapping[str, float]
    floor: float

    @property
    def best_library(self) -> str:
        """The fastest; empty where there is none."""
        return min((name for name in self.seconds if name in self.row.libraries), key=self.ratio, default="")

    def ratio(self, name: str) -> float:
        """How many times longer `name` takes than we do."""
        return self.seconds[name] / self.seconds["ours"]

    @property
    def failures(self) -> list[str]:
        """What is not as wanted."""
        row, library = self.row, self.best_library
        found = []
        if self.ratio("plain") < row.wanted:
            found.append(f"{self.name}: {self.ratio('plain'):.2f} times the plain way, wanted {row.wanted:g}")
        if library and self.ratio(library) < row.wanted_library:
            ratio = self.ratio(library)
            found.append(f"{self.name}: {ratio:.2f} times {library}, wanted {row.wanted_library:g}")
        for name, share in self.shares.items():
            least = row.library_same if name in row.libraries and row.library_same is not None else row.same
            if share < least:
                found.append(f"{self.name}: {100 * share:.3f} % as {name} has it, wanted {100 * least:g}")
        return found


def measure(name: str, row: Row, machine: Machine, least: float = 2.0) -> Result:
    """Time the contenders of a row in turn, until each had its rounds and `least` seconds have passed in all.

    The least time of each counts, since whatever else a machine does only ever adds; a first turn warms up.
    """
    jobs = {"plain": row.plain, **{key: job for key, job in row.libraries.items() if job}, "ours": row.ours}
    use_cores(row.cores or machine.cores)
    seconds = dict.fromkeys(jobs, float("inf"))
    answers: dict[str, Any] = {}
    began, n = time.perf_counter(), 0
    while n < row.rounds or (time.perf_counter() - began < least and n < 200):
        for key, job in jobs.items():
            if n and seconds[key] > SLOW:
                continue
            if not row.cores:
                use_memory(own=key == "ours" or (row.kin and key == "plain"))
            start = time.perf_counter()
            answer = job()
            seconds[key] = min(seconds[key], time.perf_counter() - start)
            answers.setdefault(key, answer)  # of the first turn: networks in training change
        n += 1
    use_cores(machine.cores)
    use_memory(own=True)
    told = [key for key in jobs if key != "ours" and not (key in row.libraries and row.library_same == 0)]
    shares = {key: float(row.agree(answers[key], answers["ours"])) for key in told}
    return Result(name, row, seconds, shares, row.floor.seconds(machine.one_core if row.cores else machine))


def use_cores(n: int) -> None:
    """Let torch use `n` threads, and OpenCV one: our threads call it."""
    torch.set_num_threads(n)
    cv2.setNumThreads(1)


def use_memory(own: bool) -> None:
    """Keep freed memory as the toolkit's scripts do, or as the C library does by itself once it has seen large blocks.

    What one contender sets would else be a gift to the next: it is worth much of a training step.
    """
    if own:
        prepare_process()
    elif sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for option, value in _MALLOC_DEFAULTS:
            ctypes.CDLL(None).mallopt(option, value)


def n_cores() -> int:
    """Cores that this process may use, or fewer where OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wanted)) if wanted.isdigit() else cores


def optional(module: str, make: Callable[[Any], Job]) -> Job | None:
    """What `make` builds of a module; None where it is not installed."""
    try:
        return make(importlib.import_module(module))
    except ImportError:
        return None
