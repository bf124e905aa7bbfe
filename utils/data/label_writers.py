"""Labels in the formats of VOC, COCO and YOLO, written for single images or for whole datasets."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from utils.data.image_io import upright_size
from utils.data.label_readers import DECIMALS, EVERYTHING, LabelSet, refuse_hidden_orientation
from utils.data.voc_xml import EDGES, LabeledObject
from utils.system.errors import FileError
from utils.system.files import make_folder, write_text

FRACTION_DIGITS = 12  # significant digits of YOLO's fractions of the image, enough for DECIMALS decimals of a pixel


def format_voc(file_name: str, size: tuple[int, int], objects: Sequence[LabeledObject]) -> str:
    """The XML annotation of an image of `size` (height, width)."""
    height, width = size
    lines = [
        "<annotation>",
        f"  <filename>{escape(file_name)}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for class_name, (x1, y1, x2, y2), difficult in objects:
        values = zip(EDGES, (x1 + 1, y1 + 1, x2, y2), strict=True)  # 1-based and inclusive
        edges = "".join(f"<{edge}>{rounded(value)}</{edge}>" for edge, value in values)
        label = f"<name>{escape(class_name)}</name><difficult>{difficult:d}</difficult>"
        lines.append(f"  <object>{label}<bndbox>{edges}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])


def format_yolo(size: tuple[int, int], objects: Sequence[LabeledObject], class_names: Sequence[str]) -> list[str]:
    """A line per object: class index, then center x, y, width and height as fractions of the image (height, width)."""
    height, width = size
    lines = []
    for class_name, (x1, y1, x2, y2), _ in objects:
        fractions = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
        numbers = (f"{fraction:.{FRACTION_DIGITS}g}" for fraction in fractions)
        lines.append(" ".join([str(class_names.index(class_name)), *numbers]))
    return lines


class CocoFile:
    """A COCO JSON file, built up image by image."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.category_ids = {name: i for i, name in enumerate(class_names, start=1)}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, image_id: int, file_name: str, size: tuple[int, int]) -> None:
        height, width = size
        self.images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})

    def add_object(self, image_id: int, item: LabeledObject, **extra: Any) -> None:
        """Add an annotation, with `extra` entries such as a score."""
        x1, y1, x2, y2 = item.box
        bbox = [rounded(value) for value in (x1, y1, x2 - x1, y2 - y1)]
        annotation = {"id": len(self.annotations) + 1, "image_id": image_id}
        annotation |= {"category_id": self.category_ids[item.class_name], "bbox": bbox}
        annotation |= {"area": rounded(bbox[2] * bbox[3]), "iscrowd": int(item.difficult)}
        self.annotations.append(annotation | extra)

    def write(self, path: Path) -> None:
        categories = [{"id": i, "name": name} for name, i in self.category_ids.items()]
        content = {"images": self.images, "categories": categories, "annotations": self.annotations}
        write_text(path, json.dumps(content, ensure_ascii=False))


def write_voc(folder: Path, labels: LabelSet) -> None:
    """Write JPEGImages/, Annotations/, the split files, and classes.txt with the order of the classes."""
    copy_images(folder / "JPEGImages", labels)
    make_folder(folder / "Annotations")
    for name, image in labels.images.items():
        text = format_voc(name + image.path.suffix, image.size, image.objects)
        write_text(folder / "Annotations" / f"{name}.xml", text)
    for split, names in labels.splits.items():
        write_lines(folder / "ImageSets" / "Main" / f"{split}.txt", names)
    write_lines(folder / "classes.txt", labels.class_names)


def drop_thin_objects(labels: LabelSet) -> LabelSet:
    """Drop the objects less than a pixel wide or high, which VOC cannot store."""
    images = {
        name: replace(image, objects=[item for item in image.objects if spans_a_pixel(item.box)])
        for name, image in labels.images.items()
    }
    return replace(labels, images=images)


def spans_a_pixel(box: Sequence[float]) -> bool:
    x1, y1, x2, y2 = box
    return round(min(x2 - x1, y2 - y1), DECIMALS) >= 1


def write_coco(folder: Path, labels: LabelSet) -> None:
    """Write images/, and annotations/ with a JSON file per split, plus one of all images if some are in no split."""
    copy_images(folder / "images", labels)
    make_folder(folder / "annotations")
    splits = dict(labels.splits)
    if set(labels.images) - set().union(*splits.values()):
        splits[EVERYTHING] = list(labels.images)
    image_ids = {name: i for i, name in enumerate(labels.images, start=1)}
    for split, names in splits.items():
        file = CocoFile(labels.class_names)
        for name in names:
            image = labels.images[name]
            file.add_image(image_ids[name], name + image.path.suffix, image.size)
            for item in image.objects:
                file.add_object(image_ids[name], item)
        file.write(folder / "annotations" / f"instances_{split}.json")


def write_yolo(folder: Path, labels: LabelSet) -> None:
    """Write images/, labels/, a list of images per split, classes.txt, and data.yaml for other programs."""
    for image in labels.images.values():
        refuse_hidden_orientation(image.path)
        upright = upright_size(image.path)
        if upright != image.size:
            seen, labeled = (f"{width}x{height}" for height, width in (upright, image.size))
            reason = f"is {seen} when turned by EXIF, as YOLO programs do, but its labels are for {labeled}"
            raise FileError(image.path, f"{reason}; save the image without the EXIF orientation")
    copy_images(folder / "images", labels)
    for name, image in labels.images.items():
        write_lines(folder / "labels" / f"{name}.txt", format_yolo(image.size, image.objects, labels.class_names))
    settings = [f"names: {json.dumps(labels.class_names, ensure_ascii=False)}"]
    for split, names in labels.splits.items():
        write_lines(folder / f"{split}.txt", [f"./images/{name}{labels.images[name].path.suffix}" for name in names])
        settings.append(f"{json.dumps(split)}: {json.dumps(f'{split}.txt')}")
    write_lines(folder / "classes.txt", labels.class_names)
    write_lines(folder / "data.yaml", settings)


def copy_images(folder: Path, labels: LabelSet) -> None:
    make_folder(folder)
    for name, image in labels.images.items():
        shutil.copyfile(image.path, folder / (name + image.path.suffix))


def rounded(value: float) -> float | int:
    """The value rounded to DECIMALS, as an int if it is whole."""
    value = round(value, DECIMALS)
    return int(value) if value == int(value) else value


def write_lines(path: Path, lines: Sequence[str]) -> None:
    make_folder(path.parent)
    write_text(path, "".join(f"{line}\n" for line in lines))
