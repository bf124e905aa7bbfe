"""Work that overlaps: threads that are a bounded number of items ahead of whoever uses them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
END = object()  # what comes after the last item


def ahead(items: Iterable[Item], size: int) -> Iterator[Item]:
    """The items, made by a thread that keeps up to `size` of them waiting; what it raises is raised here, in its turn.

    Closing ends the thread and closes `items`.
    """
    iterator = iter(items)
    pool = ThreadPoolExecutor(1)
    waiting = deque(pool.submit(next, iterator, END) for _ in range(size))
    try:
        while (item := waiting.popleft().result()) is not END:
            waiting.append(pool.submit(next, iterator, END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        if hasattr(iterator, "close"):
            iterator.close()


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of each item, in their order, by some threads that are up to two items each ahead."""
    remaining = iter(items)
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Any]] = deque(pool.submit(function, item) for item in islice(remaining, 2 * workers))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
