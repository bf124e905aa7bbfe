"""Ground truth in COCO's JSON format, read for evaluation and conversion."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.voc import Sample
from utils.system.errors import UserError
from utils.system.files import read_file
from utils.system.text import printable

MAX_BYTES = 500_000_000  # size limit of a JSON file; instances_train2017.json is 470 MB

Entry = dict[str, Any]


@dataclass(frozen=True)
class CocoDataset:
    """Ground truth in COCO's format, for samples in the same order."""

    truth: dict[str, list[Entry]]  # images, categories and annotations, as in the JSON
    images: list[int]  # the image id of each sample
    categories: list[int | None]  # the category id of each class; None for a class that the ground truth lacks


def load_coco_samples(
    path: str | Path, images: str | Path, class_names: Sequence[str]
) -> tuple[list[Sample], CocoDataset]:
    """Read a COCO JSON file, whose images are in the folder `images`; crowds count as difficult.

    The samples leave out objects of zero width or height. Raises UserError for missing images and unknown classes.
    """
    path, folder = Path(path), Path(images)
    truth = read_truth(path)
    names = {item["id"]: item["name"] for item in truth["categories"]}
    labels = {name: i for i, name in enumerate(class_names)}
    unknown = sorted({names[item["category_id"]] for item in truth["annotations"]} - set(class_names))
    if unknown:
        raise UserError(
            f"{path} has objects of classes that the checkpoint does not know: {', '.join(unknown)}; it knows "
            f"{', '.join(class_names)}"
        )
    objects = defaultdict(list)
    for item in truth["annotations"]:
        objects[item["image_id"]].append(item)
    samples = []
    for image in truth["images"]:
        name = image["file_name"]
        if not os.path.isfile(folder / name):
            raise UserError(f"{path} lists the image {name}, but it is not in {folder}; give its folder with --images")
        found = [item for item in objects[image["id"]] if min(item["bbox"][2:]) > 0]
        boxes = np.array([item["bbox"] for item in found], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        indices = np.array([labels[names[item["category_id"]]] for item in found], dtype=np.int64)
        crowds = np.array([item["iscrowd"] for item in found], dtype=bool)
        stem, size = str(Path(name).with_suffix("")), (image["height"], image["width"])
        samples.append(Sample(stem, folder / name, size, boxes.astype(np.float32), indices, crowds))
    category_ids = {name: category for category, name in names.items()}
    categories = [category_ids.get(name) for name in class_names]
    return samples, CocoDataset(truth, [item["id"] for item in truth["images"]], categories)


def read_truth(path: Path) -> dict[str, list[Entry]]:
    """The checked images, categories and annotations of a COCO JSON file; annotation ids are renumbered from 1."""
    try:
        content = json.loads(read_file(path, MAX_BYTES))
        if not isinstance(content, dict):
            raise ValueError("it must be an object with images, categories and annotations")
        images = [parse_image(item) for item in content["images"]]
        categories = [{"id": item["id"], "name": str(item["name"])} for item in content["categories"]]
        annotations = [parse_annotation(i, item) for i, item in enumerate(content.get("annotations") or [], start=1)]
        check_references(images, categories, annotations)
    except KeyError as error:
        raise UserError(f"{path} is not COCO ground truth: it lacks an entry {error}") from None
    except (ValueError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not COCO ground truth: {error}") from None
    return {"images": images, "categories": categories, "annotations": annotations}


def parse_image(item: Entry) -> Entry:
    """The entries of an image that an evaluation needs; raises ValueError, TypeError or KeyError if invalid."""
    name = str(item["file_name"])
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"the image {printable(name)} is outside the image folder; use a path relative to it")
    for key in ("height", "width"):
        side = item[key]
        if not (isinstance(side, int | float) and 0 < side < 2**31 and side == int(side)):
            raise ValueError(f"the {key} of {printable(name)} is {printable(side)}")
    return {"id": item["id"], "file_name": name, "height": int(item["height"]), "width": int(item["width"])}


def parse_annotation(number: int, item: Entry) -> Entry:
    """The entries of an annotation that an evaluation needs; raises ValueError, TypeError or KeyError if invalid."""
    x, y, width, height = map(float, item["bbox"])
    area = float(item.get("area", width * height))
    if not all(map(math.isfinite, (x, y, width, height, area))) or area < 0:
        raise ValueError(f"annotation {number} has the box {item['bbox']} and the area {area:g}")
    ids = {name: item[name] for name in ("image_id", "category_id")}
    crowd = int(bool(item.get("iscrowd", 0)))
    return {"id": number, **ids, "bbox": [x, y, width, height], "area": area, "iscrowd": crowd}


def check_references(images: Sequence[Entry], categories: Sequence[Entry], annotations: Sequence[Entry]) -> None:
    """Raise ValueError unless there are images and categories with unique ids, and annotations refer only to these."""
    for what, items, key in (("image", images, "id"), ("category", categories, "id"), ("category", categories, "name")):
        if not items:
            raise ValueError(f"it lists no {what}")
        if len(sorted({item[key] for item in items})) < len(items):  # sorting raises TypeError for ids of mixed types
            raise ValueError(f"it lists two {what} entries with the same {key}")
    known_images, known_categories = ({item["id"] for item in items} for items in (images, categories))
    for item in annotations:
        if item["image_id"] not in known_images or item["category_id"] not in known_categories:
            raise ValueError(f"annotation {item['id']} refers to an unlisted image or category")
