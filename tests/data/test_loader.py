"""Batches loaded ahead equal planned ones in every process, and decoded images go where they fit."""

from dataclasses import replace

import pytest
import torch

from nets.spec import ModelSpec
from tests.conftest import ANCHORS
from utils.data import cache as cache_module
from utils.data.augment import AugmentSettings, render_batch
from utils.data.cache import ImageCache, build_cache, choose_place
from utils.data.loader import EpochBatches
from utils.data.voc import load_classes, load_samples
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError

CPU = torch.device("cpu")
SETTINGS = AugmentSettings(0.5, scale=0.3, aspect=0.1, translate=0.1, flip=0.5, hue=0.1, saturation=0.5, value=0.3)


@pytest.fixture(scope="module")
def spec(devkit) -> ModelSpec:
    return ModelSpec(load_classes(devkit / "Demo" / "classes.txt"), ANCHORS, input_size=(64, 96))


@pytest.fixture(scope="module")
def cache(devkit, spec) -> ImageCache:
    return build_cache(load_samples(devkit, ["Demo/train"], spec.class_names), spec, CPU)


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


def test_chooses_place_with_room_for_images(devkit, spec, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache_module, "available_memory", lambda: 1000.0)
    assert choose_place("auto", 499, CPU) == "ram"
    assert choose_place("auto", 501, CPU) == "disk"
    assert choose_place("ram", 501, CPU) == "ram"
    with pytest.raises(UserError, match="cache is device, but training runs on the CPU"):
        choose_place("device", 1, CPU)
    usage = cache_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    samples = load_samples(devkit, ["Demo/val"], spec.class_names)
    with pytest.raises(UserError, match=r"the 6 decoded images take 0\.0 GB, but logs/cache has"):
        build_cache(samples, spec, CPU)
    assert not list(tmp_path.glob("logs/cache/*.images*"))


def test_disk_cache_equals_memory_cache_and_is_reused(devkit, spec, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    on_disk = build_cache(cache.samples, spec, CPU, "disk")
    monkeypatch.setattr(cache_module, "load_sample", None)  # so that decoding again would fail
    for again in (on_disk, build_cache(cache.samples, spec, CPU, "disk")):
        assert again.place == "disk"
        assert torch.equal(again.images, cache.images)
        assert again.sizes == cache.sizes
        assert again.fingerprints() == cache.fingerprints()
    with pytest.raises(TypeError):  # another size needs another file
        build_cache(cache.samples, replace(spec, input_size=(32, 32)), CPU, "disk")
    assert [path.suffix for path in tmp_path.glob("logs/cache/*") if path.name != "lock"] == [".images"]
