"""The largest batch size that fits into memory, and a dry run that measures the time and memory of a step."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from nets.spec import ModelSpec
from utils.data.cache import ImageCache
from utils.data.loader import EpochBatches
from utils.system.device import describe_memory, explain_failed_compile, is_out_of_memory, synchronize
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.training.run_folder import RunData
from utils.training.trainer import Batching, Trainer, build_trainer
from utils.training.training_state import Progress

try:
    import resource
except ImportError:  # Windows
    resource = None

TRIAL_STEPS = 3  # the first is not timed, since it also initializes the device
MEMORY_SHARE = 0.9  # usable share of the available GPU memory; the rest is left for validation and fragmentation
SIZE_MULTIPLE = 8  # when searching, batch sizes above this are multiples of it
VALIDATION_COST = 0.5  # estimated time of validation per image, relative to training


def resolve_batch_size(
    settings: Any, spec: ModelSpec, cache: ImageCache, device: torch.device, group: ProcessGroup
) -> int:
    """The batch size over all processes; 0 becomes the largest that fits. Raises UserError if it cannot be shared."""
    size = settings.batch_size
    if size == 0:
        if device.type != "cuda":
            raise UserError("batch_size 0 picks the largest that fits into a GPU; on the CPU give a number, such as 8")
        eager = replace(settings, compile="off")
        probe = build_trainer(eager, spec, Batching(1, len(cache), 1), Progress(end=1), device, ProcessGroup())
        size = group.size * min(group.all_gather(find_largest_batch(probe, settings, cache, len(cache) // group.size)))
        group.print_once(f"batch size {size} is the largest that fits, with {len(cache) // size} batches per epoch")
    if size % group.size or len(cache) < group.size:
        raise UserError(
            f"{group.size} processes cannot share {len(cache)} images in batches of {size}; --batch-size must be a "
            f"multiple of {group.size}, and there must be at least as many images"
        )
    return min(size, len(cache)) // group.size * group.size


def dry_run(trainer: Trainer, settings: Any, data: RunData, batches: EpochBatches) -> None:
    """Take some steps, which also compiles the network; print their time and memory, and restore the training state.

    If compilation fails, UserError is raised if `compile` is "on"; otherwise, the run continues without it.
    """
    batch_size, progress = trainer.batching.batch_size, trainer.state.progress
    with explain_out_of_memory(batch_size, trainer.spec.input_size):
        try:
            seconds, memory = try_modes(trainer, settings, batches)
        except Exception as error:  # compilation can fail anywhere in torch, Triton or the C compiler
            if not trainer.compiled or is_out_of_memory(error):
                raise
            torch.compiler.set_stance("force_eager")
            trainer.state.optimizer.zero_grad()
            trainer.frozen = None  # so that an interrupted DistributedDataParallel is created anew
            seconds, memory = try_modes(trainer, settings, batches)  # fails again if compilation was not the cause
            explain_failed_compile(error, required=settings.compile == "on")
    trainer.roll_back()
    height, width = trainer.spec.input_size
    epochs = progress.end - progress.epoch
    validated = len(data.val) * ceil(epochs / settings.eval_every) * VALIDATION_COST if data.val else 0
    duration = format_duration(seconds / batch_size * (epochs * len(data.train) + validated))
    trainer.group.print_once(
        f"a step of {batch_size} images at {height}x{width} takes {seconds:.3f} s and {memory / 1e9:.1f} GB; "
        f"estimated training time {duration}"
    )


def format_duration(seconds: float) -> str:
    """A duration such as "29 s", "2 min 30 s" or "1 h 12 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds} s"
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def try_modes(trainer: Trainer, settings: Any, batches: EpochBatches) -> tuple[float, int]:
    """Try the steps of the run, including those with a frozen backbone if they need to be compiled."""
    if trainer.compiled and batches.epoch < settings.freeze_epochs:
        trainer.set_mode(frozen=True)
        try_steps(trainer, batches)
    trainer.set_mode(frozen=False)
    return try_steps(trainer, batches)


def try_steps(trainer: Trainer, batches: EpochBatches) -> tuple[float, int]:
    """Take steps on the first batch; returns the seconds per step and the peak memory in bytes."""
    device = trainer.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with closing(batches.load([0] * TRIAL_STEPS, device, trainer.render)) as loaded:
        take_step(trainer, loaded)
        synchronize(device)
        started = time.perf_counter()
        for _ in range(TRIAL_STEPS - 1):
            take_step(trainer, loaded)
        synchronize(device)
        seconds = (time.perf_counter() - started) / (TRIAL_STEPS - 1)
    return seconds, peak_memory(device)


def take_step(trainer: Trainer, loaded: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
    trainer.backward(*next(loaded))
    trainer.state.step()


def peak_memory(device: torch.device) -> int:
    """Peak bytes reserved on the GPU, or resident in the process; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def find_largest_batch(trainer: Trainer, settings: Any, cache: ImageCache, max_size: int) -> int:
    """The largest batch size, up to `max_size`, whose steps fit into the GPU; changes the trainer's state."""
    available = torch.cuda.mem_get_info(trainer.device)[0] + torch.cuda.memory_reserved(trainer.device)
    trainer.set_mode(frozen=False)

    def fits(images: int) -> bool:
        batches = EpochBatches(cache, images, settings.seed, 0, settings.augment_settings(0.0), trainer.group)
        try:
            return try_steps(trainer, batches)[1] < MEMORY_SHARE * available
        except RuntimeError as error:
            if images == 1 or not is_out_of_memory(error):  # one image should fit, so the cause may be different
                raise
            return False

    return search_largest(fits, max_size)


def search_largest(fits: Callable[[int], bool], max_size: int) -> int:
    """The largest size up to `max_size` that fits, found by doubling and bisection; above 8, a multiple of 8."""
    good, size = 0, 1
    while size <= max_size and fits(size):
        good, size = size, 2 * size
    if good == 0:
        raise UserError("not even one image fits into the GPU's memory; lower input_size")
    bad = min(size, max_size + 1)
    while good >= SIZE_MULTIPLE:
        middle = max(good + SIZE_MULTIPLE, (good + bad) // 2 // SIZE_MULTIPLE * SIZE_MULTIPLE)
        if middle >= bad:
            break
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


@contextmanager
def explain_out_of_memory(batch_size: int, size: tuple[int, int]) -> Iterator[None]:
    """Raise UserError with a batch size to try when `batch_size` images of `size` (height, width) do not fit."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = f"try --batch-size {batch_size // 2} (nominal_batch compensates), or 0 for the largest that fits a GPU"
        raise UserError(
            f"a batch of {batch_size} images at {size[0]}x{size[1]} does not fit into memory{describe_memory(error)}; "
            f"{advice if batch_size > 1 else 'lower input_size'}"
        ) from error
