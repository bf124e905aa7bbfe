"""Target assignment: which predictions of a head are trained on which objects."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.detection.anchors import Level
from utils.detection.boxes import shape_iou


class Assignment(NamedTuple):
    """Predictions of one head and their targets, in P = M * A * 3 slots per image; `mask` marks the used ones."""

    mask: Tensor  # (B, P) bool
    index: Tensor  # (B, P) into the head's A*H*W predictions
    target: Tensor  # (B, P) into the image's M objects
    cells: Tensor  # (B, P, 2) x, y of the cell
    anchors: Tensor  # (P, 2) width, height in input pixels


def match_anchors(boxes: Tensor, levels: Sequence[Level], min_iou: float) -> tuple[Tensor, ...]:
    """Match objects (B, M, 4) xyxy in pixels with anchors by shape: a mask (B, M, A) for each head.

    An anchor matches if the IoU of the two shapes exceeds `min_iou` or is the highest among all anchors.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    overlap = shape_iou(sides, torch.cat([level.anchors for level in levels]))  # (B, M, all anchors)
    matches = (overlap > min_iou) | (overlap == overlap.amax(dim=-1, keepdim=True))
    return matches.split([len(level.anchors) for level in levels], dim=-1)


def assign_targets(boxes: Tensor, labels: Tensor, matches: Tensor, level: Level, grid: tuple[int, int]) -> Assignment:
    """Assign objects (B, M, 4) xyxy in pixels, with padded labels (B, M), to the predictions of a head of size (H, W).

    The anchors in `matches` (B, M, A) predict in the cell of the object's center and in its two nearest neighbors.
    """
    height, width = grid
    batch, max_objects = labels.shape
    num_anchors = len(level.anchors)
    centers = (boxes[..., :2] + boxes[..., 2:]) / (2 * level.stride)  # (B, M, 2) in cells

    own = clamp_to_grid(centers.long(), grid)  # (B, M, 2)
    step = torch.where(centers - own < 0.5, -1, 1)  # (B, M, 2) toward the nearer neighbor
    none = torch.zeros_like(step[..., 0])
    steps = [torch.stack(pair, dim=-1) for pair in ((none, none), (step[..., 0], none), (none, step[..., 1]))]
    cells = own[:, :, None] + torch.stack(steps, dim=2)  # (B, M, 3, 2)
    clamped = clamp_to_grid(cells, grid)
    inside = (clamped == cells).all(dim=-1)  # (B, M, 3)

    mask = (matches[..., None] & inside[:, :, None] & (labels >= 0)[:, :, None, None]).flatten(1)  # (B, M*A*3)
    flat = clamped[..., 1] * width + clamped[..., 0]  # (B, M, 3)
    anchor = torch.arange(num_anchors, device=boxes.device)
    index = (anchor[:, None] * (height * width) + flat[:, :, None]).flatten(1)
    target = torch.arange(max_objects, device=boxes.device).repeat_interleave(num_anchors * 3).expand(batch, -1)
    cells = clamped[:, :, None].expand(-1, -1, num_anchors, -1, -1).flatten(1, 3)
    anchors = level.anchors[anchor.repeat_interleave(3).repeat(max_objects)]
    return Assignment(mask, index, target, cells, anchors)


def clamp_to_grid(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells (..., 2) x, y moved into a grid of (H, W)."""
    height, width = grid
    return torch.stack([cells[..., 0].clamp(0, width - 1), cells[..., 1].clamp(0, height - 1)], dim=-1)
