"""Batched augmentation on the training device: pure functions of cached images, targets and a table of random numbers.

Every image is placed in a rectangle of the output by one axis-aligned map, output = input * scale + offset: an
ordinary sample fills the whole output, a mosaic is four samples in four rectangles, mixup a second sample on top.
"""

from dataclasses import dataclass
from math import tau

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import box_area
from utils.cache import ImageCache

FILL = 114.0  # the gray level, of 255, where no image lies
MIN_SIDE = 2.0  # pixels that a box must keep on each side
MIN_VISIBLE = 0.25  # share of its area that a box must keep
MOSAIC_SPLIT = (0.3, 0.7)  # where the four tiles of a mosaic meet, as a share of the side

# Columns of the random table. A tile takes TILE_COLUMNS: which image, scale, aspect, x, y, flip.
TILE_COLUMNS = 6
MOSAIC, SPLIT_X, SPLIT_Y, MIXUP, MIXUP_RATIO, HUE, SATURATION, VALUE, FIRST_TILE = range(9)
NUM_TILES = 5  # up to four of a mosaic (an ordinary sample uses the first), and mixup's
NUM_COLUMNS = FIRST_TILE + NUM_TILES * TILE_COLUMNS


@dataclass(frozen=True)
class AugmentSettings:
    """Strengths; 0 switches a part off."""

    mosaic: float  # probability of four images in one
    mixup: float  # probability of a second image on top
    scale: float  # size times 1 - scale to 1 + scale
    aspect: float  # width / height times 1 / (1 + aspect) to 1 + aspect
    translate: float  # shift as a share of the side
    flip: float  # probability of mirroring left to right
    hue: float  # turn of the colour circle, as a share of it
    saturation: float  # saturation times 1 - saturation to 1 + saturation
    value: float  # brightness times 1 - value to 1 + value


