"""Many processes as one run: who is who, what is shared out, and what is brought together again.

torchrun starts the processes and tells each its place by environment variables. Without it there is one process, every
function below leaves things as they are, and nothing of torch.distributed is touched.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

#: How long a process waits for the others. Long, since shares differ in work; one that dies is noticed at once all the
#: same: its connections break, and torchrun watches it.
PATIENCE = timedelta(hours=12)


# Who is who


def n_started() -> int:
    """Processes that torchrun started for this run, on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def world() -> int:
    """Processes that have joined; 1 outside `joined`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process among those of its machine: which GPU is its own."""
    return int(os.environ["LOCAL_RANK"]) if world() > 1 else 0


def is_main() -> bool:
    """Whether this process prints and writes what is written once."""
    return rank() == 0


def bar_off() -> bool | None:
    """What ``tqdm(disable=...)`` wants: only the main process draws a bar, and only on a terminal."""
    return None if is_main() else True


def launch() -> str:
    """What the processes of one torchrun have in common, those that it starts again included; empty without it.

    The number of the parent process tells two launches with the same ``--rdzv-id`` apart.
    """
    if not dist.is_torchelastic_launched():
        return ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()}"


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started, for a block; only the main one prints to stdout in it.

    Notes
    -----
    gloo carries what lies in memory, NCCL what lies on a GPU. A block that ends by an error is not waited for: torchrun
    ends the other processes, or starts all of them again.
    """
    if n_started() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(_agree(store, number, count), store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere:
        if is_main():
            yield
        else:
            with redirect_stdout(nowhere):
                yield
    dist.destroy_process_group()


def _agree(store: dist.Store, number: int, count: int) -> str:
    """A name that these processes have in common, and none that torchrun started before them.

    torchrun keeps one store for all its restarts, where the addresses of processes that died still stand; one that
    reads such an address before it is overwritten waits for the dead (pytorch issue 135712). Nor do all machines count
    restarts alike. So the first process names the start, and tells it to each that has said hello with a word of its
    own, until each has answered under that name. All earlier processes are dead by then: torchrun sees to that.
    """
    if number:
        word = uuid.uuid4().hex
        store.set(f"hello/{number}", word)
        while not _read(store, f"welcome/{number}").startswith(word):
            time.sleep(0.02)
        name = _read(store, f"welcome/{number}").removeprefix(word)
        store.set(f"{name}/{number}", "here")
        return name
    name = uuid.uuid4().hex
    missing = set(range(1, count))
    while missing:
        for other in missing:
            store.set(f"welcome/{other}", _read(store, f"hello/{other}") + name)
        time.sleep(0.02)
        missing = {other for other in missing if not _read(store, f"{name}/{other}")}
    return name


def _read(store: dist.Store, key: str) -> str:
    """What stands there, without waiting; empty where nothing does."""
    return store.get(key).decode() if store.check([key]) else ""


# What is shared out and brought together


def share(items: Sequence[T]) -> Sequence[T]:
    """What of `items` is this process's: every so many-th."""
    return items[rank() :: world()]


def merge(mine: Sequence[T]) -> list[T]:
    """What was made of `share`, one for each item, of all processes and in the order of the items; in every process."""
    if world() == 1:
        return list(mine)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(mine))
    merged: list[Any] = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        merged[i :: len(parts)] = part
    return merged


def to_main(mine: T) -> list[T]:
    """What each process has, by rank; an empty list in all but the main one."""
    if world() == 1:
        return [mine]
    parts: list[Any] | None = [None] * world() if is_main() else None
    dist.gather_object(mine, parts)
    return parts or []


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in every process; the others do not call it."""
    if world() == 1:
        return make()
    box = [make() if is_main() else None]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def sums(values: Sequence[float]) -> list[float]:
    """The sum over all processes of each number."""
    if world() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def average(tensors: Iterable[Tensor]) -> None:
    """Set each tensor, all of one type and device, to its mean over the processes; in place."""
    tensors = list(tensors)
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
