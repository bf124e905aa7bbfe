"""Non-maximum suppression (NMS) with confidence thresholds and box averaging."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from utils.system.errors import UserError, check_range

FALLBACK_CONFIDENCE = 0.3  # threshold of a class for which validation has suggested none
MIN_CONFIDENCE = 0.1  # lowest suggested threshold; lower-scoring boxes do not take part in box averaging
VOTING_SIGMA = 0.05  # parameter of variance voting; larger values give boxes with a low IoU more weight

Selection = tuple[Tensor, Tensor, Tensor]  # boxes (D, 4), scores (D,), labels (D,)


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


def select_detections(boxes: Tensor, scores: Tensor, confidence: float | Tensor, limits: Thresholds) -> list[Selection]:
    """Boxes (B, N, 4) xyxy and class scores (B, N, C) -> per image boxes (D, 4), scores (D,), labels (D,).

    A box is a candidate for each class whose score exceeds `confidence`, a number or one per class (C,), which replaces
    that of `limits`. Detections are in descending order of score, with boxes refined by `average_boxes`.
    """
    batch, _, num_classes = scores.shape
    flat = scores.flatten(1)  # (B, N*C)
    scores, order = flat.topk(min(limits.top_k, flat.shape[1]), dim=1)  # (B, K), descending
    labels = order % num_classes
    if isinstance(confidence, Tensor):
        confidence = confidence[labels]
    images, columns = (scores > confidence).nonzero(as_tuple=True)
    places = order // num_classes
    groups = images if limits.class_agnostic else images * num_classes + labels[images, columns]
    entering = boxes[images, places[images, columns]], scores[images, columns]
    # float64, since batched_nms may offset the boxes of each group by a large number
    kept = batched_nms(*(values.double() for values in entering), groups, limits.nms_iou)
    kept = kept.sort().values  # sorted by image, then by descending score
    images, columns = images[kept], columns[kept]
    voters = (scores > MIN_CONFIDENCE).sum(dim=1)  # per image; the voters are its first candidates
    counts, voters = torch.stack([torch.bincount(images, minlength=batch), voters]).tolist()
    found = []
    for image, (own, voting) in enumerate(zip(columns.split(counts), voters, strict=True)):
        detections, candidates = (
            (boxes[image, places[image, which]], scores[image, which], labels[image, which])
            for which in (own[: limits.max_detections], slice(voting))
        )
        found.append((average_boxes(detections, candidates), *detections[1:]))
    return found


def average_boxes(detections: Selection, candidates: Selection) -> Tensor:
    """Replace each box by a weighted mean of the `candidates` of its class; returns (D, 4).

    The weight is score * exp(-(1 - IoU)^2 / VOTING_SIGMA), as in variance voting (arXiv 1809.08545) with the score in
    place of the variance. Boxes that score MIN_CONFIDENCE or less are returned unchanged.
    """
    (boxes, scores, labels), (near, near_scores, near_labels) = detections, candidates
    weights = near_scores * torch.exp(-((1 - box_iou(boxes, near)) ** 2) / VOTING_SIGMA)
    weights = weights * (labels[:, None] == near_labels)
    total = weights.sum(dim=1, keepdim=True)  # at least the box's own score; NaN for a box without area
    has_votes = (scores[:, None] > MIN_CONFIDENCE) & (total > MIN_CONFIDENCE)
    return torch.where(has_votes, weights @ near / total, boxes)