def epoch_order(seed: int, epoch: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """The order of an epoch (N,) and its random numbers in [0, 1) (N, NUM_COLUMNS), a row per position."""
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(state)
    return torch.randperm(num_samples, generator=generator), torch.rand(num_samples, NUM_COLUMNS, generator=generator)


def augment(
    cache: ImageCache, indices: Tensor, random: Tensor, settings: AugmentSettings, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples `indices` (B,) with random rows (B, NUM_COLUMNS), both on the CPU, as a training batch on `device`.

    Returns images (B, 3, H, W) float in 0..1, boxes (B, 2M, 4) xyxy in pixels and labels (B, 2M) padded with -1,
    where M is the most objects of one image; what a crowded mosaic has beyond 2M is dropped.
    """
    tiles = plan_tiles(indices, random, settings, cache)
    images = jitter_colours(warp(cache, tiles, device, len(indices)), random, settings)
    boxes, labels = move_boxes(cache, tiles, len(indices))
    return images, boxes.to(device), labels.to(device)


@dataclass(frozen=True)
class Tiles:
    """T placed images of a batch, all on the CPU."""

    rows: Tensor  # (T,) position in the batch
    slots: Tensor  # (T,) which of a position's NUM_TILES tiles
    sources: Tensor  # (T,) index into the cache
    rects: Tensor  # (T, 4) xyxy, where the tile may draw
    scales: Tensor  # (T, 2) x negative when mirrored
    offsets: Tensor  # (T, 2)
    weights: Tensor  # (T,) its share in mixup


def plan_tiles(indices: Tensor, random: Tensor, settings: AugmentSettings, cache: ImageCache) -> Tiles:
    """Which images go where."""
    batch, (height, width) = len(indices), cache.images.shape[2:]
    numbers = random[:, FIRST_TILE:].view(batch, NUM_TILES, TILE_COLUMNS)
    sources = (numbers[..., 0] * len(cache)).long()  # (B, NUM_TILES)
    sources[:, 0] = indices
    mosaic = random[:, MOSAIC] < settings.mosaic
    mixup = random[:, MIXUP] < settings.mixup
    low, high = MOSAIC_SPLIT
    split = (low + (high - low) * random[:, [SPLIT_X, SPLIT_Y]]) * torch.tensor([width, height])
    split = split.round()
    split[~mosaic] = torch.tensor([width, height], dtype=split.dtype)  # the first tile fills the output
    x, y = split.unbind(1)
    zero, right, bottom = torch.zeros(batch), torch.full((batch,), float(width)), torch.full((batch,), float(height))
    rects = torch.stack(
        [
            torch.stack([zero, zero, x, y], dim=1),
            torch.stack([x, zero, right, y], dim=1),
            torch.stack([zero, y, x, bottom], dim=1),
            torch.stack([x, y, right, bottom], dim=1),
            torch.stack([zero, zero, right, bottom], dim=1),
        ],
        dim=1,
    )  # (B, NUM_TILES, 4)
    used = torch.stack([torch.ones_like(mosaic), mosaic, mosaic, mosaic, mixup], dim=1)
    ratio = torch.where(mixup, 0.4 + 0.2 * random[:, MIXUP_RATIO], 1.0)[:, None]
    weights = torch.cat([ratio.expand(-1, 4), 1 - ratio], dim=1)  # (B, NUM_TILES)
    rows, slots = used.nonzero(as_tuple=True)
    scales, offsets = place(numbers[used], rects[used], (height, width), settings)
    return Tiles(rows, slots, sources[used], rects[used], scales, offsets, weights[used])


def place(numbers: Tensor, rects: Tensor, size: tuple[int, int], settings: AugmentSettings) -> tuple[Tensor, Tensor]:
    """Scales (T, 2) and offsets (T, 2) that put images of (height, width) at random into rectangles (T, 4)."""
    _, scale, aspect, x, y, flip = numbers.unbind(1)
    scale = 1 + settings.scale * (2 * scale - 1)
    stretch = (1 + settings.aspect) ** (aspect - 0.5)
    scales = torch.stack([scale * stretch, scale / stretch], dim=1)
    image_sides = torch.tensor([size[1], size[0]]) * scales  # (T, 2) as they come to lie
    rect_sides = rects[:, 2:] - rects[:, :2]
    where = torch.stack([x, y], dim=1)
    offsets = rects[:, :2] + where * (rect_sides - image_sides) + (2 * where - 1) * settings.translate * rect_sides
    mirrored = flip < settings.flip
    offsets[:, 0] += mirrored * image_sides[:, 0]
    scales[:, 0] *= 1 - 2 * mirrored.float()
    return scales, offsets


def warp(cache: ImageCache, tiles: Tiles, device: torch.device, batch: int) -> Tensor:
    """Draw the tiles: (B, 3, H, W) float, gray levels minus FILL, so that the zeros outside an image are the fill."""
    height, width = cache.images.shape[2:]
    images = cache.images[tiles.sources.to(cache.images.device)].to(device, non_blocking=device.type == "cuda")
    images = torch.sub(images, FILL)  # float from here on
    grid = torch.stack(
        torch.broadcast_tensors(
            source_coordinates(tiles, 0, width).to(device)[:, None, :],
            source_coordinates(tiles, 1, height).to(device)[:, :, None],
        ),
        dim=-1,
    )  # (T, H, W, 2)
    drawn = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if len(tiles.rows) == batch:  # one tile each, in order
        return drawn
    drawn *= tiles.weights.to(device)[:, None, None, None]
    return drawn.new_zeros(batch, 3, height, width).index_add_(0, tiles.rows.to(device), drawn)


def source_coordinates(tiles: Tiles, axis: int, length: int) -> Tensor:
    """For each output pixel along an axis, where in the source it lies: (T, length) in grid_sample's -1..1.

    Pixels beyond the tile's rectangle get 3, which lies outside every image.
    """
    pixel = torch.arange(length) + 0.5
    source = (pixel - tiles.offsets[:, axis, None]) / tiles.scales[:, axis, None]
    inside = (pixel > tiles.rects[:, axis, None]) & (pixel < tiles.rects[:, axis + 2, None])
    return torch.where(inside, 2 * source / length - 1, 3.0)


def move_boxes(cache: ImageCache, tiles: Tiles, batch: int) -> tuple[Tensor, Tensor]:
    """The boxes of all tiles in the output (B, 2M, 4), clipped to their rectangles, and labels (B, 2M)."""
    scales, offsets = tiles.scales[:, None].repeat(1, 1, 2), tiles.offsets[:, None].repeat(1, 1, 2)
    moved = cache.boxes[tiles.sources] * scales + offsets  # (T, M, 4)
    mirrored = tiles.scales[:, 0] < 0
    moved[mirrored] = moved[mirrored][..., [2, 1, 0, 3]]
    low, high = tiles.rects[:, None, :2].repeat(1, 1, 2), tiles.rects[:, None, 2:].repeat(1, 1, 2)
    boxes = moved.clamp(low, high)
    sides = boxes[..., 2:] - boxes[..., :2]
    keep = (sides >= MIN_SIDE).all(dim=-1) & (box_area(boxes) >= MIN_VISIBLE * box_area(moved))
    labels = torch.where(keep, cache.labels[tiles.sources], -1)

    most = boxes.shape[1]
    all_boxes = boxes.new_zeros(batch, NUM_TILES, most, 4)
    all_labels = labels.new_full((batch, NUM_TILES, most), -1)
    all_boxes[tiles.rows, tiles.slots] = boxes
    all_labels[tiles.rows, tiles.slots] = labels
    all_boxes, all_labels = all_boxes.flatten(1, 2), all_labels.flatten(1)
    order = (all_labels < 0).int().argsort(dim=1, stable=True)[:, : 2 * most]  # objects first
    return all_boxes.gather(1, order[..., None].expand(-1, -1, 4)), all_labels.gather(1, order)


def jitter_colours(drawn: Tensor, random: Tensor, settings: AugmentSettings) -> Tensor:
    """Turn hue, and scale saturation and value, with one colour matrix per image; from `warp`'s range to 0..1."""
    symmetric = 2 * random[:, [HUE, SATURATION, VALUE]] - 1  # (B, 3)
    matrices = colour_matrices(
        symmetric[:, 0] * settings.hue * tau,
        1 + symmetric[:, 1] * settings.saturation,
        1 + symmetric[:, 2] * settings.value,
    ).to(drawn.device)
    fill = FILL / 255 * matrices.sum(dim=2, keepdim=True)  # (B, 3, 1)
    return torch.baddbmm(fill, matrices / 255, drawn.flatten(2)).clamp_(0, 1).view_as(drawn)


def colour_matrices(angle: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """(B,) each -> (B, 3, 3) on RGB: a turn and a scaling of the chroma plane of NTSC's YIQ, then a scaling of all."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    chroma = torch.zeros(len(angle), 3, 3)
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = angle.cos() * saturation
    chroma[:, 1, 2], chroma[:, 2, 1] = -angle.sin() * saturation, angle.sin() * saturation
    return value[:, None, None] * (torch.linalg.inv(to_yiq) @ chroma @ to_yiq)
