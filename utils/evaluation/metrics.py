"""Accuracy of detections: VOC AP (11-point and area), precision, recall and F1, the confusion matrix; all the figures.

Boxes come as float xyxy in pixels counted from 0, so that VOC's width xmax - xmin + 1 is simply x2 - x1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import supervision as sv

from utils.data.coco_json import CocoDataset
from utils.data.voc import Sample
from utils.detection.boxes import iou_matrix
from utils.detection.nms import FALLBACK_CONFIDENCE, MIN_CONFIDENCE
from utils.evaluation.coco import CocoScore, coco_score, dataset_of

MATCH_IOU = 0.5  # from which on a detection is of an object
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

    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall (D,)."""
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)

    def best(self) -> dict[str, float]:
        """The threshold with the highest F1, halfway to the next lower score, and precision, recall and F1 there.

        Below MIN_CONFIDENCE none is taken, since that would cover the pictures of a weak network with boxes. Without
        one there is FALLBACK_CONFIDENCE, with zeros, or -1 where there is nothing to find.
        """
        between = (self.scores + np.append(self.scores[1:], 0.0)[: len(self.scores)]) / 2
        f1 = np.where((between < self.scores) & (between >= MIN_CONFIDENCE), self.f1(), 0.0)
        if f1.max(initial=0.0) == 0:
            nothing = 0.0 if self.positives else -1.0
            return {"threshold": FALLBACK_CONFIDENCE} | dict.fromkeys(("precision", "recall", "F1"), nothing)
        at = int(f1.argmax())
        values = between[at], self.precision[at], self.recall[at], f1[at]
        return dict(zip(("threshold", "precision", "recall", "F1"), map(float, values), strict=True))


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a split."""

    metrics: dict[str, Any]  # all figures, ready for JSON
    curves: list[Curve]  # of each class, at MATCH_IOU
    coco: CocoScore

    @property
    def thresholds(self) -> list[float]:
        """The confidence of each class at which its F1 is best."""
        return [values["threshold"] for values in self.metrics["best"].values()]


def evaluate(
    samples: Sequence[Sample],
    detections: Sequence[sv.Detections],
    sizes: Sequence[tuple[int, int]],
    class_names: Sequence[str],
    dataset: CocoDataset | None = None,
) -> Evaluation:
    """All figures of one split whose images are of `sizes`, height and width.

    `dataset` is the split as COCO sees it, where it does not follow from the samples.
    """
    curves = voc_curves(samples, detections, len(class_names), crowds=dataset is not None)
    coco = coco_score(dataset or dataset_of(samples, sizes, class_names), detections, class_names)
    best = {name: curve.best() for name, curve in zip(class_names, curves, strict=True)}
    metrics = {"voc": voc_metrics(curves, class_names), "coco": coco.metrics, "best": best}
    return Evaluation(metrics, curves, coco)


def voc_curves(
    samples: Sequence[Sample],
    detections: Sequence[sv.Detections],
    num_classes: int,
    iou_threshold: float = MATCH_IOU,
    crowds: bool = False,
) -> list[Curve]:
    """The curve of each class.

    A detection takes its best-overlapping object of its class in its image; a second one on the same object is a
    false positive; objects marked difficult count neither for nor against. With `crowds` they are COCO's, regions of
    many objects, and what lies in one does not count either.
    """
    parts = [match(sample, found, iou_threshold, crowds) for sample, found in zip(samples, detections, strict=True)]
    hit, ignored = (np.concatenate([np.empty(0, bool), *arrays]) for arrays in zip(*parts, strict=True))
    scores = np.concatenate([np.empty(0), *(found.confidence for found in detections if len(found))])
    labels = np.concatenate([np.empty(0, int), *(found.class_id for found in detections if len(found))])
    objects = np.concatenate([np.empty(0, int), *(sample.labels[~sample.difficult] for sample in samples)])
    order = np.argsort(-scores, kind="stable")
    order = order[~ignored[order]]
    curves = []
    for label, positives in enumerate(np.bincount(objects, minlength=num_classes)):
        mine = order[labels[order] == label]
        true_positives = np.cumsum(hit[mine])
        precision = true_positives / np.arange(1, len(mine) + 1)
        curves.append(Curve(precision, true_positives / max(1, positives), scores[mine], int(positives)))
    return curves


def match(sample: Sample, found: sv.Detections, iou_threshold: float, crowds: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of an image hit an object of their class (D,), and which do not count (D,)."""
    hit, ignored = np.zeros(len(found), bool), np.zeros(len(found), bool)
    if not (len(found) and len(sample.labels)):
        return hit, ignored
    iou = iou_matrix(found.xyxy, sample.boxes)
    iou[found.class_id[:, None] != sample.labels] = -1
    best = iou.argmax(axis=1)
    near = iou[np.arange(len(iou)), best] >= iou_threshold
    ranked = np.argsort(-found.confidence, kind="stable")
    ranked = ranked[near[ranked]]
    _, first = np.unique(best[ranked], return_index=True)  # the highest score on each object
    hit[ranked[first]] = True
    ignored = near & sample.difficult[best]
    hit &= ~ignored
    if crowds:
        ignored |= ~hit & on_difficult(sample, found)
    return hit, ignored


