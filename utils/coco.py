"""COCO's side of an evaluation: its twelve figures by pycocotools, its ground truth read, its results written."""

import contextlib
import copy
import io
import json
import math
import os
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

from utils.errors import UserError
from utils.files import read_file, replacing
from utils.text import show
from utils.voc import Sample
from utils.weighted_ap import ClassMatches

RESULTS = "coco_results.json"
MOST_BYTES = 500_000_000  # of a JSON file; COCO's largest, instances_train2017.json, has 470 million
COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class Dataset:
    """A split as COCO sees it."""

    truth: dict[str, list]  # images, categories and annotations, as in COCO's JSON
    images: list[int]  # the id of each sample's image
    categories: list[int | None]  # the id of each class; None for one that the truth does not have


def dataset_of(samples: Sequence[Sample], sizes: Sequence[tuple[int, int]], class_names: Sequence[str]) -> Dataset:
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
    return Dataset(truth, list(range(len(samples))), list(range(len(class_names))))


def results_of(dataset: Dataset, detections: Sequence[sv.Detections]) -> list[dict[str, Any]]:
    """Detections as COCO's results, in the ids of its JSON; those of classes that it does not have are left out."""
    return [
        {"image_id": image, "category_id": category, "bbox": to_xywh(box), "score": float(score)}
        for image, found in zip(dataset.images, detections, strict=True)
        for box, label, score in zip(found.xyxy, found.class_id, found.confidence, strict=True)
        if (category := dataset.categories[label]) is not None
    ]


def write_results(folder: Path, dataset: Dataset | None, detections: Sequence[sv.Detections]) -> None:
    """RESULTS in `folder`, as the COCO server takes it; without `dataset` nothing, and an older one is removed."""
    path = folder / RESULTS
    if dataset is None:
        if path.is_file():
            path.unlink()
        return
    with replacing(path) as file:
        file.write(json.dumps(results_of(dataset, detections)).encode())


@dataclass(frozen=True)
class CocoScore:
    """COCO's figures of a split, and what they were made of."""

    metrics: dict[str, Any]  # the twelve, and "per_class"
    matches: list[ClassMatches]  # of the classes that have objects


def coco_score(dataset: Dataset, detections: Sequence[sv.Detections], class_names: Sequence[str]) -> CocoScore:
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


def read_coco(path: str | Path, images: str | Path, class_names: Sequence[str]) -> tuple[list[Sample], Dataset]:
    """The ground truth in a COCO JSON file, whose images lie in the folder `images`; crowd counts as difficult.

    Objects without width or height are COCO's alone, since no sample has them. Raises UserError for a file of another
    form, an image that is not there, and objects of an unknown class.
    """
    path, folder = Path(path), Path(images)
    truth = read_truth(path)
    names = {item["id"]: item["name"] for item in truth["categories"]}
    labels = {name: i for i, name in enumerate(class_names)}
    objects = defaultdict(list)
    for item in truth["annotations"]:
        objects[item["image_id"]].append(item)
    unknown = sorted({names[item["category_id"]] for item in truth["annotations"]} - set(class_names))
    if unknown:
        raise UserError(
            f"{path} has objects of classes that the checkpoint does not know: {', '.join(unknown)}; it knows "
            f"{', '.join(class_names)}"
        )
    samples = []
    for image in truth["images"]:
        name = image["file_name"]
        check_within(path, name)
        if not os.path.isfile(folder / name):
            raise UserError(f"{path} names the image {name}, but it is not in {folder}; give the folder as --images")
        found = [item for item in objects[image["id"]] if min(item["bbox"][2:]) > 0]
        boxes = np.array([item["bbox"] for item in found], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        samples.append(
            Sample(
                str(Path(name).with_suffix("")),
                folder / name,
                (image["height"], image["width"]),
                boxes.astype(np.float32),
                np.array([labels[names[item["category_id"]]] for item in found], dtype=np.int64),
                np.array([item["iscrowd"] for item in found], dtype=bool),
            )
        )
    ids = {name: category for category, name in names.items()}
    return samples, Dataset(truth, [item["id"] for item in truth["images"]], [ids.get(name) for name in class_names])


def read_truth(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What an evaluation needs of a COCO JSON file, checked; its annotations, which a test set lacks, from 1 on."""
    try:
        content = json.loads(read_file(path, MOST_BYTES))
        if not isinstance(content, dict):
            raise ValueError("it must be an object with images, categories and annotations")
        images = [
            {"id": item["id"], "file_name": str(item["file_name"])}
            | {side: read_side(item, side) for side in ("height", "width")}
            for item in content["images"]
        ]
        categories = [{"id": item["id"], "name": str(item["name"])} for item in content["categories"]]
        annotations = [read_annotation(i, item) for i, item in enumerate(content.get("annotations") or [], start=1)]
        check_listed(images, categories, annotations)
    except KeyError as error:
        raise UserError(f"{path} is not COCO ground truth: something in it has no {error}") from None
    except (ValueError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not COCO ground truth: {error}") from None
    return {"images": images, "categories": categories, "annotations": annotations}


def read_annotation(number: int, item: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation needs of an annotation; raises ValueError, TypeError or KeyError for what is none."""
    x, y, width, height = map(float, item["bbox"])
    surface = float(item.get("area", width * height))
    if not all(map(math.isfinite, (x, y, width, height, surface))) or surface < 0:
        raise ValueError(f"annotation {number} has the box {item['bbox']} and the area {surface:g}")
    which = {name: item[name] for name in ("image_id", "category_id")}
    crowd = int(bool(item.get("iscrowd", 0)))
    return {"id": number, **which, "bbox": [x, y, width, height], "area": surface, "iscrowd": crowd}


def check_listed(
    images: list[dict[str, Any]], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> None:
    """Raise ValueError unless images and categories are there, each once, and annotations are of these alone."""
    for what, items, key in (("image", images, "id"), ("category", categories, "id"), ("category", categories, "name")):
        if not items:
            raise ValueError(f"it lists no {what}")
        if len(sorted({item[key] for item in items})) < len(items):  # ids of one type alone can be sorted
            raise ValueError(f"it lists two items of {what} with one {key}")
    known_images, known_categories = ({item["id"] for item in items} for items in (images, categories))
    for item in annotations:
        if item["image_id"] not in known_images or item["category_id"] not in known_categories:
            raise ValueError(f"annotation {item['id']} is of an image or a category that it does not list")


def read_side(image: dict[str, Any], name: str) -> int:
    """An image's height or width in pixels; raises ValueError for what none can have."""
    side = image[name]
    if not (isinstance(side, int | float) and 0 < side < 2**31 and side == int(side)):
        raise ValueError(f"the {name} of {show(image['file_name'])} is {show(side)}")
    return int(side)


def check_within(path: Path, name: str) -> None:
    """Raise UserError for an image that would lie outside the folder of images."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{path} names the image {name}, which is not within a folder of images; name it from there")


def to_xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, x2 - x1, y2 - y1]


def area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
