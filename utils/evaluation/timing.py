"""How long calls take, one beside the other."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from utils.system.device import synchronize

WARMUP = 5  # calls of each that do not count
PAUSE = 0.1  # seconds, in which the threads of the call before stop to wait for work, which takes a core

Name = TypeVar("Name")


def time_in_turns(calls: Mapping[Name, Callable[[], object]], rounds: int, device: torch.device) -> dict[Name, float]:
    """Median milliseconds of each; every turn has two calls, of which the second counts."""
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + rounds):
        for name, call in calls.items():
            time.sleep(PAUSE)
            call()
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if turn >= WARMUP:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}
