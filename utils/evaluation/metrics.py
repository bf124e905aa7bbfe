"""Detection metrics: VOC AP (11-point and area), precision, recall, F1 and the confusion matrix.

Boxes are xyxy in continuous pixel coordinates from 0, so VOC's width xmax - xmin + 1 is x2 - x1 here.
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
from utils.evaluation.coco import ClassMatches, build_dataset, evaluate_coco

MATCH_IOU = 0.5  # minimum IoU of a detection and its object
ELEVEN_RECALLS = np.arange(0, 1.1, 0.1)  # computed as in the devkit; i / 10 rounds differently in a few cases


@dataclass(frozen=True)
class Curve:
    """The precision-recall curve of one class, by descending score of its D detections."""

    precision: np.ndarray  # (D,)
    recall: np.ndarray  # (D,)
    scores: np.ndarray  # (D,)
    num_objects: int  # without difficult ones

    def ap_area(self) -> float:
        """Area under the interpolated curve, as in VOC since 2010."""
        recall = np.concatenate([[0.0], self.recall, [1.0]])
        precision = np.concatenate([[0.0], self.precision, [0.0]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        return float(np.sum(np.diff(recall) * envelope[1:]))

    def ap_11point(self) -> float:
        """Mean of the interpolated precision at recall 0, 0.1, ..., 1, as in VOC2007."""
        best = [self.precision[self.recall >= threshold].max(initial=0.0) for threshold in ELEVEN_RECALLS]
        return float(np.mean(best))

    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall (D,)."""
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)

    def find_best_threshold(self) -> dict[str, float]:
        """The threshold with the highest F1, midway between two scores, and precision, recall and F1 at it.

        Thresholds below MIN_CONFIDENCE are excluded, since weak networks would produce too many boxes. If none remains,
        the threshold is FALLBACK_CONFIDENCE and the other values are 0, or -1 for a class without objects.
        """
        between = (self.scores + np.append(self.scores[1:], 0.0)[: len(self.scores)]) / 2
        f1 = np.where((between < self.scores) & (between >= MIN_CONFIDENCE), self.f1(), 0.0)
        if f1.max(initial=0.0) == 0:
            nothing = 0.0 if self.num_objects else -1.0
            return {"threshold": FALLBACK_CONFIDENCE} | dict.fromkeys(("precision", "recall", "F1"), nothing)
        at = int(f1.argmax())
        values = between[at], self.precision[at], self.recall[at], f1[at]
        return dict(zip(("threshold", "precision", "recall", "F1"), map(float, values), strict=True))


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a detector on a split."""

    metrics: dict[str, Any]  # JSON-compatible
    curves: list[Curve]  # of each class, at MATCH_IOU
    matches: list[ClassMatches]  # of each class with objects

    @property
    def thresholds(self) -> list[float]:
        """For each class, the confidence threshold with the highest F1."""
        return [values["threshold"] for values in self.metrics["best"].values()]


def evaluate(
    samples: Sequence[Sample],
    detections: Sequence[sv.Detections],
    sizes: Sequence[tuple[int, int]],
    class_names: Sequence[str],
    dataset: CocoDataset | None = None,
) -> Evaluation:
    """Compute all metrics; `sizes` are (height, width), `dataset` is the COCO ground truth, if any."""
    curves = compute_curves(samples, detections, len(class_names), crowds=dataset is not None)
    coco, matches = evaluate_coco(dataset or build_dataset(samples, sizes, class_names), detections, class_names)
    best = {name: curve.find_best_threshold() for name, curve in zip(class_names, curves, strict=True)}
    metrics = {"voc": compute_voc_metrics(curves, class_names), "coco": coco, "best": best}
    return Evaluation(metrics, curves, matches)


def compute_curves(
    samples: Sequence[Sample],
    detections: Sequence[sv.Detections],
    num_classes: int,
    iou_threshold: float = MATCH_IOU,
    crowds: bool = False,
) -> list[Curve]:
    """The precision-recall curve of each class, by VOC's rules.

    A detection is matched to the object of its class that it overlaps most; further detections of the same object are
    false positives. Difficult objects and detections matched to them are ignored. With `crowds`, difficult objects are
    COCO's crowds, and every unmatched detection with at least half of its area inside one is ignored.
    """
    parts = [match_image(*pair, iou_threshold, crowds) for pair in zip(samples, detections, strict=True)]
    hit, ignored = (np.concatenate([np.empty(0, bool), *arrays]) for arrays in zip(*parts, strict=True))
    scores = np.concatenate([np.empty(0), *(found.confidence for found in detections if len(found))])
    labels = np.concatenate([np.empty(0, int), *(found.class_id for found in detections if len(found))])
    objects = np.concatenate([np.empty(0, int), *(sample.labels[~sample.difficult] for sample in samples)])
    order = np.argsort(-scores, kind="stable")
    order = order[~ignored[order]]
    curves = []
    for label, num_objects in enumerate(np.bincount(objects, minlength=num_classes)):
        of_class = order[labels[order] == label]
        true_positives = np.cumsum(hit[of_class])
        precision = true_positives / np.arange(1, len(of_class) + 1)
        curves.append(Curve(precision, true_positives / max(1, num_objects), scores[of_class], int(num_objects)))
    return curves


def match_image(
    sample: Sample, found: sv.Detections, iou_threshold: float, crowds: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Boolean masks of an image's detections (D,): the true positives and the ignored ones."""
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
        ignored |= ~hit & inside_difficult(sample, found)
    return hit, ignored


