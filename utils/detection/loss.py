"""The training loss: box, objectness and class terms of the assigned predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nets.spec import ModelSpec
from utils.detection.anchors import MIN_ANCHOR_IOU, Level, decode_boxes, decode_head, head_levels, reshape_head
from utils.detection.assignment import Assignment, assign_targets, match_anchors
from utils.detection.boxes import batched_iou, ciou
from utils.system.distributed import ProcessGroup

TERMS = ("loss", "box", "objectness", "class")
HEAD_BALANCE = (0.4, 1.0)  # objectness weight of P5 and P4: the coarse head has few cells and saturates early


@dataclass(frozen=True)
class LossSettings:
    """Weights of the terms, and IoU thresholds."""

    box: float = 0.1
    objectness: float = 1.0
    classes: float = 0.02
    anchor_iou: float = MIN_ANCHOR_IOU
    ignore_iou: float = 0.7  # an unassigned prediction that overlaps an object by more is not trained as background


class YoloLoss:
    """Raw heads and padded targets -> named loss terms, for the whole batch at once and with fixed shapes.

    The terms are CIoU (arXiv 1911.08287) for boxes, and binary cross-entropy for classes and for objectness, whose
    target is the CIoU. Each is averaged, per head, over the predictions it applies to in the batches of all processes
    of `group`; a process computes its share of the averages.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: LossSettings,
        device: torch.device,
        group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        self.settings = settings
        self.num_classes = spec.num_classes
        self.scale_xy = spec.scale_xy
        self.levels = head_levels(spec, device)
        self.group = group or ProcessGroup()
        weights = [[settings.box, settings.objectness * balance, settings.classes] for balance in HEAD_BALANCE]
        self.weights = torch.tensor(weights, device=device)  # (heads, terms)
        self.blank = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device)  # box of unused slots
        self.compute_sums = torch.compile(self.sum_terms, dynamic=False) if compiled else self.sum_terms

    def __call__(self, heads: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Heads P5, P4; boxes (B, M, 4) xyxy in input pixels, labels (B, M) -> the loss and its three terms."""
        sums, counts = self.compute_sums(heads, boxes, labels)
        terms = (self.weights * sums / self.group.all_reduce(counts).clamp(min=1)).sum(dim=0)
        return dict(zip(TERMS, (terms.sum(), *terms.unbind()), strict=True))

    def sum_terms(self, heads: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the terms of each head, and the number of predictions in each sum: both (heads, terms)."""
        matches = match_anchors(boxes, self.levels, self.settings.anchor_iou)
        sums, counts = [], []
        for head, level, match in zip(heads, self.levels, matches, strict=True):
            assigned = assign_targets(boxes, labels, match, level, (head.shape[2], head.shape[3]))
            head_sums, head_counts = self.sum_head_terms(head, level, assigned, boxes, labels)
            sums.append(head_sums)
            counts.append(head_counts)
        return torch.stack(sums), torch.stack(counts)

    def sum_head_terms(
        self, head: Tensor, level: Level, assigned: Assignment, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Box, objectness and class sums of one head (3,), and the number of predictions in each (3,)."""
        raw = reshape_head(head, len(level.anchors))  # (B, A, H, W, 5+C)
        flat = raw.flatten(1, 3)  # (B, N, 5+C)

        chosen = gather_rows(flat, assigned.index)  # (B, P, 5+C)
        predicted = decode_boxes(chosen[..., :4], assigned.cells, assigned.anchors, level.stride, self.scale_xy)
        # unused slots compare the blank box with itself, so that their gradients are not NaN
        true = torch.where(assigned.mask[..., None], gather_rows(boxes, assigned.target), self.blank)
        predicted = torch.where(assigned.mask[..., None], predicted, self.blank)
        quality = ciou(predicted, true)
        box = ((1 - quality) * assigned.mask).sum()

        target = torch.where(assigned.mask, quality.detach().clamp(min=0), -1.0)
        target = torch.full_like(flat[..., 4], -1).scatter_reduce(1, assigned.index, target, "amax")  # (B, N), -1: none
        with torch.no_grad():
            counted = (target >= 0) | ~self.overlaps_object(head, level, boxes, labels)
        objectness = F.binary_cross_entropy_with_logits(flat[..., 4], target.clamp(min=0), reduction="none")

        # unlike F.one_hot, this does not read values on the host
        one_hot = labels.gather(1, assigned.target)[..., None] == torch.arange(self.num_classes, device=labels.device)
        classes = F.binary_cross_entropy_with_logits(chosen[..., 5:], one_hot.float(), reduction="none").sum(dim=-1)
        sums = torch.stack([box, (objectness * counted).sum(), (classes * assigned.mask).sum()])
        num_assigned = assigned.mask.sum()
        return sums, torch.stack([num_assigned, counted.sum(), num_assigned]).float()

    def overlaps_object(self, head: Tensor, level: Level, boxes: Tensor, labels: Tensor) -> Tensor:
        """Mask (B, A*H*W) of predictions whose IoU with some object exceeds `ignore_iou`."""
        decoded, _ = decode_head(head, level, self.scale_xy)
        overlap = batched_iou(decoded, boxes)  # (B, N, M)
        return (overlap.masked_fill(labels[:, None] < 0, 0) > self.settings.ignore_iou).any(dim=-1)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """The rows of values (B, N, D) at the indices (B, P): (B, P, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
