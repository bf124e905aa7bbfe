"""From scores to detections: threshold, the best few, suppression; a whole batch at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from utils.errors import UserError, check_range

FALLBACK_CONFIDENCE = 0.3  # of a class for which no validation suggests a better one


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


def select_detections(
    boxes: Tensor, scores: Tensor, confidence: float | Tensor, limits: Thresholds
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes (B, N, 4) xyxy and class scores (B, N, C) -> per image boxes (D, 4), scores (D,), labels (D,).

    A box counts once for each class whose score exceeds `confidence`, one for all or (C,), and not that of `limits`.
    The best `top_k` pairs of an image enter NMS, at most `max_detections` leave it, sorted by falling score.
    """
    batch, _, num_classes = scores.shape
    flat = scores.flatten(1)  # (B, N*C)
    scores, order = flat.topk(min(limits.top_k, flat.shape[1]), dim=1)  # (B, K), falling
    labels = order % num_classes
    if isinstance(confidence, Tensor):
        confidence = confidence[labels]
    images, columns = (scores > confidence).nonzero(as_tuple=True)
    order, scores, labels = (values[images, columns] for values in (order, scores, labels))
    boxes = boxes[images, order // num_classes]
    groups = images if limits.agnostic else images * num_classes + labels
    # float64, since batched_nms may shift the boxes of each group far apart
    kept = batched_nms(boxes.double(), scores.double(), groups, limits.nms_iou)
    kept = kept.sort().values  # as the candidates came: image by image, falling score within
    counts = torch.bincount(images[kept], minlength=batch).tolist()
    parts = zip(*(values[kept].split(counts) for values in (boxes, scores, labels)), strict=True)
    most = limits.max_detections
    return [(b[:most], s[:most], c[:most]) for b, s, c in parts]
