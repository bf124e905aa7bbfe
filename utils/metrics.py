"""Accuracy of detections: VOC AP (11-point and area), COCO's twelve figures, precision-recall curves.

Boxes come as float xyxy in pixels counted from 0, so that VOC's width xmax - xmin + 1 is simply x2 - x1.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import supervision as sv
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from utils.voc import Sample

COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
ELEVEN_RECALLS = np.arange(0, 1.1, 0.1)  # as the devkit writes it; i / 10 differs in a few cases


@dataclass(frozen=True)
class Curve:
    """Precision and recall of one class as the score threshold falls."""

    precision: np.ndarray  # (D,)
    recall: np.ndarray  # (D,)
    scores: np.ndarray  # (D,)
    positives: int  # objects that are not difficult

    def ap_area(self) -> float:
        """Area under the envelope of the curve, as VOC counts since 2010."""
        recall = np.concatenate([[0.0], self.recall, [1.0]])
        precision = np.concatenate([[0.0], self.precision, [0.0]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        return float(np.sum(np.diff(recall) * envelope[1:]))

    def ap_11point(self) -> float:
        """Mean of the best precision at recall >= 0, 0.1 ... 1, as VOC2007 counts."""
        best = [self.precision[self.recall >= threshold].max(initial=0.0) for threshold in ELEVEN_RECALLS]
        return float(np.mean(best))


def evaluate(
    samples: Sequence[Sample],
    detections: Sequence[sv.Detections],
    sizes: Sequence[tuple[int, int]],
    class_names: Sequence[str],
) -> tuple[dict[str, Any], list[Curve]]:
    """All figures of one split, {"voc": ..., "coco": ...}, and the curve of each class at IoU 0.5."""
    curves = [voc_curve(samples, detections, label) for label in range(len(class_names))]
    metrics = {
        "voc": voc_metrics(curves, class_names),
        "coco": coco_metrics(samples, detections, sizes, class_names),
    }
    return metrics, curves


def voc_curve(
    samples: Sequence[Sample], detections: Sequence[sv.Detections], label: int, iou_threshold: float = 0.5
) -> Curve:
    """The curve of one class.

    A detection takes its best-overlapping object of the class in its image; a second one on the same object is a
    false positive; objects marked difficult count neither for nor against.
    """
    scores, hits, counted, positives = [], [], [], 0
    for sample, found in zip(samples, detections, strict=True):
        truth = sample.labels == label
        difficult = sample.difficult[truth]
        positives += int((~difficult).sum())
        mine = found.class_id == label
        order = np.argsort(-found.confidence[mine], kind="stable")
        boxes = torch.from_numpy(found.xyxy[mine][order]).double(), torch.from_numpy(sample.boxes[truth]).double()
        iou = box_iou(*boxes).numpy()  # boxes from 0 with an exclusive end overlap as VOC's do with an inclusive one
        hit, ignored = match(iou, difficult, iou_threshold)
        scores.append(found.confidence[mine][order])
        hits.append(hit)
        counted.append(~ignored)
    keep = np.concatenate([*counted, np.empty(0, bool)])
    score, hit = np.concatenate([*scores, np.empty(0)])[keep], np.concatenate([*hits, np.empty(0, bool)])[keep]
    order = np.argsort(-score, kind="stable")
    true_positives = np.cumsum(hit[order])
    precision = true_positives / np.arange(1, len(order) + 1)
    return Curve(precision, true_positives / max(1, positives), score[order], positives)


def match(iou: np.ndarray, difficult: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """IoU (N, M) of detections by falling score -> which hit an object, and which hit only a difficult one."""
    hit, ignored = np.zeros(len(iou), bool), np.zeros(len(iou), bool)
    if iou.size == 0:
        return hit, ignored
    taken = np.zeros(iou.shape[1], bool)
    for i, best in enumerate(iou.argmax(axis=1)):
        if iou[i, best] < threshold:
            continue
        ignored[i] = difficult[best]
        hit[i] = not difficult[best] and not taken[best]
        taken[best] = True
    return hit, ignored


def voc_metrics(curves: Sequence[Curve], class_names: Sequence[str]) -> dict[str, Any]:
    """AP per class and the means over the classes that have objects."""
    per_class = {
        name: {"AP_11point": curve.ap_11point(), "AP_area": curve.ap_area(), "objects": curve.positives}
        for name, curve in zip(class_names, curves, strict=True)
    }
    present = [values for values in per_class.values() if values["objects"]]
    means = {
        f"m{kind}": float(np.mean([values[kind] for values in present])) if present else 0.0
        for kind in ("AP_11point", "AP_area")
    }
    return {**means, "per_class": per_class}


def coco_metrics(
    samples: Sequence[Sample],
    detections: Sequence[sv.Detections],
    sizes: Sequence[tuple[int, int]],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """COCO's twelve figures from pycocotools, and AP per class; -1 where there is nothing to measure.

    `sizes` are (height, width). Objects marked difficult are crowd to COCO, as it has no other way to ignore them.
    """
    annotations = [
        {"image_id": i, "category_id": int(label), "bbox": to_xywh(box), "area": area(box), "iscrowd": int(difficult)}
        for i, sample in enumerate(samples)
        for box, label, difficult in zip(sample.boxes, sample.labels, sample.difficult, strict=True)
    ]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)],
    }
    results = [
        {"image_id": i, "category_id": int(label), "bbox": to_xywh(box), "score": float(score)}
        for i, found in enumerate(detections)
        for box, label, score in zip(found.xyxy, found.class_id, found.confidence, strict=True)
    ]
    if not results:
        return dict.fromkeys(COCO_NAMES, 0.0) | {"per_class": dict.fromkeys(class_names, 0.0)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(results), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision = scorer.eval["precision"][:, :, :, 0, 2]  # IoU, recall, class; all areas, 100 detections
    per_class = {
        name: float(values[values > -1].mean()) if (values > -1).any() else -1.0
        for name, values in zip(class_names, np.moveaxis(precision, 2, 0), strict=True)
    }
    return {**dict(zip(COCO_NAMES, map(float, scorer.stats), strict=True)), "per_class": per_class}


def to_xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, x2 - x1, y2 - y1]


def area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
