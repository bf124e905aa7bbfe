"""Find likely label errors with a trained detector, following ObjectLab (arXiv 2309.00832)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import supervision as sv

from utils.data.voc import Sample
from utils.detection.boxes import iou_matrix
from utils.evaluation.metrics import MATCH_IOU, Curve, filter_confident, inside_difficult, pair_boxes

MIN_SCORE = 0.5  # minimum score of reported label errors
SAME_OBJECT_IOU = 0.3  # boxes with a lower IoU belong to different objects
MISSED_CONFIDENCE = 0.05  # objects without a detection of at least this confidence count as not detected


@dataclass(frozen=True)
class LabelError:
    """A label that is likely wrong or missing."""

    kind: str  # not labeled, not detected, wrong class or inaccurate box
    score: float  # 0 to 1: confidence of the detection, or how reliably objects of the class are detected
    image: int  # index of the sample
    box: np.ndarray  # (4,) xyxy in pixels of the image
    reason: str


def find_label_errors(
    samples: Sequence[Sample],
    detections: Sequence[sv.Detections],
    curves: Sequence[Curve],
    thresholds: Sequence[float],
    class_names: Sequence[str],
) -> list[LabelError]:
    """Likely label errors, the most likely first; `thresholds` are the confidences with the highest F1 (C,)."""
    recalls = [float(curve.recall[curve.scores > MISSED_CONFIDENCE].max(initial=0.0)) for curve in curves]
    labeled = [curve.num_objects > 0 for curve in curves]  # whether the labels contain the class at all
    errors = []
    for i, (sample, found) in enumerate(zip(samples, detections, strict=True)):
        errors += check_detections(i, sample, filter_confident(found, thresholds), class_names, labeled)
        errors += check_undetected(i, sample, found, recalls, class_names)
    return sorted((item for item in errors if item.score >= MIN_SCORE), key=lambda item: -item.score)


def check_detections(
    image: int, sample: Sample, found: sv.Detections, class_names: Sequence[str], labeled: Sequence[bool]
) -> Iterator[LabelError]:
    """Errors shown by confident detections of `labeled` classes: not labeled, wrong class or inaccurate box."""
    if not len(found):
        return
    iou = iou_matrix(found.xyxy, sample.boxes) if len(sample.labels) else np.zeros((len(found), 1))
    paired = {row: (column, iou[row, column]) for row, column in pair_boxes(sample, found, SAME_OBJECT_IOU)}
    ignored = inside_difficult(sample, found)
    for row, (box, label, score) in enumerate(zip(found.xyxy, found.class_id, found.confidence, strict=True)):
        name = class_names[label]
        if not labeled[label]:
            continue
        if row not in paired:
            if iou[row].max() < SAME_OBJECT_IOU and not ignored[row]:
                reason = f"{name} detected with confidence {score:.2f}, but not labeled"
                yield LabelError("not labeled", float(score), image, box, reason)
            continue
        column, overlap = paired[row]
        given = class_names[sample.labels[column]]
        if sample.difficult[column]:
            continue
        if given != name and overlap >= MATCH_IOU:
            reason = f"labeled {given}, but detected as {name} with confidence {score:.2f}"
            yield LabelError("wrong class", float(score), image, sample.boxes[column], reason)
        elif given == name and overlap < MATCH_IOU:
            reason = f"{name} detected with confidence {score:.2f}, but its IoU with the label is only {overlap:.2f}"
            yield LabelError("inaccurate box", float(score), image, sample.boxes[column], reason)


def check_undetected(
    image: int, sample: Sample, found: sv.Detections, recalls: Sequence[float], class_names: Sequence[str]
) -> Iterator[LabelError]:
    """Errors shown by labels without a detection nearby, scored by the recall of their class."""
    near, scores = np.zeros((1, len(sample.labels)), bool), np.zeros(1)
    if len(found):
        near, scores = iou_matrix(found.xyxy, sample.boxes) >= SAME_OBJECT_IOU, found.confidence
    for column, (box, label, difficult) in enumerate(zip(sample.boxes, sample.labels, sample.difficult, strict=True)):
        best = float(scores[near[:, column]].max(initial=0.0))
        if difficult or best >= MISSED_CONFIDENCE:
            continue
        reason = f"labeled {class_names[label]}, but nothing was detected with confidence {MISSED_CONFIDENCE:g}"
        yield LabelError("not detected", recalls[label] * (1 - best / MISSED_CONFIDENCE), image, box, reason)
