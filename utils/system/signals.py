"""SIGINT and SIGTERM as one exception, which can be put off until a safe moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The user, or the system, asked the program to stop."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum.name)
        self.signum = signum


class StopSignals:
    """While entered, the first SIGINT or SIGTERM raises `Stopped`, at once or after `defer`; later ones do nothing.

    So a second Ctrl-C does not harm what the first one set off. Does nothing outside the main thread.
    """

    def __init__(self) -> None:
        self.signum: signal.Signals | None = None  # the signal that came, if any
        self.waiting = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {signum: signal.signal(signum, self.receive) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def receive(self, number: int, _: FrameType | None) -> None:
        first = self.signum is None
        self.signum = self.signum or signal.Signals(number)
        if first and not self.waiting:
            raise Stopped(self.signum)

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Within it a signal only sets `requested`; what is inside asks for it, and leaves at a good moment."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def raise_stopped(self) -> None:
        """Raise `Stopped` for the signal that came while it was put off; SIGTERM when another process had it."""
        raise Stopped(self.signum or signal.SIGTERM)
