"""COCO JSON files: ground truth to evaluate on and to convert."""

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
from utils.system.text import show

MAX_BYTES = 500_000_000  # of a JSON file; COCO's largest, instances_train2017.json, has 470 million


@dataclass(frozen=True)
class Dataset:
    """A split as COCO sees it."""

    truth: dict[str, list]  # images, categories and annotations, as in COCO's JSON
    images: list[int]  # the id of each sample's image
    categories: list[int | None]  # the id of each class; None for one that the truth does not have


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
        content = json.loads(read_file(path, MAX_BYTES))
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
