"""How much a device can take: a trial of the largest batch, its memory and time, and the batch size that fits."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from utils.system.device import synchronize
from utils.system.errors import UserError
from utils.training.trainer import Trainer, restore_training

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
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(TRIAL_STEPS - 1):
        step()
    synchronize(device)
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


def try_largest(trainer: Trainer, batch_size: int, objects: int, modes: Sequence[bool]) -> Trial:
    """Run the largest batch, with the backbone frozen or not as `modes` say.

    The state stays as it was. Returns what the first took; raises UserError with a batch size to try when memory does
    not suffice.
    """
    images, trials = batch_size // trainer.group.size, []
    try:
        for frozen in modes:
            trainer.set_mode(frozen)
            trials.append(try_steps(partial(trainer.try_batch, images, objects), trainer.device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise too_large(batch_size, trainer.spec.input_size) from None
    restore_training(trainer.state, trainer.kept)
    return trials[0]


def largest_batch(trainer: Trainer, objects: int, most: int) -> int:
    """The most images, up to `most`, whose step fits into the GPU; uses the trainer up.

    Found by doubling, then by halving the interval; from 8 on a multiple of 8. Raises UserError when not even one fits.
    """
    total = torch.cuda.get_device_properties(trainer.device).total_memory
    trainer.set_mode(frozen=False)

    def fits(images: int) -> bool:
        try:
            return try_steps(partial(trainer.try_batch, images, objects), trainer.device).memory < MEMORY_SHARE * total
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False

    return search_largest(fits, most)


def search_largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest size up to `most` that fits, if all below it do; from BATCH_STEP on a multiple of it."""
    good, size = 0, 1
    while size <= most and fits(size):
        good, size = size, 2 * size
    if good == 0:
        raise UserError("not even one image fits into the GPU's memory; lower input_size")
    bad = min(size, most + 1)
    while good >= BATCH_STEP and (middle := max(good + BATCH_STEP, (good + bad) // 2 // BATCH_STEP * BATCH_STEP)) < bad:
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def too_large(batch_size: int, size: tuple[int, int]) -> UserError:
    """What to say when a batch does not fit."""
    smaller = f"try --batch-size {batch_size // 2} (on a GPU, 0 takes what fits), which nominal_batch makes up for"
    what = f"a batch of {batch_size} images at {size[0]}x{size[1]} does not fit into memory"
    return UserError(f"{what}; {smaller if batch_size > 1 else 'lower input_size'}")
