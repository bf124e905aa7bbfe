"""Iteration in background threads that keep a bounded number of items ready."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from queue import Empty, Queue
from threading import Event
from typing import Any, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
END = object()  # marks the end of the items


def prefetch(items: Iterable[Item], size: int) -> Iterator[Item]:
    """Iterate over `items` in a thread that keeps up to `size` of them ready; closing it closes `items`."""
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


def latest(items: Iterator[Item], on_drop: Callable[[], object]) -> Iterator[Item]:
    """Iterate over `items` in a thread that never waits, skipping to the latest item; closing it closes `items`.

    `on_drop` is called for each skipped item. Exceptions are raised after the last item.
    """
    waiting: Queue[Any] = Queue()  # at most one item, and END
    closed = Event()

    def read() -> None:
        try:
            for item in items:
                with suppress(Empty):
                    waiting.get_nowait()
                    on_drop()
                waiting.put(item)
                if closed.is_set():
                    return
        finally:
            items.close()
            waiting.put(END)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            while (item := waiting.get()) is not END:
                yield item
            reading.result()
        finally:
            closed.set()


def prefetch_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Like `map`, but in threads that work up to 2 * `workers` items ahead."""
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
