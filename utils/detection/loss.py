"""The training loss: which predictions answer for which objects, and what each should have said."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nets.spec import ModelSpec
from utils.detection.anchors import Level, decode_boxes, decode_head, head_levels, reshape_head
from utils.detection.boxes import batched_iou, ciou, shape_iou
from utils.system.distributed import ProcessGroup

TERMS = ("loss", "box", "objectness", "class")
HEAD_BALANCE = (0.4, 1.0)  # objectness weight of P5 and P4: the coarse head has few cells and saturates early


class Assignment(NamedTuple):
    """Candidate predictions of one head: P = M * A * 3 slots per image, of which `mask` says the real ones."""

    mask: Tensor  # (B, P) bool
    index: Tensor  # (B, P) into the head's A*H*W predictions
    target: Tensor  # (B, P) into the image's M objects
    cells: Tensor  # (B, P, 2) x, y of the cell
    anchors: Tensor  # (P, 2) width, height in input pixels


def matching_anchors(boxes: Tensor, levels: Sequence[Level], min_iou: float) -> tuple[Tensor, ...]:
    """Which anchors answer for objects (B, M, 4) xyxy in pixels: for each head a mask (B, M, A).

    An anchor does when its shape overlaps the object's by more than `min_iou`, or when none overlaps it more: so every
    object is answered for, and most by several.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    overlap = shape_iou(sides, torch.cat([level.anchors for level in levels]))  # (B, M, all anchors)
    matches = (overlap > min_iou) | (overlap == overlap.amax(dim=-1, keepdim=True))
    return matches.split([len(level.anchors) for level in levels], dim=-1)


def assign_targets(boxes: Tensor, labels: Tensor, matches: Tensor, level: Level, grid: tuple[int, int]) -> Assignment:
    """Give objects (B, M, 4) xyxy in pixels, labels (B, M) with -1 for padding, to predictions of one head.

    The anchors of `matches` (B, M, A) answer in the cell of the object's centre and in the nearest neighbours, one left
    or right and one above or below. `grid` is (H, W).
    """
    height, width = grid
    batch, most = labels.shape
    num_anchors = len(level.anchors)
    centres = (boxes[..., :2] + boxes[..., 2:]) / (2 * level.stride)  # (B, M, 2) in cells

    own = within(centres.long(), grid)  # (B, M, 2)
    step = torch.where(centres - own < 0.5, -1, 1)  # (B, M, 2) towards the nearer neighbour
    no_step = torch.zeros_like(step[..., 0])
    steps = torch.stack(
        [
            torch.stack([no_step, no_step], dim=-1),
            torch.stack([step[..., 0], no_step], dim=-1),
            torch.stack([no_step, step[..., 1]], dim=-1),
        ],
        dim=2,
    )  # (B, M, 3, 2)
    cells = own[:, :, None] + steps
    inside = (within(cells, grid) == cells).all(dim=-1)  # (B, M, 3)

    mask = (matches[..., None] & inside[:, :, None] & (labels >= 0)[:, :, None, None]).flatten(1)  # (B, M*A*3)
    cells = within(cells, grid)
    flat = cells[..., 1] * width + cells[..., 0]  # (B, M, 3)
    anchor = torch.arange(num_anchors, device=boxes.device)
    index = (anchor[:, None] * (height * width) + flat[:, :, None]).flatten(1)
    target = torch.arange(most, device=boxes.device).repeat_interleave(num_anchors * 3).expand(batch, -1)
    cells = cells[:, :, None].expand(-1, -1, num_anchors, -1, -1).flatten(1, 3)
    anchors = level.anchors[anchor.repeat_interleave(3).repeat(most)]
    return Assignment(mask, index, target, cells, anchors)


