"""Augmented boxes follow their pixels, and randomness depends only on the seed, the epoch and the position."""

from dataclasses import replace
from math import tau

import numpy as np
import pytest
import torch

from utils.data.augment import (
    FILL,
    AugmentSettings,
    color_matrices,
    plan_batch,
    render_batch,
    render_pixels,
    render_tiles,
)
from utils.data.cache import ImageCache
from utils.data.loader import epoch_order
from utils.detection.letterbox import Fit

OFF = AugmentSettings(mosaic=0, scale=0, aspect=0, translate=0, flip=0, hue=0, saturation=0, value=0)
GEOMETRY = AugmentSettings(mosaic=0, scale=0.4, aspect=0.3, translate=0.2, flip=0.5, hue=0, saturation=0, value=0)
SIZE = (96, 128)


@pytest.fixture(scope="module")
def cache() -> ImageCache:
    """Twelve black images, each with one or two white rectangles and their boxes."""
    rng = np.random.default_rng(0)
    images = torch.zeros(12, 3, *SIZE, dtype=torch.uint8)
    boxes, labels = torch.zeros(12, 2, 4), torch.full((12, 2), -1)
    for i in range(12):
        for k in range(1 + i % 2):
            x, y = int(rng.integers(4, 24)) + 64 * k, int(rng.integers(4, 40))
            w, h = int(rng.integers(12, 32)), int(rng.integers(12, 40))
            images[i, :, y : y + h, x : x + w] = 255
            boxes[i, k] = torch.tensor([x, y, x + w, y + h])
            labels[i, k] = i % 3
    return in_memory(images, boxes, labels)


def in_memory(images, boxes, labels) -> ImageCache:
    count, size = len(images), tuple(images.shape[2:])
    return ImageCache([], images, boxes, labels, [Fit(1, 1, 0, 0)] * count, [size] * count, [0] * count, "ram")


def augment(cache, order, random, settings):
    batch = plan_batch(cache, order, random, settings)
    return render_batch(batch), batch.boxes, batch.labels


def batch(cache, settings, seed=0):
    order, random = epoch_order(seed, 0, len(cache))
    return order, *augment(cache, order, random, settings)


def test_zero_strengths_change_nothing(cache):
    order, images, boxes, labels = batch(cache, OFF)
    torch.testing.assert_close(images, cache.images[order] / 255, atol=1e-5, rtol=0)
    assert torch.equal(boxes[:, :2], cache.boxes[order])
    assert torch.equal(labels[:, :2], cache.labels[order])
    assert (labels[:, 2:] == -1).all()


@pytest.mark.parametrize("settings", [GEOMETRY, replace(GEOMETRY, mosaic=1.0)])
def test_boxes_follow_the_pixels(cache, settings):
    """Each box is white inside and not outside, except where the seam of a mosaic cuts an object."""
    seen = beside = 0
    for seed in range(8):
        _, images, boxes, labels = batch(cache, settings, seed)
        for image, box, label in zip(images, boxes, labels, strict=True):
            for x1, y1, x2, y2 in box[label >= 0].tolist():
                assert 0 <= x1 < x2 <= SIZE[1]
                assert 0 <= y1 < y2 <= SIZE[0]
                inner = image[:, round(y1 + 1) : round(y2 - 1), round(x1 + 1) : round(x2 - 1)]
                assert inner.numel() == 0 or inner.min() > 0.9
                left = image[:, round((y1 + y2) / 2) - 1, max(0, round(x1) - 3) : max(0, round(x1) - 2)]
                beside += bool(left.numel() and left.max() > 0.9)
                seen += 1
    assert seen > 80
    assert beside <= (0.05 * seen if settings.mosaic else 0)


def test_flip_mirrors_exactly(cache):
    order, images, boxes, labels = batch(cache, replace(OFF, flip=1.0))
    torch.testing.assert_close(images, cache.images[order].flip(3) / 255, atol=1e-5, rtol=0)
    mirrored = cache.boxes[order][..., [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([128, 0, 128, 0])
    valid = labels[:, :2] >= 0
    torch.testing.assert_close(boxes[:, :2][valid], mirrored[valid])


def test_mosaic_has_four_images(cache):
    _, images, _, labels = batch(cache, replace(OFF, mosaic=1.0))
    assert (labels >= 0).sum() > (cache.labels >= 0).sum()
    assert labels.shape == (12, 4)  # twice the maximum number of objects per image
    assert images.isfinite().all()


def test_area_outside_image_is_gray(cache):
    _, images, _, _ = batch(cache, replace(OFF, translate=0.9))
    assert (images.flatten(2)[:, 0] - FILL / 255).abs().amin(dim=1).max() < 1e-4


def test_drops_hidden_and_tiny_boxes():
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    boxes = torch.tensor([[[10.0, 10, 50, 50], [20, 20, 21, 60]]])
    cache = in_memory(images, boxes, torch.zeros(1, 2, dtype=torch.long))
    _, _, moved, labels = batch(cache, OFF)
    assert labels[0].tolist() == [0, -1, -1, -1]  # the second is one pixel wide
    torch.testing.assert_close(moved[0, 0], boxes[0, 0])


def test_sample_does_not_depend_on_its_batch(cache):
    settings = replace(GEOMETRY, mosaic=0.5, hue=0.1, saturation=0.5, value=0.5)
    order, random = epoch_order(0, 0, len(cache))
    together = augment(cache, order, random, settings)
    for i in range(len(cache)):
        alone = augment(cache, order[i : i + 1], random[i : i + 1], settings)
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours[0], theirs[i], atol=1e-5, rtol=0)


def test_color_matrices_keep_gray_and_change_hue():
    one = torch.ones(1)
    identity = color_matrices(0 * one, one, one)
    torch.testing.assert_close(identity[0], torch.eye(3), atol=1e-5, rtol=0)
    gray = torch.tensor([0.5, 0.5, 0.5])
    turned = color_matrices(0.3 * tau * one, 1.7 * one, one)[0]
    torch.testing.assert_close(turned @ gray, gray, atol=1e-3, rtol=0)  # gray has no hue and no saturation
    assert not torch.allclose(turned @ torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 0, 0]), atol=0.2)
    washed = color_matrices(0 * one, 0 * one, 0.5 * one)[0] @ torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(washed, torch.full((3,), 0.299 / 2), atol=1e-3, rtol=0)


def test_rendering_by_tile_equals_rendering_by_pixel(cache):
    """The CPU renders by tile, a GPU by pixel."""
    order, random = epoch_order(3, 1, len(cache))
    for mosaic in (0.0, 0.5, 1.0):
        plan = plan_batch(cache, order, random, replace(GEOMETRY, mosaic=mosaic))
        by_tile = torch.stack([render_tiles(plan, row) for row in range(len(order))])
        torch.testing.assert_close(torch.stack(render_pixels(plan), dim=1), by_tile, atol=2e-2, rtol=0)
