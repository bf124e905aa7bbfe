"""Labelled data sets written in the layouts of VOC, COCO and YOLO, each image copied as it is."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import escape

from utils.data.image_io import file_size
from utils.data.label_readers import DECIMALS, EVERYTHING, LabelSet, expect_seen_alike
from utils.data.voc_xml import EDGES, Object
from utils.system.diagnostics import FileError
from utils.system.errors import make_folder
from utils.system.files import write_text

SHARE_DECIMALS = 12  # of a share of an image, which keep DECIMALS of its pixels


def write_voc(folder: Path, labels: LabelSet) -> None:
    """JPEGImages/, Annotations/, the split files, and classes.txt for the order of the classes."""
    copy_images(folder / "JPEGImages", labels)
    make_folder(folder / "Annotations")
    for name, item in labels.items.items():
        text = voc_xml(name + item.image.suffix, item.size, item.objects)
        write_text(folder / "Annotations" / f"{name}.xml", text)
    for split, names in labels.splits.items():
        write_lines(folder / "ImageSets" / "Main" / f"{split}.txt", names)
    write_lines(folder / "classes.txt", labels.class_names)


def drop_thin_objects(labels: LabelSet) -> tuple[LabelSet, int]:
    """Without the objects narrower or lower than a pixel, which VOC cannot write; and how many these are."""
    items = {
        name: replace(item, objects=[found for found in item.objects if is_pixel(found[1])])
        for name, item in labels.items.items()
    }
    before, after = (sum(len(item.objects) for item in part.values()) for part in (labels.items, items))
    return replace(labels, items=items), before - after


def is_pixel(box: Sequence[float]) -> bool:
    x1, y1, x2, y2 = box
    return round(min(x2 - x1, y2 - y1), DECIMALS) >= 1


def voc_xml(name: str, size: tuple[int, int], objects: Sequence[Object]) -> str:
    """The XML of an image file of (height, width)."""
    height, width = size
    lines = [
        "<annotation>",
        f"  <filename>{escape(name)}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for class_name, (x1, y1, x2, y2), difficult in objects:
        box = (round(edge, DECIMALS) for edge in (x1 + 1, y1 + 1, x2, y2))  # 1-based and inclusive
        edges = "".join(f"<{edge}>{number(value)}</{edge}>" for edge, value in zip(EDGES, box, strict=True))
        about = f"<name>{escape(class_name)}</name><difficult>{difficult:d}</difficult>"
        lines.append(f"  <object>{about}<bndbox>{edges}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])


def write_coco(folder: Path, labels: LabelSet) -> None:
    """images/, and in annotations/ a JSON for each split, or for all if images are in none."""
    copy_images(folder / "images", labels)
    make_folder(folder / "annotations")
    splits = dict(labels.splits)
    if set(labels.items) - set().union(*splits.values()):
        splits[EVERYTHING] = list(labels.items)
    categories = [{"id": i, "name": name} for i, name in enumerate(labels.class_names, start=1)]
    ids = {item["name"]: item["id"] for item in categories}
    numbers = {name: i for i, name in enumerate(labels.items, start=1)}
    for split, names in splits.items():
        images, annotations = [], []
        for name in names:
            item = labels.items[name]
            about = {"file_name": name + item.image.suffix, "height": item.size[0], "width": item.size[1]}
            images.append({"id": numbers[name]} | about)
            for class_name, (x1, y1, x2, y2), difficult in item.objects:
                bbox = [number(round(value, DECIMALS)) for value in (x1, y1, x2 - x1, y2 - y1)]
                which = {"id": len(annotations) + 1, "image_id": numbers[name], "category_id": ids[class_name]}
                area = number(round(bbox[2] * bbox[3], DECIMALS))
                annotations.append(which | {"bbox": bbox, "area": area, "iscrowd": int(difficult)})
        content = {"images": images, "categories": categories, "annotations": annotations}
        write_text(folder / "annotations" / f"instances_{split}.json", json.dumps(content, ensure_ascii=False))


def write_yolo(folder: Path, labels: LabelSet) -> None:
    """images/, labels/, a list of images for each split, classes.txt, and data.yaml for other programs.

    Raises FileError for an image that its readers would see otherwise than its labels are for.
    """
    for item in labels.items.values():
        expect_seen_alike(item.image)
        seen = file_size(item.image, upright=True)
        if seen != item.size:
            sizes = " and not ".join(f"{width}x{height}" for height, width in (seen, item.size))
            reason = f"is {sizes} for readers of YOLO, who turn it by EXIF: its labels would not fit; save it without"
            raise FileError(item.image, reason)
    copy_images(folder / "images", labels)
    for name, item in labels.items.items():
        height, width = item.size
        lines = []
        for class_name, (x1, y1, x2, y2), _ in item.objects:
            shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            index = labels.class_names.index(class_name)
            lines.append(" ".join([str(index), *(f"{share:.{SHARE_DECIMALS}g}" for share in shares)]))
        write_lines(folder / "labels" / f"{name}.txt", lines)
    about = [f"names: {json.dumps(labels.class_names, ensure_ascii=False)}"]
    for split, names in labels.splits.items():
        write_lines(folder / f"{split}.txt", [f"./images/{name}{labels.items[name].image.suffix}" for name in names])
        about.append(f"{json.dumps(split)}: {json.dumps(f'{split}.txt')}")
    write_lines(folder / "classes.txt", labels.class_names)
    write_lines(folder / "data.yaml", about)


def copy_images(folder: Path, labels: LabelSet) -> None:
    make_folder(folder)
    for name, item in labels.items.items():
        shutil.copyfile(item.image, folder / (name + item.image.suffix))


def number(value: float) -> float | int:
    """A whole number without its fraction."""
    return int(value) if value == int(value) else value


def write_lines(path: Path, lines: Sequence[str]) -> None:
    make_folder(path.parent)
    write_text(path, "".join(f"{line}\n" for line in lines))
