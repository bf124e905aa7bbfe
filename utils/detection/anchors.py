"""Anchors, and decoding of the network's raw heads into boxes and scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nets.spec import MAX_ANCHOR_SIDE, MIN_ANCHOR_SIDE, STRIDES, ModelSpec
from utils.system.errors import FileError
from utils.system.files import read_lines
from utils.system.text import parse_number

MIN_ANCHOR_IOU = 0.3  # an anchor is assigned to an object if the IoU of their shapes exceeds this
MAX_LOG_SIZE = 8.0  # keeps exp() finite and above 0; no box is e^8 times as large as its anchor


class Level(NamedTuple):
    """One head: its stride and the (A, 2) anchors, width and height in input pixels."""

    stride: int
    anchors: Tensor


def head_levels(spec: ModelSpec, device: torch.device | str = "cpu") -> tuple[Level, ...]:
    """The heads of a network, P5 first."""
    anchors = torch.tensor(spec.anchors, dtype=torch.float32, device=device)
    return tuple(Level(stride, anchors[list(mask)]) for stride, mask in zip(STRIDES, spec.anchors_mask, strict=True))


def reshape_head(head: Tensor, num_anchors: int) -> Tensor:
    """Raw head (B, A*(5+C), H, W) -> float32 (B, A, H, W, 5+C): tx, ty, tw, th, objectness, classes."""
    batch, channels, height, width = head.shape
    return head.view(batch, num_anchors, channels // num_anchors, height, width).permute(0, 1, 3, 4, 2).float()


def decode_boxes(raw: Tensor, cells: Tensor, anchors: Tensor, stride: int, scale_xy: float) -> Tensor:
    """Raw predictions (..., 4), cells (..., 2) x, y and anchors (..., 2) -> xyxy (..., 4) in input pixels."""
    center = (raw[..., :2].sigmoid() * scale_xy - (scale_xy - 1) / 2 + cells) * stride
    half = anchors * raw[..., 2:4].clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def decode_head(head: Tensor, level: Level, scale_xy: float) -> tuple[Tensor, Tensor]:
    """Raw head -> boxes (B, A*H*W, 4) xyxy in input pixels, and logits (B, A*H*W, 1+C)."""
    raw = reshape_head(head, len(level.anchors))  # (B, A, H, W, 5+C)
    rows = torch.arange(raw.shape[2], device=raw.device, dtype=raw.dtype)
    columns = torch.arange(raw.shape[3], device=raw.device, dtype=raw.dtype)
    cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (H, W, 2) x, y
    boxes = decode_boxes(raw, cells, level.anchors[:, None, None], level.stride, scale_xy)
    return boxes.flatten(1, 3), raw[..., 4:].flatten(1, 3)


def decode_heads(heads: Sequence[Tensor], levels: Sequence[Level], scale_xy: float) -> tuple[Tensor, Tensor]:
    """Raw heads -> boxes (B, N, 4) xyxy in input pixels and scores (B, N, C), class times objectness."""
    decoded = [decode_head(head, level, scale_xy) for head, level in zip(heads, levels, strict=True)]
    boxes, logits = zip(*decoded, strict=True)
    scores = torch.cat(logits, dim=1).sigmoid()  # (B, N, 1+C)
    return torch.cat(boxes, dim=1), scores[..., :1] * scores[..., 1:]


def load_anchors(path: str | Path) -> tuple[tuple[float, float], ...]:
    """Read six anchors from a text file of comma-separated widths and heights in input pixels; raises FileError."""
    words = " ".join(read_lines(path)).replace(",", " ").split()
    try:
        numbers = [parse_number(word) for word in words]
    except ValueError as error:
        raise FileError(path, f"must contain numbers, such as 10,14, 23,27: {error}") from None
    if len(numbers) != 12:
        raise FileError(path, f"must contain six anchors (12 numbers), but contains {len(numbers)} numbers")
    low, high = MIN_ANCHOR_SIDE, MAX_ANCHOR_SIDE
    if not all(low <= number <= high for number in numbers):
        raise FileError(path, f"contains anchors with sides that are not between {low} and {high:,} pixels")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
