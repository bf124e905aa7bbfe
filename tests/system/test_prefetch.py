"""Prefetching: order, limits, errors and closing."""

import time
from collections.abc import Iterator

import pytest

from utils.system.prefetch import latest, prefetch, prefetch_map


def test_prefetch_keeps_order_and_raises_after_the_last_item():
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(5)
            raise ValueError("after the fifth")
        finally:
            closed.append(True)

    taken = []
    with pytest.raises(ValueError, match="after the fifth"):
        taken.extend(prefetch(items(), 3))
    assert taken == list(range(5)) and closed == [True]


def test_prefetch_reads_a_limited_number_ahead():
    started = []
    iterator = prefetch((started.append(n) or n for n in range(100)), 3)
    assert next(iterator) == 0
    iterator.close()
    assert len(started) <= 5


def test_prefetch_map_keeps_order():
    assert list(prefetch_map(lambda n: n * n, range(20), 3)) == [n * n for n in range(20)]


def test_latest_raises_after_the_last_item_and_closes():
    closed, dropped = [], []

    def items(error: bool) -> Iterator[int]:
        try:
            yield from range(100)
            if error:
                raise ValueError("after the last")
        finally:
            closed.append(True)

    taken = []
    with pytest.raises(ValueError, match="after the last"):
        for item in latest(items(True), lambda: dropped.append(True)):
            taken.append(item)
            time.sleep(0.01)
    assert taken[-1] == 99 and len(taken) + len(dropped) == 100 and dropped
    iterator = latest(items(False), lambda: None)
    next(iterator)
    iterator.close()
    assert closed == [True, True]
