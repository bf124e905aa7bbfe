"""Batched augmentation: `plan_batch` plans a batch on the CPU, `render_batch` renders it on the training device.

Each image is placed in a rectangle of the output, its tile, by output = input * scale + offset along each axis. Every
sample has four tiles: in a mosaic, they share the output; otherwise, the first fills it and the others are empty.
"""

from dataclasses import dataclass
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
MOSAIC_SPLIT = (0.3, 0.7)  # range of the point where the tiles of a mosaic meet, as a fraction of the side

# Columns of the random table. Each tile has TILE_COLUMNS: image index, scale, aspect, x, y, flip.
TILE_COLUMNS = 6
MOSAIC, SPLIT_X, SPLIT_Y, HUE, SATURATION, VALUE, FIRST_TILE = range(7)
NUM_TILES = 4  # top left, top right, bottom left, bottom right
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


class Tiles(NamedTuple):
    """The tiles of a batch of B samples."""

    sources: Tensor  # (B, NUM_TILES) index of the image in the cache
    rects: Tensor  # (B, NUM_TILES, 4) xyxy in whole pixels, the output area of the tile
    scales: Tensor  # (B, NUM_TILES, 2) x, y; x is negative for mirrored images
    offsets: Tensor  # (B, NUM_TILES, 2)


class BatchPlan(NamedTuple):
    """A batch of B samples: everything that rendering and training need."""

    images: Tensor  # (T, 3, H, W) uint8, the source images; the whole cache if it is on the GPU
    sources: Tensor  # (B, NUM_TILES) index into `images` of each tile
    rects: Tensor  # as in `Tiles`
    scales: Tensor
    offsets: Tensor
    colors: Tensor  # (B, 3, 3) color transformation on RGB
    boxes: Tensor  # (B, 2M, 4) xyxy in pixels of the output, where M is the maximum number of objects per image
    labels: Tensor  # (B, 2M) padded with -1


def plan_batch(cache: ImageCache, indices: Tensor, random: Tensor, settings: AugmentSettings) -> BatchPlan:
    """Plan a batch of samples `indices` (B,) from random numbers (B, NUM_COLUMNS); only `images` may be on a GPU."""
    tiles = plan_tiles(indices, random, settings, cache)
    images, sources = gather_images(cache.images, tiles)
    return BatchPlan(images, sources, *tiles[1:], plan_colors(random, settings), *transform_boxes(cache, tiles))


