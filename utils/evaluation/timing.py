"""Latency of several functions, measured alternately so that changes in machine speed affect all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from utils.system.device import synchronize

WARMUP = 5  # rounds that are not measured
PAUSE = 0.1  # seconds before each call, until the threads of the previous one are idle

Name = TypeVar("Name")


def time_alternately(
    calls: Mapping[Name, Callable[[], object]], rounds: int, device: torch.device
) -> dict[Name, float]:
    """The median duration of each call in milliseconds; each round calls it twice and measures the second call."""
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
