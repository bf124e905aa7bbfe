"""Signals are deferred until a safe moment."""

import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from utils.system.signals import Stopped, StopSignals


def test_first_signal_is_deferred_and_later_ones_are_ignored():
    """In a process of its own, since signals also reach the libraries that other tests have loaded."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(send_signals).result(timeout=120)


def send_signals() -> None:
    with StopSignals() as stop:
        with stop.defer():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
        signal.raise_signal(signal.SIGINT)  # ignored
        with pytest.raises(Stopped) as error:
            stop.raise_stopped()
        assert error.value.signum == signal.SIGTERM
    with StopSignals() as stop:
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
