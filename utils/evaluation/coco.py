"""COCO's side of an evaluation: its twelve figures by pycocotools, its ground truth read, its results written."""

import contextlib
import copy
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.data.coco_json import CocoDataset
from utils.data.voc import Sample
from utils.evaluation.significance import ClassMatches
from utils.system.files import atomic_write

RESULTS = "coco_results.json"
COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def dataset_of(samples: Sequence[Sample], sizes: Sequence[tuple[int, int]], class_names: Sequence[str]) -> CocoDataset:
    """Samples of VOC. Objects marked difficult become crowd, as COCO has no other way to ignore them."""
    annotations = [
        {"image_id": i, "category_id": int(label), "bbox": to_xywh(box), "area": area(box), "iscrowd": int(difficult)}
        for i, sample in enumerate(samples)
        for box, label, difficult in zip(sample.boxes, sample.labels, sample.difficult, strict=True)
    ]
    truth = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)],
    }
    return CocoDataset(truth, list(range(len(samples))), list(range(len(class_names))))


def results_of(dataset: CocoDataset, detections: Sequence[sv.Detections]) -> list[dict[str, Any]]:
    """Detections as COCO's results, in the ids of its JSON; those of classes that it does not have are left out."""
    return [
        {"image_id": image, "category_id": category, "bbox": to_xywh(box), "score": float(score)}
        for image, found in zip(dataset.images, detections, strict=True)
        for box, label, score in zip(found.xyxy, found.class_id, found.confidence, strict=True)
        if (category := dataset.categories[label]) is not None
    ]


def write_results(folder: Path, dataset: CocoDataset | None, detections: Sequence[sv.Detections]) -> None:
    """RESULTS in `folder`, as the COCO server takes it; without `dataset` nothing, and an older one is removed."""
    path = folder / RESULTS
    if dataset is None:
        if path.is_file():
            path.unlink()
        return
    with atomic_write(path) as file:
        file.write(json.dumps(results_of(dataset, detections)).encode())


@dataclass(frozen=True)
class CocoScore:
    """COCO's figures of a split, and what they were made of."""

    metrics: dict[str, Any]  # the twelve, and "per_class"
    matches: list[ClassMatches]  # of the classes that have objects


def coco_score(dataset: CocoDataset, detections: Sequence[sv.Detections], class_names: Sequence[str]) -> CocoScore:
    """COCO's twelve figures from pycocotools, and AP per class; -1 where there is nothing to measure."""
    results = results_of(dataset, detections)
    truth = COCO()
    truth.dataset = dataset.truth
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # loadRes cannot take an empty list
        found = truth.loadRes(results) if results else COCO()
        scorer = Scorer(truth, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision = scorer.eval["precision"][:, :, :, 0, 2]  # IoU, recall, class; all areas, 100 detections
    columns = {category: i for i, category in enumerate(scorer.params.catIds)}
    per_class = {}
    for name, category in zip(class_names, dataset.categories, strict=True):
        values = precision[:, :, columns[category]] if category is not None else np.empty(0)
        per_class[name] = float(values[values > -1].mean()) if (values > -1).any() else -1.0
    metrics = {**dict(zip(COCO_NAMES, map(float, scorer.stats), strict=True)), "per_class": per_class}
    return CocoScore(metrics, class_matches(scorer, dataset.images))


class Scorer(COCOeval):
    """pycocotools' evaluation, whose matching takes all areas and IoU thresholds of an image at once."""

    def evaluate(self) -> None:
        settings = self.params
        settings.imgIds, settings.catIds = np.unique(settings.imgIds).tolist(), np.unique(settings.catIds).tolist()
        self._prepare()
        self.evalImgs = []
        for category in settings.catIds:
            found = [self.match(image, category) for image in settings.imgIds]
            self.evalImgs += [item for of_area in zip(*found, strict=True) for item in of_area]
        self._paramsEval = copy.deepcopy(settings)

    def match(self, image: int, category: int) -> list[dict[str, Any] | None]:
        """What `evaluateImg` returns, for each area.

        By falling score, a detection takes the free object that it overlaps most of those that count in the area, or
        if there is none of the others, where a crowd is always free.
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
            which = len(truth) - 1 - np.where(free, iou[i], -1.0)[..., ::-1].argmax(axis=2)  # the last of equal ones
            area, at = np.nonzero(free.any(axis=2))
            which = which[area, at]
            matched[area, at, i], ignored[area, at, i] = ids[which], skipped[area, which]
            taken_by[area, at, which] = found_ids[i]
        ignored |= (matched == 0) & ((found_areas < low) | (found_areas > high))[:, None]
        scores = [item["score"] for item in found]
        return [
            {
                "image_id": image,
                "category_id": category,
                "aRng": area,
                "maxDet": settings.maxDets[-1],
                "dtIds": found_ids,
                "gtIds": ids,
                "dtMatches": matched[i],
                "gtMatches": taken_by[i],
                "dtScores": scores,
                "gtIgnore": skipped[i],
                "dtIgnore": ignored[i],
            }
            for i, area in enumerate(settings.areaRng)
        ]


def class_matches(scorer: COCOeval, images: Sequence[int]) -> list[ClassMatches]:
    """What pycocotools matched, in objects of any area, by class."""
    position = {image: i for i, image in enumerate(images)}
    per_class = defaultdict(list)
    every_area = scorer.params.areaRng[0]
    for item in scorer.evalImgs:
        if item is not None and item["aRng"] == every_area:
            per_class[item["category_id"]].append(item)
    found = []
    for items in per_class.values():
        positives = torch.zeros(len(images), dtype=torch.float64)
        for item in items:
            positives[position[item["image_id"]]] = int((np.asarray(item["gtIgnore"]) == 0).sum())
        if not positives.any():
            continue
        scores = np.concatenate([item["dtScores"] for item in items])
        order = np.argsort(-scores, kind="mergesort")  # as pycocotools does
        where = np.concatenate([np.full(len(item["dtScores"]), position[item["image_id"]]) for item in items])
        hit = np.concatenate([item["dtMatches"] for item in items], axis=1)[:, order] > 0
        ignored = np.concatenate([item["dtIgnore"] for item in items], axis=1)[:, order] > 0
        right, wrong = (torch.from_numpy(values & ~ignored) for values in (hit, ~hit))
        found.append(ClassMatches(torch.from_numpy(where[order].astype(np.int64)), right, wrong, positives))
    return found


def to_xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, x2 - x1, y2 - y1]


def area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
