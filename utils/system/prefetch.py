"""Work that overlaps: threads that are a bounded number of items ahead of whoever uses them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from queue import Empty, Queue
from threading import Event
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


def newest(items: Iterator[Item], drop: Callable[[], object]) -> Iterator[Item]:
    """The items, made by a thread that waits for nobody: an item that is still there when the next comes is dropped.

    `drop` is called for each of these. What making them raises is raised behind the last one. Closing ends the thread,
    as soon as the next item is there, and closes `items`.
    """
    waiting: Queue[Any] = Queue()  # at most one item, and END
    closed = Event()

    def read() -> None:
        try:
            for item in items:
                with suppress(Empty):
                    waiting.get_nowait()
                    drop()
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
