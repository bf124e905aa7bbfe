"""SIGINT and SIGTERM as one exception, which can be deferred to a safe moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The user or the operating system asked the program to stop."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum.name)
        self.signum = signum


class StopSignals:
    """Context manager in which the first SIGINT or SIGTERM raises `Stopped`; later ones do not interrupt cleanup."""

    def __init__(self) -> None:
        self.signum: signal.Signals | None = None  # the first signal received
        self.deferred = False
        self.handlers: dict[signal.Signals, Any] = {}  # previous handlers, to restore

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.handlers = {signum: signal.signal(signum, self.receive) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def receive(self, number: int, _: FrameType | None) -> None:
        first = self.signum is None
        self.signum = self.signum or signal.Signals(number)
        if first and not self.deferred:
            raise Stopped(self.signum)

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @contextmanager
    def defer(self) -> Iterator[None]:
        """In the block, signals only set `requested`; the code checks it and calls `raise_stopped`."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False

    def raise_stopped(self) -> None:
        """Raise `Stopped` for the deferred signal, or for SIGTERM if another process received it."""
        raise Stopped(self.signum or signal.SIGTERM)
