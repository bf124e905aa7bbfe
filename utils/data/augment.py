"""Batched augmentation: `plan_batch` plans a batch on the CPU, `render_batch` renders it on the training device.

Each image is placed in a rectangle of the output, its tile, by output = input * scale + offset in each axis. An
ordinary sample is one tile that fills the output; a mosaic consists of four.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import tau
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data.cache import ImageCache
from utils.detection.boxes import box_area

FILL = 114.0  # gray level, of 255, outside the images
MIN_SIDE = 2.0  # minimum width and height in pixels; smaller boxes are dropped
MIN_VISIBLE = 0.25  # minimum visible fraction of a box's area; boxes that are less visible are dropped
OUTSIDE = 3.0  # coordinate beyond grid_sample's -1..1, for output pixels outside the tile
MOSAIC_SPLIT = (0.3, 0.7)  # range of the point where the tiles of a mosaic meet, as a fraction of the side

# Columns of the random table. Each tile has TILE_COLUMNS: image index, scale, aspect, x, y, flip.
TILE_COLUMNS = 6
MOSAIC, SPLIT_X, SPLIT_Y, HUE, SATURATION, VALUE, FIRST_TILE = range(7)
NUM_TILES = 4  # tiles of a mosaic; an ordinary sample uses the first
NUM_COLUMNS = FIRST_TILE + NUM_TILES * TILE_COLUMNS


@dataclass(frozen=True)
class AugmentSettings:
    """Strengths of the augmentations, 0 to disable one; train.py documents the settings of the same names."""

    mosaic: float
    scale: float
    aspect: float
    translate: float
    flip: float
    hue: float
    saturation: float
    value: float


class BatchPlan(NamedTuple):
    """A batch of B samples made of T tiles: everything that rendering and training need."""

    images: Tensor  # (T, 3, H, W) uint8, the source image of each tile
    x: Tensor  # (T, output width) source coordinate of each output pixel, in grid_sample's -1..1
    y: Tensor  # (T, output height)
    rows: Tensor  # (T,) position in the batch
    colors: Tensor  # (B, 3, 3) color transformation on RGB
    boxes: Tensor  # (B, 2M, 4) xyxy in pixels of the output, where M is the maximum number of objects per image
    labels: Tensor  # (B, 2M) padded with -1


def plan_batch(cache: ImageCache, indices: Tensor, random: Tensor, settings: AugmentSettings) -> BatchPlan:
    """Plan a batch of samples `indices` (B,) from random numbers (B, NUM_COLUMNS); only `images` may be on a GPU."""
    tiles = plan_tiles(indices, random, settings, cache)
    boxes, labels = transform_boxes(cache, tiles, len(indices))
    height, width = cache.images.shape[2:]
    x, y = source_coordinates(tiles, 0, width), source_coordinates(tiles, 1, height)
    images, colors = gather_images(cache.images, tiles.sources), plan_colors(random, settings)
    return BatchPlan(images, x, y, tiles.rows, colors, boxes, labels)


def gather_images(images: Tensor, sources: Tensor) -> Tensor:
    """Images (T, 3, H, W) at the indices `sources` (T,); those in RAM are pinned with CUDA, for asynchronous copies."""
    if images.is_cuda:
        return images[sources.pin_memory().to(images.device, non_blocking=True)]
    gathered = torch.empty(len(sources), *images.shape[1:], dtype=images.dtype, pin_memory=torch.cuda.is_initialized())
    np.take(images.numpy(), sources.numpy(), axis=0, out=gathered.numpy(), mode="clip")  # single-threaded
    return gathered


def render_batch(batch: BatchPlan) -> Tensor:
    """Render the images (B, 3, H, W), float in 0..1 and channels-last, on the device of the plan."""
    count, width, height = len(batch.colors), batch.x.shape[1], batch.y.shape[1]
    fill = FILL / 255 * batch.colors.sum(dim=2, keepdim=True)  # (B, 3, 1)
    colors = batch.colors / 255
    form = {"device": batch.x.device, "memory_format": torch.channels_last}
    images = torch.empty(count, 3, height, width, **form)
    if batch.images.is_cuda:  # renders all tiles at once, each at the full output size
        drawn = render_tiles(batch)
        return images.copy_(torch.baddbmm(fill, colors, drawn.flatten(2)).clamp_(0, 1).view_as(drawn))
    ends = torch.searchsorted(batch.rows, torch.arange(count + 1)).tolist()
    for row, (start, stop) in enumerate(pairwise(ends)):
        drawn = render_image(batch, range(start, stop))
        images[row] = torch.addmm(fill[row], colors[row], drawn.flatten(1)).clamp_(0, 1).view_as(drawn)
    return images


def render_tiles(batch: BatchPlan) -> Tensor:
    """All images (B, 3, H, W) before the color transformation, as differences from FILL."""
    images = torch.sub(batch.images, FILL)  # makes zero padding equal to FILL
    x, y = batch.x[:, None, :], batch.y[:, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # (T, H, W, 2)
    drawn = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if len(drawn) == len(batch.colors):  # one tile each, in order
        return drawn
    return drawn.new_zeros(len(batch.colors), *drawn.shape[1:]).index_add_(0, batch.rows, drawn)


def render_image(batch: BatchPlan, tiles: range) -> Tensor:
    """One image (3, H, W) made of `tiles`, equal to that drawn by `render_tiles`."""
    canvas = torch.zeros(3, batch.y.shape[1], batch.x.shape[1])
    for tile in tiles:
        columns, rows = ((line != OUTSIDE).nonzero() for line in (batch.x[tile], batch.y[tile]))
        if len(columns) and len(rows):
            part = slice(rows[0].item(), rows[-1].item() + 1), slice(columns[0].item(), columns[-1].item() + 1)
            x, y = torch.broadcast_tensors(batch.x[tile, None, part[1]], batch.y[tile, part[0], None])
            grid = torch.stack([x, y], dim=-1)[None]
            image = torch.sub(batch.images[tile, None], FILL)
            drawn = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            canvas[:, *part] = drawn[0]
    return canvas


@dataclass(frozen=True)
class Tiles:
    """The T tiles of a batch, on the CPU."""

    rows: Tensor  # (T,) position in the batch
    slots: Tensor  # (T,) index of the tile in its mosaic
    sources: Tensor  # (T,) index into the cache
    rects: Tensor  # (T, 4) xyxy, the output area of the tile
    scales: Tensor  # (T, 2) x, y; x is negative for mirrored images
    offsets: Tensor  # (T, 2)


def plan_tiles(indices: Tensor, random: Tensor, settings: AugmentSettings, cache: ImageCache) -> Tiles:
    """Choose the images of a batch and their placement."""
    batch, (height, width) = len(indices), cache.images.shape[2:]
    numbers = random[:, FIRST_TILE:].view(batch, NUM_TILES, TILE_COLUMNS)
    sources = (numbers[..., 0] * len(cache)).long()  # (B, NUM_TILES)
    sources[:, 0] = indices
    mosaic = random[:, MOSAIC] < settings.mosaic
    low, high = MOSAIC_SPLIT
    split = (low + (high - low) * random[:, [SPLIT_X, SPLIT_Y]]) * torch.tensor([width, height])
    split = split.round()
    split[~mosaic] = torch.tensor([width, height], dtype=split.dtype)  # the first tile fills the output
    x, y = split.unbind(1)
    zero, right, bottom = torch.zeros(batch), torch.full((batch,), float(width)), torch.full((batch,), float(height))
    edges = [zero, zero, x, y], [x, zero, right, y], [zero, y, x, bottom], [x, y, right, bottom]  # xyxy of each tile
    rects = torch.stack([torch.stack(tile, dim=1) for tile in edges], dim=1)  # (B, NUM_TILES, 4)
    used = torch.stack([torch.ones_like(mosaic), mosaic, mosaic, mosaic], dim=1)
    rows, slots = used.nonzero(as_tuple=True)
    scales, offsets = place_tiles(numbers[used], rects[used], (height, width), settings)
    return Tiles(rows, slots, sources[used], rects[used], scales, offsets)


def place_tiles(
    numbers: Tensor, rects: Tensor, size: tuple[int, int], settings: AugmentSettings
) -> tuple[Tensor, Tensor]:
    """Scales (T, 2) and offsets (T, 2) that place images of `size` (height, width) at random in rectangles (T, 4)."""
    _, scale, aspect, x, y, flip = numbers.unbind(1)
    scale = 1 + settings.scale * (2 * scale - 1)
    stretch = (1 + settings.aspect) ** (aspect - 0.5)
    scales = torch.stack([scale * stretch, scale / stretch], dim=1)
    image_sides = torch.tensor([size[1], size[0]]) * scales  # (T, 2) in the output
    rect_sides = rects[:, 2:] - rects[:, :2]
    where = torch.stack([x, y], dim=1)
    offsets = rects[:, :2] + where * (rect_sides - image_sides) + (2 * where - 1) * settings.translate * rect_sides
    mirrored = flip < settings.flip
    offsets[:, 0] += mirrored * image_sides[:, 0]
    scales[:, 0] *= 1 - 2 * mirrored.float()
    return scales, offsets


def source_coordinates(tiles: Tiles, axis: int, length: int) -> Tensor:
    """The source coordinate in -1..1 of each output pixel along an axis (T, length); OUTSIDE beyond the tile."""
    pixel = torch.arange(length) + 0.5
    source = (pixel - tiles.offsets[:, axis, None]) / tiles.scales[:, axis, None]
    inside = (pixel > tiles.rects[:, axis, None]) & (pixel < tiles.rects[:, axis + 2, None])
    return torch.where(inside, 2 * source / length - 1, OUTSIDE)


def transform_boxes(cache: ImageCache, tiles: Tiles, batch: int) -> tuple[Tensor, Tensor]:
    """The boxes of all tiles in the output (B, 2M, 4), clipped to their tiles, and their labels (B, 2M)."""
    scales, offsets = tiles.scales[:, None].repeat(1, 1, 2), tiles.offsets[:, None].repeat(1, 1, 2)
    moved = cache.boxes[tiles.sources] * scales + offsets  # (T, M, 4)
    mirrored = tiles.scales[:, 0] < 0
    moved[mirrored] = moved[mirrored][..., [2, 1, 0, 3]]
    low, high = tiles.rects[:, None, :2].repeat(1, 1, 2), tiles.rects[:, None, 2:].repeat(1, 1, 2)
    boxes = moved.clamp(low, high)
    sides = boxes[..., 2:] - boxes[..., :2]
    keep = (sides >= MIN_SIDE).all(dim=-1) & (box_area(boxes) >= MIN_VISIBLE * box_area(moved))
    labels = torch.where(keep, cache.labels[tiles.sources], -1)

    max_objects = boxes.shape[1]
    all_boxes = boxes.new_zeros(batch, NUM_TILES, max_objects, 4)
    all_labels = labels.new_full((batch, NUM_TILES, max_objects), -1)
    all_boxes[tiles.rows, tiles.slots] = boxes
    all_labels[tiles.rows, tiles.slots] = labels
    all_boxes, all_labels = all_boxes.flatten(1, 2), all_labels.flatten(1)
    order = (all_labels < 0).int().argsort(dim=1, stable=True)[:, : 2 * max_objects]  # padding last
    return all_boxes.gather(1, order[..., None].expand(-1, -1, 4)), all_labels.gather(1, order)


def plan_colors(random: Tensor, settings: AugmentSettings) -> Tensor:
    """A color matrix per image (B, 3, 3) that shifts the hue and scales saturation and value."""
    hue, saturation, value = (2 * random[:, [HUE, SATURATION, VALUE]] - 1).unbind(1)
    return color_matrices(hue * settings.hue * tau, 1 + saturation * settings.saturation, 1 + value * settings.value)


def color_matrices(angle: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """(B,) each -> RGB matrices (B, 3, 3) that rotate and scale the chroma of NTSC's YIQ, then scale all channels."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    chroma = torch.zeros(len(angle), 3, 3)
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = angle.cos() * saturation
    chroma[:, 1, 2], chroma[:, 2, 1] = -angle.sin() * saturation, angle.sin() * saturation
    return value[:, None, None] * (torch.linalg.inv(to_yiq) @ chroma @ to_yiq)