def within(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells (..., 2) x, y moved into a grid of (H, W)."""
    height, width = grid
    return torch.stack([cells[..., 0].clamp(0, width - 1), cells[..., 1].clamp(0, height - 1)], dim=-1)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) and (B, P) -> (B, P, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


@dataclass(frozen=True)
class LossSettings:
    """Weights and thresholds."""

    box: float = 0.1
    objectness: float = 1.0
    classes: float = 0.02
    anchor_iou: float = 0.3  # of the shapes of an object and the anchors that answer for it
    ignore_iou: float = 0.7  # a prediction this close to an object is no background even if not assigned


class YoloLoss:
    """Raw heads and padded targets -> named loss terms; the whole batch at once, shapes fixed.

    CIoU (arXiv 1911.08287) for boxes, binary cross-entropy for objectness, whose target is the CIoU reached, and for
    classes. Each term is a mean over what it is about in the batch, per head. With several `group` it is a mean over
    all their batches: each finds its share, and the shares add up to what one process would find.
    """

    def __init__(
        self, spec: ModelSpec, settings: LossSettings, device: torch.device, group: ProcessGroup | None = None
    ) -> None:
        self.settings = settings
        self.num_classes = spec.num_classes
        self.scale_xy = spec.scale_xy
        self.levels = head_levels(spec, device)
        self.group = group or ProcessGroup()
        weights = [[settings.box, settings.objectness * balance, settings.classes] for balance in HEAD_BALANCE]
        self.weights = torch.tensor(weights, device=device)  # (heads, terms)
        self.blank = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device)  # the box in padding slots

    def __call__(self, heads: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Heads P5, P4; boxes (B, M, 4) xyxy in input pixels, labels (B, M) -> "loss" and its three parts."""
        sums, counts = self.sums(heads, boxes, labels)
        terms = (self.weights * sums / self.group.all_reduce(counts).clamp(min=1)).sum(dim=0)
        return dict(zip(TERMS, (terms.sum(), *terms.unbind()), strict=True))

    def sums(self, heads: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The terms of each head summed over what they are about, and how many that are: both (heads, terms)."""
        matches = matching_anchors(boxes, self.levels, self.settings.anchor_iou)
        sums, counts = [], []
        for head, level, match in zip(heads, self.levels, matches, strict=True):
            found = assign_targets(boxes, labels, match, level, (head.shape[2], head.shape[3]))
            terms, number = self.head_sums(head, level, found, boxes, labels)
            sums.append(terms)
            counts.append(number)
        return torch.stack(sums), torch.stack(counts)

    def head_sums(
        self, head: Tensor, level: Level, found: Assignment, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Box, objectness and class sums of one head (3,), and what they count (3,)."""
        raw = reshape_head(head, len(level.anchors))  # (B, A, H, W, 5+C)
        flat = raw.flatten(1, 3)  # (B, N, 5+C)

        chosen = gather_rows(flat, found.index)  # (B, P, 5+C)
        predicted = decode_boxes(chosen[..., :4], found.cells, found.anchors, level.stride, self.scale_xy)
        # padding slots compare the blank box with itself, so that no gradient of theirs is NaN
        wanted = torch.where(found.mask[..., None], gather_rows(boxes, found.target), self.blank)
        predicted = torch.where(found.mask[..., None], predicted, self.blank)
        quality = ciou(predicted, wanted)
        box = ((1 - quality) * found.mask).sum()

        target = torch.where(found.mask, quality.detach().clamp(min=0), -1.0)
        target = torch.full_like(flat[..., 4], -1).scatter_reduce(1, found.index, target, "amax")  # (B, N), -1: none
        with torch.no_grad():
            counted = (target >= 0) | ~self.near_an_object(head, level, boxes, labels)
        objectness = F.binary_cross_entropy_with_logits(flat[..., 4], target.clamp(min=0), reduction="none")

        one_hot = F.one_hot(labels.clamp(min=0).gather(1, found.target), self.num_classes)
        classes = F.binary_cross_entropy_with_logits(chosen[..., 5:], one_hot.float(), reduction="none").sum(dim=-1)
        sums = torch.stack([box, (objectness * counted).sum(), (classes * found.mask).sum()])
        answering = found.mask.sum()
        return sums, torch.stack([answering, counted.sum(), answering]).float()

    def near_an_object(self, head: Tensor, level: Level, boxes: Tensor, labels: Tensor) -> Tensor:
        """Which predictions (B, A*H*W) overlap some object by more than `ignore_iou`."""
        decoded, _ = decode_head(head, level, self.scale_xy)
        overlap = batched_iou(decoded, boxes)  # (B, N, M)
        return (overlap.masked_fill(labels[:, None] < 0, 0) > self.settings.ignore_iou).any(dim=-1)
