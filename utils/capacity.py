"""How much a device can take: a trial of the largest batch, its memory and time, and the batch size that fits."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from utils.device import wait_for
from utils.errors import UserError

TRIAL_STEPS = 3  # of which the first, which also prepares the device, is not timed
MEMORY_SHARE = 0.9  # of a GPU that a training may fill; the rest is for validation and for other batches' sizes
BATCH_STEP = 8  # found batch sizes are multiples of it


@dataclass(frozen=True)
class Trial:
    """What some steps took."""

    seconds: float  # per step
    memory: int  # bytes at the peak; of the GPU, or resident of the whole process


def try_steps(step: Callable[[], None], device: torch.device) -> Trial:
    """Run a step a few times; running out of memory raises torch.OutOfMemoryError or RuntimeError."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    wait_for(device)
    started = time.perf_counter()
    for _ in range(TRIAL_STEPS - 1):
        step()
    wait_for(device)
    seconds = (time.perf_counter() - started) / (TRIAL_STEPS - 1)
    return Trial(seconds, peak_memory(device))


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: reserved on the GPU, or resident for the process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that a device, or the machine, has no memory left."""
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def largest_batch(step: Callable[[int], None], device: torch.device, most: int, multiple: int = 1) -> int:
    """The largest batch size, up to `most`, whose step fits into the GPU; raises UserError when none does.

    Found by doubling, then by halving the interval; a multiple of `multiple`, and from 8 on of 8.
    """
    total = torch.cuda.get_device_properties(device).total_memory

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        try:
            return try_steps(lambda: step(size), device).memory < MEMORY_SHARE * total
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False

    return search_largest(fits, most, multiple)


def search_largest(fits: Callable[[int], bool], most: int, multiple: int = 1) -> int:
    """The largest size up to `most` that fits, if all below it do; raises UserError when not even `multiple` does."""
    good, size = 0, multiple
    while size <= most and fits(size):
        good, size = size, 2 * size
    if good == 0:
        raise UserError("not even the smallest batch fits into the GPU's memory; lower input_size")
    bad = min(size, most + 1)
    unit = multiple * max(1, BATCH_STEP // multiple)
    while good >= unit and (middle := max(good + unit, (good + bad) // 2 // unit * unit)) < bad:
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def too_large(batch_size: int, size: tuple[int, int], suggestion: int) -> UserError:
    """What to say when a batch does not fit."""
    return UserError(
        f"a batch of {batch_size} images at {size[0]}x{size[1]} does not fit into memory; try --batch-size {suggestion}"
        " (nominal_batch keeps the result about the same), or a smaller input_size"
    )
