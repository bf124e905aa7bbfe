"""From scores to detections: threshold, the best few, class-wise suppression; a whole batch at once."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

FALLBACK_CONFIDENCE = 0.3  # of a class for which no validation suggests a better one


def select_detections(
    boxes: Tensor, scores: Tensor, confidence: float | Tensor, nms_iou: float, top_k: int, max_detections: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes (B, N, 4) xyxy and class scores (B, N, C) -> per image boxes (D, 4), scores (D,), labels (D,).

    A box counts once for each class whose score exceeds `confidence`, one for all or (C,). The `top_k` best pairs of an
    image enter NMS, at most `max_detections` leave it; the results are sorted by falling score.
    """
    batch, _, num_classes = scores.shape
    flat = scores.flatten(1)  # (B, N*C)
    scores, order = flat.topk(min(top_k, flat.shape[1]), dim=1)  # (B, K), falling
    labels = order % num_classes
    if isinstance(confidence, Tensor):
        confidence = confidence[labels]
    images, columns = (scores > confidence).nonzero(as_tuple=True)
    order, scores, labels = (values[images, columns] for values in (order, scores, labels))
    boxes = boxes[images, order // num_classes]
    # float64, since batched_nms may shift the boxes of each group far apart
    kept = batched_nms(boxes.double(), scores.double(), images * num_classes + labels, nms_iou)
    kept = kept.sort().values  # as the candidates came: image by image, falling score within
    counts = torch.bincount(images[kept], minlength=batch).tolist()
    groups = zip(*(values[kept].split(counts) for values in (boxes, scores, labels)), strict=True)
    return [(b[:max_detections], s[:max_detections], c[:max_detections]) for b, s, c in groups]