def compute_voc_metrics(curves: Sequence[Curve], class_names: Sequence[str]) -> dict[str, Any]:
    """AP of each class and the means over the classes with objects; -1 without objects."""
    per_class = {}
    for name, curve in zip(class_names, curves, strict=True):
        values = (curve.ap_11point(), curve.ap_area()) if curve.num_objects else (-1.0, -1.0)
        per_class[name] = {"AP_11point": values[0], "AP_area": values[1], "objects": curve.num_objects}
    present = [values for values in per_class.values() if values["objects"]]
    kinds = ("AP_11point", "AP_area")
    means = {f"m{kind}": float(np.mean([values[kind] for values in present] or [-1.0])) for kind in kinds}
    return {**means, "per_class": per_class}


def filter_confident(found: sv.Detections, thresholds: Sequence[float]) -> sv.Detections:
    """The detections above the threshold of their class; `thresholds` is (C,)."""
    return found[found.confidence > np.asarray(thresholds)[found.class_id]] if len(found) else found


def pair_boxes(sample: Sample, found: sv.Detections, iou_threshold: float = MATCH_IOU) -> Iterator[tuple[int, int]]:
    """Match detections and objects one to one, same class first, then by descending IoU; yields pairs of indices."""
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


def inside_difficult(sample: Sample, found: sv.Detections) -> np.ndarray:
    """Whether each detection (D,) has at least half its area inside a difficult object, or crowd, of its class."""
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
    """Counts (C + 1, C + 1) of true class (row) and predicted class (column) at the threshold of each class.

    The last row counts detections on background, the last column objects that were not detected. Difficult objects and
    the detections on them are ignored.
    """
    background = len(thresholds)
    counts = np.zeros((background + 1, background + 1), int)
    for sample, candidates in zip(samples, detections, strict=True):
        found = filter_confident(candidates, thresholds)
        predicted, true = np.full(len(sample.labels), background), np.full(len(found), background)
        ignored = inside_difficult(sample, found)
        for row, column in pair_boxes(sample, found):
            predicted[column], true[row] = found.class_id[row], sample.labels[column]
            ignored[row] |= sample.difficult[column]
        easy = ~sample.difficult
        np.add.at(counts, (sample.labels[easy], predicted[easy]), 1)
        false = (true == background) & ~ignored
        if false.any():
            np.add.at(counts, (background, found.class_id[false]), 1)
    return counts
