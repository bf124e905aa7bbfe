"""The batches of an epoch, planned and moved to the training device ahead of their use."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from utils.data.augment import AugmentSettings, Prepared, draw, epoch_order, prepare
from utils.data.cache import ImageCache
from utils.system.distributed import ProcessGroup

AHEAD = 2  # batches on their way while one is in use


@dataclass
class Batches:
    """What each batch of an epoch is made of, the same whichever process asks; `group` share each of them."""

    cache: ImageCache
    batch_size: int
    seed: int
    epoch: int
    settings: AugmentSettings
    group: ProcessGroup
    order: Tensor = field(init=False)  # (N,) of the samples
    random: Tensor = field(init=False)  # (N, NUM_COLUMNS) a row per position in the order

    def __post_init__(self) -> None:
        self.order, self.random = epoch_order(self.seed, self.epoch, len(self.cache))

    def __len__(self) -> int:
        return len(self.cache) // self.batch_size  # what does not fill a batch comes in another epoch

    def names(self, number: int) -> list[str]:
        """The images of a batch, of all processes."""
        rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
        return [self.cache.samples[index].name for index in self.order[rows].tolist()]

    def prepare(self, number: int, most: int | None = None) -> Prepared:
        """This process's share of a batch, or its first `most` samples."""
        own = self.batch_size // self.group.size
        start = number * self.batch_size + self.group.rank * own
        rows = slice(start, start + min(own, most or own))
        return prepare(self.cache, self.order[rows], self.random[rows], self.settings)

    def load(self, numbers: Iterable[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches on `device`: images (B, 3, H, W) float in 0..1, channels-last, boxes (B, 2M, 4), labels (B, 2M).

        A thread plans the next batches and starts their copies in a stream of its own, while the device computes.
        """
        on_gpu = device.type == "cuda"
        stream = torch.cuda.Stream(device) if on_gpu else None

        def move(number: int) -> tuple[Prepared, torch.cuda.Event | None]:
            with torch.cuda.stream(stream) if on_gpu else nullcontext():
                batch = self.prepare(number)
                if on_gpu:
                    batch = Prepared(*(value if value.is_cuda else to_gpu(value, device) for value in batch))
                return batch, stream.record_event() if on_gpu else None

        remaining = iter(numbers)
        own = {"initializer": torch.cuda.set_device, "initargs": (device,)} if on_gpu else {}
        pool = ThreadPoolExecutor(1, thread_name_prefix="batches", **own)
        try:
            ahead = deque(pool.submit(move, number) for number in islice(remaining, AHEAD))
            while ahead:
                batch, copied = ahead.popleft().result()
                ahead.extend(pool.submit(move, number) for number in islice(remaining, 1))
                if copied is not None:
                    current = torch.cuda.current_stream(device)
                    current.wait_event(copied)
                    for value in batch:
                        value.record_stream(current)  # so that its memory is not given away too early
                yield draw(batch), batch.boxes, batch.labels
        finally:
            pool.shutdown(cancel_futures=True)


def to_gpu(values: Tensor, device: torch.device) -> Tensor:
    """A copy from page-locked memory, which nothing waits for."""
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)
