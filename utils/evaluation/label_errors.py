"""Where a detector and its data disagree: the images that cost the most AP, and labels that are likely wrong.

The kinds of label errors, and the idea of scoring them by what a trained detector finds, are those of ObjectLab (arXiv
2309.00832).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import supervision as sv

from utils.data.voc import Sample
from utils.detection.boxes import iou_matrix
from utils.evaluation.metrics import MATCH_IOU, Curve, confident, on_difficult, pair

LIKELY = 0.5  # score from which on a label is suspected
APART = 0.3  # boxes that overlap less are of different objects
BARELY = 0.05  # an object whose best detection has less confidence was not found


@dataclass(frozen=True)
class Suspicion:
    """A label that is likely wrong, or missing."""

    kind: str  # not labelled, never found, another class, badly placed
    score: float  # 0..1: confidence in what was found, or how surely such an object usually is
    image: int  # position of the sample
    box: np.ndarray  # (4,) xyxy in pixels of the image: what to look at
    reason: str


def suspect_labels(
    samples: Sequence[Sample],
    detections: Sequence[sv.Detections],
    curves: Sequence[Curve],
    thresholds: Sequence[float],
    class_names: Sequence[str],
) -> list[Suspicion]:
    """Label errors, likeliest first; `detections` go down to a low confidence, `thresholds` are the useful ones."""
    usual = [float(curve.recall[curve.scores > BARELY].max(initial=0.0)) for curve in curves]
    known = [curve.positives > 0 for curve in curves]  # classes that the labels know
    found = []
    for i, (sample, every) in enumerate(zip(samples, detections, strict=True)):
        found += suspect_found(i, sample, confident(every, thresholds), class_names, known)
        found += suspect_missed(i, sample, every, usual, class_names)
    return sorted((item for item in found if item.score >= LIKELY), key=lambda item: -item.score)


def suspect_found(
    image: int, sample: Sample, found: sv.Detections, class_names: Sequence[str], known: Sequence[bool]
) -> Iterator[Suspicion]:
    """What was found of `known` classes and has no label, one of another class, or one that lies differently."""
    if not len(found):
        return
    iou = iou_matrix(found.xyxy, sample.boxes) if len(sample.labels) else np.zeros((len(found), 1))
    paired = {row: (column, iou[row, column]) for row, column in pair(sample, found, APART)}
    ignored = on_difficult(sample, found)
    for row, (box, label, score) in enumerate(zip(found.xyxy, found.class_id, found.confidence, strict=True)):
        name = class_names[label]
        if not known[label]:
            continue
        if row not in paired:
            if iou[row].max() < APART and not ignored[row]:
                reason = f"{name} found with {score:.2f}, and no label there"
                yield Suspicion("not labelled", float(score), image, box, reason)
            continue
        column, overlap = paired[row]
        labelled = class_names[sample.labels[column]]
        if sample.difficult[column]:
            continue
        if labelled != name and overlap >= MATCH_IOU:
            reason = f"labelled {labelled}, found as {name} with {score:.2f}"
            yield Suspicion("another class", float(score), image, sample.boxes[column], reason)
        elif labelled == name and overlap < MATCH_IOU:
            reason = f"{name} found with {score:.2f}, and the label overlaps it by only {overlap:.2f}"
            yield Suspicion("badly placed", float(score), image, sample.boxes[column], reason)


def suspect_missed(
    image: int, sample: Sample, every: sv.Detections, usual: Sequence[float], class_names: Sequence[str]
) -> Iterator[Suspicion]:
    """Labels where hardly anything was found, in classes whose objects usually are, a share `usual` of them."""
    near = iou_matrix(every.xyxy, sample.boxes) >= APART if len(every) else np.zeros((1, len(sample.labels)), bool)
    scores = every.confidence if len(every) else np.zeros(1)
    for column, (box, label, difficult) in enumerate(zip(sample.boxes, sample.labels, sample.difficult, strict=True)):
        best = float(scores[near[:, column]].max(initial=0.0))
        if difficult or best >= BARELY:
            continue
        reason = f"labelled {class_names[label]}, and nothing was found there with {BARELY:g} or more"
        yield Suspicion("never found", usual[label] * (1 - best / BARELY), image, box, reason)
