"""The pipeline room: order, bounds, errors and an early end, whatever the number of threads."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline import ordered

every_number = pytest.mark.parametrize("n_workers", [0, 1, 2, 5])


@every_number
@pytest.mark.parametrize("n_items", [0, 1, 2, 17])
def test_results_come_in_the_order_of_the_items(n_workers, n_items):
    def slow_at_first(i):
        time.sleep(0.002 * (n_items - i) % 5)
        return i * i

    assert list(ordered(slow_at_first, range(n_items), n_workers)) == [i * i for i in range(n_items)]


@pytest.mark.parametrize(
    ("n_workers", "ahead", "most"), [(0, None, 1), (1, None, 2), (3, None, 4), (2, 1, 1), (2, 7, 7)]
)
def test_no_more_items_are_taken_than_may_be_ahead(n_workers, ahead, most):
    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    for n_handed, _ in enumerate(ordered(lambda i: i, items(), n_workers, ahead)):
        assert len(taken) - n_handed <= most


def test_threads_work_at_the_same_time():
    together = threading.Barrier(3, timeout=10)
    assert list(ordered(lambda i: together.wait() >= 0, range(3), 3)) == [True] * 3


def test_items_are_taken_in_the_thread_that_asks():
    threads = []

    def items():
        for i in range(4):
            threads.append(threading.current_thread())
            yield i

    works = set(ordered(lambda i: threading.current_thread(), items(), 2))
    assert set(threads) == {threading.current_thread()}
    assert threading.current_thread() not in works


@every_number
def test_an_error_comes_at_its_turn(n_workers):
    def fail_at_three(i):
        if i == 3:
            raise KeyError("three")
        return i

    found = []
    with pytest.raises(KeyError, match="three"):
        for result in ordered(fail_at_three, range(9), n_workers):
            found.append(result)
    assert found == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@every_number
def test_an_error_of_the_items_is_passed_on(n_workers):
    def items():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(ordered(lambda i: i, items(), n_workers))


@every_number
def test_an_early_end_closes_the_items_and_the_threads(n_workers):
    done, closed = [], []

    def items():
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    results = ordered(done.append, items(), n_workers)
    next(results)
    results.close()
    assert closed == [True]
    assert len(done) <= n_workers + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_stages_chain_and_close_together():
    closed = []

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    first = ordered(lambda i: i + 1, items(), 2)
    second = ordered(lambda i: 2 * i, (i for i in first), 2)
    assert [next(second) for _ in range(5)] == [2, 4, 6, 8, 10]
    second.close()
    first.close()
    assert closed == [True]


@pytest.mark.parametrize(("n_workers", "ahead"), [(-1, None), (2, 0)])
def test_numbers_that_make_no_sense_are_named(n_workers, ahead):
    with pytest.raises(ValueError, match=f"n_workers {n_workers}"):
        list(ordered(abs, [1], n_workers, ahead))
