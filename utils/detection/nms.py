"""Non-maximum suppression (NMS) with confidence thresholds and box averaging."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import nms

from utils.detection.boxes import batched_iou
from utils.system.errors import UserError, check_range

FALLBACK_CONFIDENCE = 0.3  # threshold of a class for which validation has suggested none
MIN_CONFIDENCE = 0.1  # lowest suggested threshold; lower-scoring boxes do not take part in box averaging
MAX_CANDIDATES = 48_000  # maximum number of boxes in one NMS, whose time and memory on a GPU grow with the square
MAX_SINGLE_NMS = 1000  # maximum number of boxes for which a single NMS of all groups is faster on a CPU
MAX_PAIRS = 1_000_000  # maximum number of box pairs averaged at once, to stay within the CPU cache
VOTING_SIGMA = 0.05  # parameter of variance voting; larger values give boxes with a low IoU more weight


@dataclass(frozen=True)
class Thresholds:
    """Settings that decide which predictions become detections."""

    confidence: float | None = None  # minimum score; None: the thresholds that the checkpoint suggests per class
    per_class: Mapping[str, float] = field(default_factory=dict)  # minimum scores that override it for some classes
    class_filter: tuple[str, ...] = ()  # classes to detect; empty: all
    nms_iou: float = 0.5  # boxes of a class with a higher IoU are suppressed
    class_agnostic: bool = False  # suppress overlapping boxes of different classes too
    top_k: int = 3000  # maximum number of candidates per image that enter NMS
    max_detections: int = 300  # maximum number of detections per image

    def __post_init__(self) -> None:
        if self.confidence is not None:
            check_range(self, 0, 1, "confidence")
        for name, value in self.per_class.items():
            if not 0 <= value <= 1:
                raise UserError(f"confidence of {name} is {value}, but must be between 0 and 1")
        check_range(self, 0, 1, "nms_iou")
        check_range(self, 1, inf, "top_k", "max_detections")


EVALUATION_THRESHOLDS = Thresholds(confidence=0.001)  # low, to cover the whole precision-recall curve


def select_detections(boxes: Tensor, scores: Tensor, confidence: float | Tensor, limits: Thresholds) -> Tensor:
    """Boxes (B, N, 4) xyxy and class scores (B, N, C) -> detections (B, D, 6): xyxy, score, label.

    A box is a candidate for each class whose score exceeds `confidence`, a number or one per class (C,), which replaces
    that of `limits`. Detections are in descending order of score, with boxes refined by `average_boxes`; images with
    fewer than D are padded with rows of -1. Waits for the GPU twice per MAX_CANDIDATES: for two counts, and within NMS.
    """
    images_at_once = max(1, MAX_CANDIDATES // min(limits.top_k, scores[:1].numel() or 1))
    if len(boxes) > images_at_once:
        parts = zip(boxes.split(images_at_once), scores.split(images_at_once), strict=True)
        return torch.cat([select_detections(*part, confidence, limits) for part in parts])
    num_classes = scores.shape[2]
    flat = scores.flatten(1)  # (B, N*C)
    scores, order = flat.topk(min(limits.top_k, flat.shape[1]), dim=1)  # (B, K), descending
    labels = order % num_classes
    boxes = boxes.take_along_dim((order // num_classes)[..., None], dim=1)  # (B, K, 4)
    is_candidate = scores > (confidence[labels] if isinstance(confidence, Tensor) else confidence)
    max_voters = (scores > MIN_CONFIDENCE).sum(dim=1).amax()  # the voters of an image are its first rows
    num_candidates, max_voters = torch.stack([is_candidate.sum(), max_voters]).tolist()

    images, columns = torch.nonzero_static(is_candidate, size=num_candidates).unbind(dim=1)
    groups = images if limits.class_agnostic else images * num_classes + labels[images, columns]
    kept = suppress_overlaps(boxes[images, columns], scores[images, columns], groups, limits.nms_iou).sort().values
    images, columns = images[kept], columns[kept]  # sorted by image, then by descending score
    chosen = torch.full_like(order, scores.shape[1])  # (B, K), columns of the detections; K: padding
    chosen[images, torch.arange(len(images), device=images.device) - torch.searchsorted(images, images)] = columns
    chosen = chosen[:, : limits.max_detections, None]  # (B, D, 1)

    rows = torch.cat([boxes, scores[..., None], labels[..., None]], dim=-1)  # (B, K, 6)
    detections = pad(rows, (0, 0, 0, 1), value=-1).take_along_dim(chosen, dim=1)  # (B, D, 6)
    confident, voters = detections[:, :max_voters], rows[:, :max_voters]  # confident detections are voters too
    images_at_once = max(1, MAX_PAIRS // max(1, max_voters * confident.shape[1]))
    for own, near in zip(confident.split(images_at_once), voters.split(images_at_once), strict=True):
        own[..., :4] = average_boxes(own, near)
    return detections


def suppress_overlaps(boxes: Tensor, scores: Tensor, groups: Tensor, max_iou: float) -> Tensor:
    """NMS of boxes (M, 4) within each group (M,); returns the indices of the remaining boxes, in any order.

    Unlike torchvision's batched_nms, it waits for a GPU only once and supports negative coordinates.
    """
    boxes, scores = boxes.double(), scores.double()
    if not len(boxes):
        return groups
    if boxes.is_cuda or len(boxes) <= MAX_SINGLE_NMS:
        return nms(move_apart(boxes, groups), scores, max_iou)
    order = groups.argsort(stable=True)
    counts = groups[order].unique_consecutive(return_counts=True)[1].tolist()
    return torch.cat([own[nms(boxes[own], scores[own], max_iou)] for own in order.split(counts)])


def move_apart(boxes: Tensor, groups: Tensor) -> Tensor:
    """Offset float64 boxes (M, 4) so that those of different groups (M,) do not overlap.

    The offsets are whole numbers, so that rounding moves boxes with float32 coordinates by less than 1e-6 pixels.
    """
    step = (boxes.amax() - boxes.amin()).ceil() + 1
    return boxes + (groups * step)[:, None]


def average_boxes(detections: Tensor, voters: Tensor) -> Tensor:
    """Replace each box by a weighted mean of the `voters` of its class: rows (B, D, 6) and (B, V, 6) -> (B, D, 4).

    The weight is score * exp(-(1 - IoU)^2 / VOTING_SIGMA), as in variance voting (arXiv 1809.08545) with the score in
    place of the variance. Boxes that score MIN_CONFIDENCE or less do not vote, and are returned unchanged.
    """
    boxes, near = detections[..., :4], voters[..., :4]
    scores, labels = detections[..., 4:5], detections[..., 5:]  # (B, D, 1)
    near_scores, near_labels = voters[..., 4].unsqueeze(1), voters[..., 5].unsqueeze(1)  # (B, 1, V)
    votes = near_scores * (near_scores > MIN_CONFIDENCE)
    weights = votes * torch.exp(-((1 - batched_iou(boxes, near)) ** 2) / VOTING_SIGMA) * (labels == near_labels)
    total = weights.sum(dim=-1, keepdim=True)  # at least the box's own score, unless it has no area
    has_votes = (scores > MIN_CONFIDENCE) & (total > MIN_CONFIDENCE)
    return torch.where(has_votes, weights @ near / total, boxes)