def voc_metrics(curves: Sequence[Curve], class_names: Sequence[str]) -> dict[str, Any]:
    """AP per class and the means over the classes that have objects; -1 where there are none."""
    per_class = {}
    for name, curve in zip(class_names, curves, strict=True):
        values = (curve.ap_11point(), curve.ap_area()) if curve.positives else (-1.0, -1.0)
        per_class[name] = {"AP_11point": values[0], "AP_area": values[1], "objects": curve.positives}
    present = [values for values in per_class.values() if values["objects"]]
    means = {
        f"m{kind}": float(np.mean([values[kind] for values in present])) if present else -1.0
        for kind in ("AP_11point", "AP_area")
    }
    return {**means, "per_class": per_class}


def confident(found: sv.Detections, thresholds: Sequence[float]) -> sv.Detections:
    """The detections above the threshold of their class."""
    return found[found.confidence > np.asarray(thresholds)[found.class_id]] if len(found) else found


def pair(sample: Sample, found: sv.Detections, iou_threshold: float = MATCH_IOU) -> Iterator[tuple[int, int]]:
    """Pairs of a detection and an object, each in one pair at most: those of one class first, then by falling IoU."""
    if not (len(found) and len(sample.labels)):
        return
    iou = iou_matrix(found.xyxy, sample.boxes)
    rows, columns = np.nonzero(iou >= iou_threshold)
    other_class = found.class_id[rows] != sample.labels[columns]
    used_rows, used_columns = set(), set()
    for i in np.lexsort((-iou[rows, columns], other_class)):
        row, column = int(rows[i]), int(columns[i])
        if row not in used_rows and column not in used_columns:
            used_rows.add(row)
            used_columns.add(column)
            yield row, column


def on_difficult(sample: Sample, found: sv.Detections) -> np.ndarray:
    """Which detections (D,) do not count, since they lie mostly in a difficult object, or crowd, of their class."""
    if not (len(found) and sample.difficult.any()):
        return np.zeros(len(found), bool)
    regions, labels = sample.boxes[sample.difficult], sample.labels[sample.difficult]
    corners = np.maximum(found.xyxy[:, None, :2], regions[:, :2]), np.minimum(found.xyxy[:, None, 2:], regions[:, 2:])
    shared = (corners[1] - corners[0]).clip(min=0).prod(axis=2)  # (D, M)
    own = (found.xyxy[:, 2:] - found.xyxy[:, :2]).prod(axis=1)
    return ((shared >= own[:, None] / 2) & (found.class_id[:, None] == labels)).any(axis=1)


def confusion_matrix(
    samples: Sequence[Sample], detections: Sequence[sv.Detections], thresholds: Sequence[float]
) -> np.ndarray:
    """How often an object of a class (row) was found as each class (column), at the `thresholds` of the classes.

    (C + 1, C + 1) counts; the last row has what was found where nothing is, the last column what was not found.
    Objects marked difficult, and what was found on them, are left out.
    """
    background = len(thresholds)
    counts = np.zeros((background + 1, background + 1), int)
    for sample, every in zip(samples, detections, strict=True):
        found = confident(every, thresholds)
        as_found, as_labelled = np.full(len(sample.labels), background), np.full(len(found), background)
        ignored = on_difficult(sample, found)
        for row, column in pair(sample, found):
            as_found[column], as_labelled[row] = found.class_id[row], sample.labels[column]
            ignored[row] |= sample.difficult[column]
        easy = ~sample.difficult
        np.add.at(counts, (sample.labels[easy], as_found[easy]), 1)
        false = (as_labelled == background) & ~ignored
        if false.any():
            np.add.at(counts, (background, found.class_id[false]), 1)
    return counts
