"""COCO metrics with pycocotools, AP with weighted images, and the results file for the COCO server."""

import contextlib
import copy
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from utils.data.coco_json import CocoDataset
from utils.data.voc import Sample
from utils.system.files import write_text

RESULTS = "coco_results.json"
COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))  # COCO's recall thresholds; torch.linspace rounds differently
MAX_WEIGHTED = 2_000_000  # weighted detections per step, to stay within the CPU cache


def build_dataset(
    samples: Sequence[Sample], sizes: Sequence[tuple[int, int]], class_names: Sequence[str]
) -> CocoDataset:
    """Ground truth of VOC samples in COCO format; difficult objects become crowds, which COCO ignores."""
    annotations = [
        {"image_id": i, "category_id": int(label), "bbox": to_xywh(box), "iscrowd": int(difficult)}
        | {"area": float((box[2] - box[0]) * (box[3] - box[1]))}
        for i, sample in enumerate(samples)
        for box, label, difficult in zip(sample.boxes, sample.labels, sample.difficult, strict=True)
    ]
    truth = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)],
    }
    return CocoDataset(truth, list(range(len(samples))), list(range(len(class_names))))


def build_results(dataset: CocoDataset, detections: Sequence[sv.Detections]) -> list[dict[str, Any]]:
    """Detections in the COCO results format, without classes that are not in the ground truth."""
    return [
        {"image_id": image, "category_id": category, "bbox": to_xywh(box), "score": float(score)}
        for image, found in zip(dataset.images, detections, strict=True)
        for box, label, score in zip(found.xyxy, found.class_id, found.confidence, strict=True)
        if (category := dataset.categories[label]) is not None
    ]


def write_results(folder: Path, dataset: CocoDataset | None, detections: Sequence[sv.Detections]) -> None:
    """Write RESULTS for the COCO server; without a `dataset`, remove the file of an earlier evaluation."""
    if dataset is None:
        (folder / RESULTS).unlink(missing_ok=True)
        return
    write_text(folder / RESULTS, json.dumps(build_results(dataset, detections)))