def gather_images(images: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The images (T, 3, H, W) of all nonempty tiles, and the index (B, NUM_TILES) of each tile's image among them.

    Images on a GPU are all returned, without a copy. The result is pinned if it is in RAM and CUDA is used, so that it
    can be copied to the GPU asynchronously.
    """
    if images.is_cuda:
        return images, tiles.sources
    used = (tiles.rects[..., :2] < tiles.rects[..., 2:]).all(dim=-1)  # (B, NUM_TILES)
    sources = tiles.sources[used]
    gathered = torch.empty(len(sources), *images.shape[1:], dtype=images.dtype, pin_memory=torch.cuda.is_initialized())
    np.take(images.numpy(), sources.numpy(), axis=0, out=gathered.numpy(), mode="clip")  # single-threaded
    return gathered, (used.flatten().cumsum(0) - 1).clamp_(min=0).view(used.shape)


def render_batch(plan: BatchPlan) -> Tensor:
    """Render the images (B, 3, H, W), float in 0..1 and channels-last, on the device of the plan."""
    fill = FILL / 255 * plan.colors.sum(dim=2)  # (B, 3)
    colors = plan.colors / 255
    if plan.images.is_cuda:
        drawn = render_pixels(plan)
        mixed = [
            fill[:, None, None, k] + sum(colors[:, None, None, k, c] * drawn[c] for c in range(3)) for k in range(3)
        ]
        return torch.stack(mixed, dim=-1).clamp_(0, 1).permute(0, 3, 1, 2)
    images = torch.empty(len(colors), *plan.images.shape[1:], memory_format=torch.channels_last)
    for row, image in enumerate(images):
        drawn = render_tiles(plan, row)
        image[:] = torch.addmm(fill[row, :, None], colors[row], drawn.flatten(1)).clamp_(0, 1).view_as(drawn)
    return images


def render_pixels(plan: BatchPlan) -> list[Tensor]:
    """The channels (B, H, W) of all images before the color transformation, as differences from FILL; for GPUs.

    Each pixel is computed once, from the tile it belongs to. The channels are separate so that torch.compile can
    fuse everything into a single kernel.
    """
    height, width = plan.images.shape[2:]
    columns, rows = (torch.arange(length, device=plan.images.device) for length in (width, height))
    sample = torch.arange(len(plan.rects), device=plan.images.device)[:, None, None]
    right, below = columns >= plan.rects[:, 0, 2, None], rows >= plan.rects[:, 0, 3, None]  # (B, W), (B, H)
    tile = right[:, None, :].long() + 2 * below[:, :, None]  # (B, H, W)
    source = plan.sources[sample, tile]
    x = source_coordinates(plan, 0, width)[sample, tile, columns] - 0.5  # pixel centers are whole numbers
    y = source_coordinates(plan, 1, height)[sample, tile, rows[:, None]] - 0.5
    left, top = x.floor(), y.floor()
    channels = [torch.zeros(tile.shape, device=tile.device)] * 3
    for row, weight_y in (top, top + 1 - y), (top + 1, y - top):
        for column, weight_x in (left, left + 1 - x), (left + 1, x - left):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = row.long().clamp(0, height - 1), column.long().clamp(0, width - 1)
            weight = weight_x * weight_y * inside
            channels = [sum_ + weight * (plan.images[source, c, *place] - FILL) for c, sum_ in enumerate(channels)]
    return channels


def render_tiles(plan: BatchPlan, row: int) -> Tensor:
    """One image (3, H, W), equal to that drawn by `render_pixels` up to rounding; for CPUs."""
    height, width = plan.images.shape[2:]
    canvas = torch.zeros(3, height, width)
    x = 2 * source_coordinates(plan, 0, width)[row] / width - 1  # (NUM_TILES, W), grid_sample's -1..1
    y = 2 * source_coordinates(plan, 1, height)[row] / height - 1
    for tile, (left, top, right, bottom) in enumerate(plan.rects[row].int().tolist()):
        if left < right and top < bottom:
            columns, rows = torch.broadcast_tensors(x[tile, None, left:right], y[tile, top:bottom, None])
            image = torch.sub(plan.images[plan.sources[row, tile], None], FILL)  # makes zero padding equal to FILL
            grid = torch.stack([columns, rows], dim=-1)[None]
            drawn = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            canvas[:, top:bottom, left:right] = drawn[0]
    return canvas


def source_coordinates(tiles: Tiles | BatchPlan, axis: int, length: int) -> Tensor:
    """Where each output pixel lies in the image of each tile along an axis, in pixels: (B, NUM_TILES, length)."""
    pixel = torch.arange(length, device=tiles.scales.device) + 0.5
    return (pixel - tiles.offsets[..., axis, None]) / tiles.scales[..., axis, None]


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
    return Tiles(sources, rects, *place_tiles(numbers, rects, (height, width), settings))


def place_tiles(
    numbers: Tensor, rects: Tensor, size: tuple[int, int], settings: AugmentSettings
) -> tuple[Tensor, Tensor]:
    """Scales and offsets (..., 2) that place images of `size` (height, width) at random in rectangles (..., 4)."""
    _, scale, aspect, x, y, flip = numbers.unbind(-1)
    scale = 1 + settings.scale * (2 * scale - 1)
    stretch = (1 + settings.aspect) ** (aspect - 0.5)
    scales = torch.stack([scale * stretch, scale / stretch], dim=-1)
    image_sides = torch.tensor([size[1], size[0]]) * scales  # in the output
    rect_sides = rects[..., 2:] - rects[..., :2]
    where = torch.stack([x, y], dim=-1)
    offsets = rects[..., :2] + where * (rect_sides - image_sides) + (2 * where - 1) * settings.translate * rect_sides
    mirrored = flip < settings.flip
    offsets[..., 0] += mirrored * image_sides[..., 0]
    scales[..., 0] *= 1 - 2 * mirrored.float()
    return scales, offsets


def transform_boxes(cache: ImageCache, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The boxes of all tiles in the output (B, 2M, 4), clipped to their tiles, and their labels (B, 2M)."""
    scales, offsets = tiles.scales[..., None, :].repeat(1, 1, 1, 2), tiles.offsets[..., None, :].repeat(1, 1, 1, 2)
    moved = cache.boxes[tiles.sources] * scales + offsets  # (B, NUM_TILES, M, 4)
    mirrored = tiles.scales[..., 0] < 0
    moved[mirrored] = moved[mirrored][..., [2, 1, 0, 3]]
    low, high = (tiles.rects[..., None, corner].repeat(1, 1, 1, 2) for corner in (slice(2), slice(2, 4)))
    boxes = moved.clamp(low, high)
    sides = boxes[..., 2:] - boxes[..., :2]  # 0 in empty tiles
    keep = (sides >= MIN_SIDE).all(dim=-1) & (box_area(boxes) >= MIN_VISIBLE * box_area(moved))
    labels = torch.where(keep, cache.labels[tiles.sources], -1)

    max_objects = boxes.shape[2]
    boxes, labels = boxes.flatten(1, 2), labels.flatten(1)  # (B, 4M, 4), (B, 4M)
    order = (labels < 0).int().argsort(dim=1, stable=True)[:, : 2 * max_objects]  # padding last
    return boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)


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
