"""The batches of an epoch, planned and moved to the training device ahead of their use."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from utils.data.augment import NUM_COLUMNS, AugmentSettings, BatchPlan, plan_batch, render_batch
from utils.data.cache import ImageCache
from utils.system.distributed import ProcessGroup
from utils.system.prefetch import prefetch_map


def epoch_order(seed: int, epoch: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """The order of an epoch (N,), and its random numbers in [0, 1) (N, NUM_COLUMNS) with a row per position."""
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(state)
    return torch.randperm(num_samples, generator=generator), torch.rand(num_samples, NUM_COLUMNS, generator=generator)


@dataclass
class EpochBatches:
    """The batches of an epoch, the same in all processes; each process loads its share of every batch."""

    cache: ImageCache
    batch_size: int
    seed: int
    epoch: int
    settings: AugmentSettings
    group: ProcessGroup
    order: Tensor = field(init=False)  # (N,) sample indices
    random: Tensor = field(init=False)  # (N, NUM_COLUMNS) with a row per position in the order

    def __post_init__(self) -> None:
        self.order, self.random = epoch_order(self.seed, self.epoch, len(self.cache))

    def __len__(self) -> int:
        return len(self.cache) // self.batch_size  # an incomplete last batch is dropped

    def names(self, number: int) -> list[str]:
        """The names of the images in a batch, over all processes."""
        rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
        return [self.cache.samples[index].name for index in self.order[rows].tolist()]

    def plan(self, number: int, max_samples: int | None = None) -> BatchPlan:
        """Plan this process's share of a batch, or its first `max_samples` samples."""
        own = self.batch_size // self.group.size
        start = number * self.batch_size + self.group.rank * own
        rows = slice(start, start + min(own, max_samples or own))
        return plan_batch(self.cache, self.order[rows], self.random[rows], self.settings)

    def load(self, numbers: Iterable[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Load batches to `device` ahead of use: images (B, 3, H, W) in 0..1, boxes (B, 2M, 4), labels (B, 2M)."""
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # lets copies overlap with training

        def plan_and_copy(number: int) -> tuple[BatchPlan, torch.cuda.Event | None]:
            if stream is None:
                return self.plan(number), None
            torch.cuda.set_device(device)  # the current device is set per thread
            with torch.cuda.stream(stream):
                batch = BatchPlan(*(value if value.is_cuda else to_gpu(value, device) for value in self.plan(number)))
                return batch, stream.record_event()

        with closing(prefetch_map(plan_and_copy, numbers, workers=1)) as plans:
            for batch, copied in plans:
                if copied is not None:
                    current = torch.cuda.current_stream(device)
                    current.wait_event(copied)
                    for value in batch:
                        value.record_stream(current)  # keeps its memory from being reused too early
                yield render_batch(batch), batch.boxes, batch.labels


def to_gpu(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the GPU asynchronously, through pinned memory."""
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)
