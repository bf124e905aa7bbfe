"""The batches of an epoch, planned and moved to the training device ahead of their use."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from utils.data.augment import NUM_COLUMNS, AugmentSettings, BatchPlan, plan_batch, render_batch
from utils.data.cache import ImageCache
from utils.system.device import side_stream, to_device
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

    def plan(self, number: int) -> BatchPlan:
        """Plan this process's share of a batch."""
        own = self.batch_size // self.group.size
        start = number * self.batch_size + self.group.rank * own
        rows = slice(start, start + own)
        return plan_batch(self.cache, self.order[rows], self.random[rows], self.settings)

    def load(
        self, numbers: Iterable[int], device: torch.device, render: Callable[[BatchPlan], Tensor] = render_batch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Load batches to `device` ahead of use: images (B, 3, H, W) in 0..1, boxes (B, 2M, 4), labels (B, 2M)."""
        stream = side_stream(device) if device.type == "cuda" else None  # lets copies overlap with training
        workers = 2 if stream and not self.cache.images.is_cuda else 1  # gathering from RAM may be slower than a GPU

        def plan_and_copy(number: int) -> tuple[BatchPlan, torch.cuda.Event | None]:
            if stream is None:
                return self.plan(number), None
            torch.cuda.set_device(device)  # the current device is set per thread
            with torch.cuda.stream(stream):
                plan = BatchPlan(*(to_device(value, device) for value in self.plan(number)))
                return plan, stream.record_event()

        with closing(prefetch_map(plan_and_copy, numbers, workers)) as plans:
            for plan, copied in plans:
                if copied is not None:
                    current = torch.cuda.current_stream(device)
                    current.wait_event(copied)
                    for value in plan:
                        value.record_stream(current)  # keeps its memory from being reused too early
                yield render(plan), plan.boxes, plan.labels
