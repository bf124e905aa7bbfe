"""From scores to detections: threshold, the best few, suppression, and the mean of what was suppressed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from utils.system.errors import UserError, check_range

FALLBACK_CONFIDENCE = 0.3  # of a class for which no validation suggests a better one
MIN_CONFIDENCE = 0.1  # that is suggested for a class; boxes with less have no say in where an object is
SPREAD = 0.05  # of the overlaps of boxes with an object that have a say in where it is

Selection = tuple[Tensor, Tensor, Tensor]  # boxes (D, 4), scores (D,), labels (D,)


@dataclass(frozen=True)
class Thresholds:
    """What of the network's output becomes a detection."""

    confidence: float | None = None  # least score; None: of each class what the checkpoint suggests
    per_class: Mapping[str, float] = field(default_factory=dict)  # the same, of single classes
    only: tuple[str, ...] = ()  # classes to detect; empty: all
    nms_iou: float = 0.5  # two boxes of a class that overlap more are one object
    agnostic: bool = False  # of whichever classes
    top_k: int = 3000  # candidates of an image that enter NMS
    max_detections: int = 300  # of an image

    def __post_init__(self) -> None:
        if self.confidence is not None:
            check_range(self, 0, 1, "confidence")
        for name, value in self.per_class.items():
            if not 0 <= value <= 1:
                raise UserError(f"the confidence for {name} is {value}, but must be between 0 and 1")
        check_range(self, 0, 1, "nms_iou")
        check_range(self, 1, inf, "top_k", "max_detections")


EVALUATION_THRESHOLDS = Thresholds(confidence=0.001)  # low, so that the whole curve is seen


def select_detections(boxes: Tensor, scores: Tensor, confidence: float | Tensor, limits: Thresholds) -> list[Selection]:
    """Boxes (B, N, 4) xyxy and class scores (B, N, C) -> per image boxes (D, 4), scores (D,), labels (D,).

    A box counts once for each class whose score exceeds `confidence`, one for all or (C,), and not that of `limits`.
    The best `top_k` pairs of an image enter NMS, at most `max_detections` leave it, sorted by falling score. Then each
    box becomes the mean that `average_boxes` tells, whatever `confidence` is.
    """
    batch, _, num_classes = scores.shape
    flat = scores.flatten(1)  # (B, N*C)
    scores, order = flat.topk(min(limits.top_k, flat.shape[1]), dim=1)  # (B, K), falling
    labels = order % num_classes
    if isinstance(confidence, Tensor):
        confidence = confidence[labels]
    images, columns = (scores > confidence).nonzero(as_tuple=True)
    places = order // num_classes
    groups = images if limits.agnostic else images * num_classes + labels[images, columns]
    entering = boxes[images, places[images, columns]], scores[images, columns]
    # float64, since batched_nms may shift the boxes of each group far apart
    kept = batched_nms(*(values.double() for values in entering), groups, limits.nms_iou)
    kept = kept.sort().values  # as the candidates came: image by image, falling score within
    images, columns = images[kept], columns[kept]
    voters = (scores > MIN_CONFIDENCE).sum(dim=1)  # the first of each image
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
    """Boxes (D, 4), each the mean of the `candidates` of its class, weighted by their scores and by their overlaps.

    The weight exp(-(1 - IoU)^2 / SPREAD) is that of variance voting (He et al., arXiv 1809.08545), where the score
    stands for the certainty that the network has of a box. Boxes with MIN_CONFIDENCE or less, and those without area,
    stay as they are.
    """
    (boxes, scores, labels), (near, near_scores, near_labels) = detections, candidates
    weights = near_scores * torch.exp(-((1 - box_iou(boxes, near)) ** 2) / SPREAD)
    weights = weights * (labels[:, None] == near_labels)
    total = weights.sum(dim=1, keepdim=True)  # at least the box's own score, but of a box without area NaN
    has_votes = (scores[:, None] > MIN_CONFIDENCE) & (total > MIN_CONFIDENCE)
    return torch.where(has_votes, weights @ near / total, boxes)
