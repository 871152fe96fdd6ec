"""What this machine can do at most: memory bandwidth and matrix products, measured in the run that uses them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch


@dataclass(frozen=True)
class Machine:
    """Bytes a second (each byte read or written counts) and operations a second of each type, on `cores` cores."""

    cores: int
    bandwidth: float
    peaks: Mapping[torch.dtype, float]
    alone: Machine | None = None

    @property
    def one_core(self) -> Machine:
        return self.alone or self

    @property
    def has_bfloat16(self) -> bool:
        """Whether bfloat16 is clearly faster."""
        return self.peaks[torch.bfloat16] > 1.2 * self.peaks[torch.float32]

    def __str__(self) -> str:
        names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
        peaks = ", ".join(f"{self.peaks[dtype] / 1e9:.0f} GFLOP/s in {name}" for dtype, name in names.items())
        return f"{self.cores} core{'s' * (self.cores > 1)}: {self.bandwidth / 1e9:.1f} GB/s, {peaks}"


def measure_machine(cores: int) -> Machine:
    """Measure all cores, and one alone."""
    alone = _measure(1)
    return alone if cores == 1 else replace(_measure(cores), alone=alone)


def _measure(cores: int) -> Machine:
    torch.set_num_threads(cores)
    source = torch.ones(2**26, dtype=torch.uint8)
    copy = torch.empty_like(source)
    bandwidth = 2 * source.numel() / least(lambda: copy.copy_(source))
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1536, 1536, dtype=dtype), torch.ones(1536, 1536, dtype=dtype)
        peaks[dtype] = 2 * 1536**3 / least(partial(torch.matmul, a, b))
    return Machine(cores, bandwidth, peaks)


def least(job: Callable[[], object], n: int = 12) -> float:
    """Seconds of the fastest of `n` calls."""
    times = []
    for _ in range(n):
        began = time.perf_counter()
        job()
        times.append(time.perf_counter() - began)
    return min(times)
