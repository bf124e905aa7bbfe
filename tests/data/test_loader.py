"""Batches loaded ahead equal planned ones in every process."""

from dataclasses import replace

import pytest
import torch

from utils.data.augment import AugmentSettings, render_batch
from utils.data.loader import EpochBatches, epoch_order
from utils.system.distributed import ProcessGroup

CPU = torch.device("cpu")
SETTINGS = AugmentSettings(0.5, scale=0.3, aspect=0.1, translate=0.1, flip=0.5, hue=0.1, saturation=0.5, value=0.3)


@pytest.fixture
def batches(cache) -> EpochBatches:
    return EpochBatches(cache, 4, 0, 3, SETTINGS, ProcessGroup())


def test_loads_planned_batches(batches):
    numbers = [0, 1, 3, 5]
    loaded = list(batches.load(numbers, CPU))
    assert len(loaded) == 4
    for number, (images, boxes, labels) in zip(numbers, loaded, strict=True):
        planned = batches.plan(number)
        assert images.shape == (4, 3, 64, 96)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, render_batch(planned))
        assert torch.equal(boxes, planned.boxes)
        assert torch.equal(labels, planned.labels)


def test_processes_share_each_batch(cache, batches):
    """The halves of two processes make up the batch of one, and each process names all of its images."""
    halves = [EpochBatches(cache, 4, 0, 3, SETTINGS, ProcessGroup(rank, 2)) for rank in range(2)]
    for number in range(len(batches)):
        (whole,) = batches.load([number], CPU)
        parts = zip(*(next(half.load([number], CPU)) for half in halves), strict=True)
        for values, shares in zip(whole, parts, strict=True):
            torch.testing.assert_close(values, torch.cat(shares), atol=1e-6, rtol=0)
        assert halves[1].names(number) == batches.names(number)
    assert len({name for number in range(len(batches)) for name in batches.names(number)}) == 24


def test_raises_error_of_loading_thread(cache):
    broken = EpochBatches(replace(cache, boxes=cache.boxes[:3]), 4, 0, 0, SETTINGS, ProcessGroup())
    with pytest.raises(IndexError):
        list(broken.load(range(6), CPU))


def test_epoch_order_depends_on_seed_and_epoch_only():
    order, numbers = epoch_order(3, 5, 50)
    again, same = epoch_order(3, 5, 50)
    assert torch.equal(order, again)
    assert torch.equal(numbers, same)
    assert sorted(order.tolist()) == list(range(50))
    for other in (epoch_order(3, 6, 50), epoch_order(4, 5, 50)):
        assert not torch.equal(order, other[0])
        assert not torch.equal(numbers, other[1])
