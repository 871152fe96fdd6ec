"""Work done ahead: an ordered map over threads that holds a bounded number of items and passes errors on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


def ordered(
    function: Callable[[Item], Found], items: Iterable[Item], n_workers: int, ahead: int | None = None
) -> Generator[Found, None, None]:
    """``map(function, items)`` in threads, in the order of the items, some of them ahead of who asks.

    Stages are chained by giving one's results to the next as items. Items are taken in the thread that asks for
    results, so a stage that must stay in one thread, such as a network, is a plain generator between two of these.

    Parameters
    ----------
    function : callable
        Called in a thread; what it raises is raised here, when it is that item's turn, and ends the map.
    items : iterable
        Taken one by one, as results are asked for; closed at the end where it is a generator.
    n_workers : int
        Threads; 0 calls the function when its result is asked for.
    ahead : int, optional
        Most items that are taken and not handed on yet, at least 1; by default one more than threads.

    Notes
    -----
    A map that is left early, or ends by an error, drops the items that wait and waits for those in work.

    Raises
    ------
    ValueError
        `n_workers` is negative, or `ahead` below 1.
    """
    ahead = n_workers + 1 if ahead is None else ahead
    if n_workers < 0 or ahead < 1:
        raise ValueError(f"n_workers {n_workers}, ahead {ahead}; wanted at least 0 and 1")
    try:
        if n_workers == 0:
            yield from map(function, items)
        else:
            yield from _in_threads(function, items, n_workers, ahead)
    finally:
        if isinstance(items, Generator):
            items.close()


def _in_threads(
    function: Callable[[Item], Found], items: Iterable[Item], n_workers: int, ahead: int
) -> Generator[Found, None, None]:
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="ahead")
    waiting: deque[Future[Found]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            del item  # what is handed on is the result; the item may be large
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