@dataclass(frozen=True)
class ClassMatches:
    """Detections of one class in N images, by descending score, matched at T IoU thresholds.

    Metrics can weight images; an image with weight 2 counts as if it occurred twice.
    """

    images: Tensor  # (D,) index of the image
    true_positives: Tensor  # (T, D) bool
    false_positives: Tensor  # (T, D) bool; a detection of an ignored object is neither
    num_objects: Tensor  # (N,) float64, objects of the class in each image

    def curves(self, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Recall and interpolated precision (S, D) at each IoU threshold, with S weights per image (S, N)."""
        num_objects = (weights * self.num_objects).sum(dim=1, keepdim=True)  # (S, 1)
        per_detection = weights[:, self.images]  # (S, D)
        for true, false in zip(self.true_positives, self.false_positives, strict=True):
            hits = (per_detection * true).cumsum(dim=1)
            precision = hits / (hits + (per_detection * false).cumsum(dim=1)).clamp(min=1e-12)
            yield hits / num_objects, precision.flip(1).cummax(dim=1).values.flip(1)

    def average_precision(self, weights: Tensor) -> Tensor:
        """COCO's AP (S,) of the class, with S weights per image (S, N); NaN where no object has weight."""
        total, count = weights.new_zeros(len(weights)), len(weights)
        for recall, envelope in self.curves(weights):
            index = torch.searchsorted(recall, RECALLS.repeat(count, 1))  # first detection to reach each recall
            total += torch.cat([envelope, envelope.new_zeros(count, 1)], dim=1).gather(1, index).mean(dim=1)
        absent = (weights * self.num_objects).sum(dim=1) == 0
        return (total / len(self.true_positives)).masked_fill(absent, torch.nan)


def evaluate_coco(
    dataset: CocoDataset, detections: Sequence[sv.Detections], class_names: Sequence[str]
) -> tuple[dict[str, Any], list[ClassMatches]]:
    """The COCO_NAMES metrics and AP "per_class", -1 without objects; and the matches of each class with objects."""
    results = build_results(dataset, detections)
    truth = COCO()
    truth.dataset = dataset.truth
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()  # loadRes fails on an empty list
        scorer = FastCOCOeval(truth, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision = scorer.eval["precision"][:, :, :, 0, 2]  # (IoU, recall, class) for all areas and 100 detections
    columns = {category: i for i, category in enumerate(scorer.params.catIds)}
    per_class = {}
    for name, category in zip(class_names, dataset.categories, strict=True):
        values = precision[:, :, columns[category]] if category is not None else np.empty(0)
        per_class[name] = float(values[values > -1].mean()) if (values > -1).any() else -1.0
    metrics = {**dict(zip(COCO_NAMES, map(float, scorer.stats), strict=True)), "per_class": per_class}
    return metrics, collect_matches(scorer, dataset.images)


class FastCOCOeval(COCOeval):
    """COCOeval that matches all areas and IoU thresholds of an image in one pass, with the same results."""

    def evaluate(self) -> None:
        settings = self.params
        settings.imgIds, settings.catIds = np.unique(settings.imgIds).tolist(), np.unique(settings.catIds).tolist()
        self._prepare()
        self.evalImgs = []
        for category in settings.catIds:
            per_image = [self.match(image, category) for image in settings.imgIds]
            self.evalImgs += [item for of_area in zip(*per_image, strict=True) for item in of_area]
        self._paramsEval = copy.deepcopy(settings)

    def match(self, image: int, category: int) -> list[dict[str, Any] | None]:
        """The result of `evaluateImg` for each of the A area ranges.

        In order of score, each detection matches the unmatched object with the highest IoU. Objects that count in the
        area take precedence over ignored ones, and a crowd can be matched any number of times.
        """
        settings = self.params
        truth, found = self._gts[image, category], self._dts[image, category]
        if not (truth or found):
            return [None] * len(settings.areaRng)
        best = np.argsort([-item["score"] for item in found], kind="mergesort")[: settings.maxDets[-1]]
        found = [found[i] for i in best]
        low, high = np.array(settings.areaRng).T[..., None]  # (A, 1)
        crowd = np.array([item["iscrowd"] for item in truth], bool)
        ids, found_ids = (np.array([item["id"] for item in items], int) for items in (truth, found))
        areas, found_areas = (np.array([item["area"] for item in items], float) for items in (truth, found))
        skipped = np.array([item["ignore"] for item in truth], bool) | (areas < low) | (areas > high)  # (A, G)
        thresholds = np.minimum(settings.iouThrs, 1 - 1e-10)
        rows = len(low), len(thresholds)
        taken_by = np.zeros((*rows, len(truth)), int)
        matched, ignored = np.zeros((*rows, len(found)), int), np.zeros((*rows, len(found)), bool)
        iou = self.computeIoU(image, category) if truth and found else np.zeros((len(found), 0))
        for i in np.flatnonzero(iou.max(axis=1, initial=0) >= thresholds[0]):
            free = (iou[i] >= thresholds[:, None]) & ((taken_by == 0) | crowd)  # (A, T, G)
            counting = free & ~skipped[:, None]
            free = np.where(counting.any(axis=2, keepdims=True), counting, free)
            column = len(truth) - 1 - np.where(free, iou[i], -1.0)[..., ::-1].argmax(axis=2)  # the last one on a tie
            area, at = np.nonzero(free.any(axis=2))
            column = column[area, at]
            matched[area, at, i], ignored[area, at, i] = ids[column], skipped[area, column]
            taken_by[area, at, column] = found_ids[i]
        ignored |= (matched == 0) & ((found_areas < low) | (found_areas > high))[:, None]
        shared = {"image_id": image, "category_id": category, "maxDet": settings.maxDets[-1]}
        shared |= {"dtIds": found_ids, "gtIds": ids, "dtScores": [item["score"] for item in found]}
        names = ("aRng", "dtMatches", "gtMatches", "gtIgnore", "dtIgnore")
        per_area = zip(settings.areaRng, matched, taken_by, skipped, ignored, strict=True)
        return [shared | dict(zip(names, values, strict=True)) for values in per_area]


def collect_matches(scorer: COCOeval, images: Sequence[int]) -> list[ClassMatches]:
    """The matches of objects of any area for each class that has objects; `images` are COCO's ids."""
    position = {image: i for i, image in enumerate(images)}
    per_class = defaultdict(list)
    all_areas = scorer.params.areaRng[0]
    for item in scorer.evalImgs:
        if item is not None and item["aRng"] == all_areas:
            per_class[item["category_id"]].append(item)
    matches = []
    for items in per_class.values():
        num_objects = torch.zeros(len(images), dtype=torch.float64)
        for item in items:
            num_objects[position[item["image_id"]]] = int((np.asarray(item["gtIgnore"]) == 0).sum())
        if not num_objects.any():
            continue
        scores = np.concatenate([item["dtScores"] for item in items])
        order = np.argsort(-scores, kind="mergesort")  # as pycocotools does
        where = np.concatenate([np.full(len(item["dtScores"]), position[item["image_id"]]) for item in items])
        hit = np.concatenate([item["dtMatches"] for item in items], axis=1)[:, order] > 0
        ignored = np.concatenate([item["dtIgnore"] for item in items], axis=1)[:, order] > 0
        true, false = (torch.from_numpy(values & ~ignored) for values in (hit, ~hit))
        matches.append(ClassMatches(torch.from_numpy(where[order].astype(np.int64)), true, false, num_objects))
    return matches


def average_precision(matches: Sequence[ClassMatches], weights: Tensor) -> Tensor:
    """COCO's AP (S,), with S float64 weights per image (S, N); NaN where no object has weight."""
    scores = []
    for of_class in matches:
        rows = max(1, MAX_WEIGHTED // max(1, len(of_class.images)))
        scores.append(torch.cat([of_class.average_precision(part) for part in weights.split(rows)]))
    return torch.stack(scores, dim=1).nanmean(dim=1) if scores else weights.new_full((len(weights),), torch.nan)


def estimate_influence(matches: Sequence[ClassMatches], num_images: int) -> np.ndarray:
    """How much AP would rise without each image (N,), to first order in the weight (infinitesimal jackknife)."""
    weights = torch.ones(1, num_images, dtype=torch.float64, requires_grad=True)
    for of_class in matches:
        areas = [
            (recall.diff(dim=1, prepend=recall.new_zeros(1, 1)) * envelope).sum()
            for recall, envelope in of_class.curves(weights)
        ]
        (torch.stack(areas).mean() / len(matches)).backward()  # one class at a time, to save memory
    return np.zeros(num_images) if weights.grad is None else -weights.grad[0].numpy()


def to_xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, x2 - x1, y2 - y1]
