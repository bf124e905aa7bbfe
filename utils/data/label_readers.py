"""Labelled data sets in the layouts of VOC, COCO and YOLO, as their users and labelling programs leave them."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from utils.data.coco_json import check_within, read_truth
from utils.data.image_io import file_size, is_turned_unseen
from utils.data.voc import IMAGE_SUFFIXES, load_classes
from utils.data.voc_xml import Object, read_annotation
from utils.system.diagnostics import Diagnostics, FileError, SkippableError
from utils.system.errors import UserError
from utils.system.text import parse_number, read_lines, show, strip

IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "data", ".")  # where images of a data set may be
YOLO_SPLITS = ("train", "val", "valid", "test")
EVERYTHING = "all"  # the name of what is no split
DECIMALS = 8  # of a pixel; what arithmetic adds behind them is dropped
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # of a line, or of XML
POLYGON = "is a polygon; the box around it counts"
FLAT = "has no width or height"


@dataclass(frozen=True)
class Labelled:
    """An image and its objects."""

    image: Path
    size: tuple[int, int]  # height, width
    objects: Sequence[Object]


@dataclass(frozen=True)
class LabelSet:
    """A data set; its images by their names without suffix."""

    class_names: tuple[str, ...]
    items: Mapping[str, Labelled]
    splits: Mapping[str, Sequence[str]]  # names of images
    notes: Sequence[str] = ()  # what only the layout that it was read from can hold


def read_voc(folder: Path, images: Path | None, classes: Path | None, diagnostics: Diagnostics) -> LabelSet:
    """VOC, and what LabelImg, CVAT and Label Studio export as VOC.

    The XML files are in Annotations/ or beside the images, in folders of their own or not. Classes are in the order of
    `classes`, of classes.txt or labelmap.txt in the folder, else of the alphabet.
    """
    source = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    found = find_images([images] if images else [folder / name for name in IMAGE_FOLDERS])
    items, noted = {}, set()
    for xml in sorted(source.rglob("*.xml")):
        stem = xml.relative_to(source).with_suffix("").as_posix()
        with diagnostics.capture():
            size, objects = read_annotation(xml, diagnostics)
            image = single_image(found, stem, xml)
            size = annotated_size(xml, image, size, diagnostics)
            items[flat(stem, items, xml)] = Labelled(image, size, [item for item in objects if item])
            noted |= set(
                re.findall(rb"<(truncated|occluded)>\s*(?:1|True|true)\s*<|<(part|attribute)>", xml.read_bytes())
            )
    kinds = sorted({word.decode() for pair in noted for word in pair if word})
    splits = {}
    for path in sorted((folder / "ImageSets" / "Main").glob("*.txt")):
        lines = [line.strip('"').replace("/", "_") for line in read_lines(path) if line]
        if any(line in items for line in lines):  # else of a single class, with a number behind each name
            splits[path.stem] = known(lines, items, path)
    used = {item[0] for labelled in items.values() for item in labelled.objects}
    names = voc_classes(folder, classes) or tuple(sorted(used))
    expect_classes(used, names, classes or folder)
    notes = [f"VOC's {', '.join(kinds)} of objects"] if kinds else []
    return LabelSet(names, items, splits, notes)


def annotated_size(xml: Path, image: Path, stated: tuple[int, int] | None, diagnostics: Diagnostics) -> tuple[int, int]:
    """Height and width of the picture that the boxes lie on: the file's, as it is stored or as EXIF turns it."""
    stored = file_size(image)
    if stated in (stored, file_size(image, upright=True)):
        return stated
    diagnostics.record_repair(xml, "states no <size>, or another than the image has; the image's own counts")
    return stored


def voc_classes(folder: Path, classes: Path | None) -> tuple[str, ...] | None:
    """Class names in their order, where a file says it."""
    path = classes or folder / "classes.txt"
    if path.is_file():
        return load_classes(path)
    if (folder / "labelmap.txt").is_file():  # CVAT's: name:colour:parts:actions
        lines = [line for line in read_lines(folder / "labelmap.txt") if line and not line.startswith("#")]
        return tuple(name for name in (line.rsplit(":", 3)[0] for line in lines) if name != "background")
    return None


def read_coco(path: Path, images: Path | None, diagnostics: Diagnostics) -> LabelSet:
    """COCO's JSON, or all of a folder or its annotations/, each a split; classes in the order of their ids."""
    files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("annotations/*.json")])
    folder = path if path.is_dir() else path.parent
    roots = [images] if images else [folder / name for name in (*IMAGE_FOLDERS, "..", "../images")]
    items, splits, names, notes = {}, {}, {}, set()
    for file in files:
        truth = read_truth(file)
        split = file.stem.removeprefix("instances_")
        categories = {item["id"]: item["name"] for item in sorted(truth["categories"], key=lambda item: item["id"])}
        names |= dict.fromkeys(categories.values())
        if list(categories) != list(range(1, len(categories) + 1)):
            notes.add("COCO's ids of classes, whose order stays")
        if re.search(rb'"(segmentation|keypoints)":\s*[\[{]+\s*[^\]}\s]', file.read_bytes()):
            notes.add("COCO's segmentation and keypoints")
        objects = defaultdict(list)
        for item in truth["annotations"]:
            with diagnostics.capture():
                x, y, width, height = item["bbox"]
                if min(width, height) <= 0:
                    raise SkippableError(file, FLAT, f"annotation {item['id']}")
                box = [round(edge, DECIMALS) for edge in (x, y, x + width, y + height)]
                objects[item["image_id"]].append((categories[item["category_id"]], box, bool(item["iscrowd"])))
        splits[split] = [coco_image(item, file, [*roots, folder / split], objects, items) for item in truth["images"]]
    splits.pop(EVERYTHING, None)
    return LabelSet(tuple(names), items, splits, sorted(notes))


def coco_image(
    about: Mapping[str, Any],
    file: Path,
    roots: Sequence[Path],
    objects: Mapping[int, list[Object]],
    items: dict[str, Labelled],
) -> str:
    """Add an image of a COCO file to `items`; returns its name."""
    name, size = about["file_name"], (about["height"], about["width"])
    check_within(file, name)
    image = next((path for root in roots if os.path.isfile(path := root / name)), None)
    if image is None:
        raise FileError(file, f"names {show(name)}, which is not there; give the folder of the images as --images")
    stem = PurePosixPath(name).with_suffix("").as_posix()
    same = items.get(stem.replace("/", "_"))  # of another split
    key = flat(stem, {} if same and same.image == image else items, file)
    items[key] = Labelled(image, size, objects.get(about["id"], []))
    return key


def read_yolo(folder: Path, images: Path | None, classes: Path | None, diagnostics: Diagnostics) -> LabelSet:
    """YOLO's images/ and labels/, flat or with a folder for each split, and lists of images such as train.txt.

    An image without a label file has no objects. Class names are in `classes`, classes.txt or obj.names.
    """
    names = yolo_classes(folder, classes)
    root = images or folder / "images"
    items, splits = {}, defaultdict(list)
    for stem, paths in sorted(find_images([root]).items()):
        image = single_image({stem: paths}, stem, root)
        expect_seen_alike(image)
        name, first = flat(stem, items, root), stem.partition("/")[0]
        size, label = file_size(image, upright=True), folder / "labels" / f"{stem}.txt"
        items[name] = Labelled(image, size, read_label(label, size, names, diagnostics))
        if first in YOLO_SPLITS and "/" in stem:
            splits[first].append(name)
    by_file = {os.path.abspath(item.image): name for name, item in items.items()}
    for path in sorted(folder.glob("*.txt")):
        lines = [os.path.abspath(folder / line) for line in read_lines(path) if line]
        if any(line in by_file for line in lines):
            splits[path.stem] = [by_file[line] for line in known(lines, by_file, path)]
    return LabelSet(names, items, splits)


def expect_seen_alike(image: Path) -> None:
    """Raise FileError for an image that readers of YOLO, who follow EXIF, see otherwise than readers of VOC and COCO.

    Those go by the size, which does not tell them of this turn.
    """
    if is_turned_unseen(image):
        reason = "is mirrored or turned by EXIF, which readers of YOLO follow and others do not; save it without"
        raise FileError(image, reason)


def yolo_classes(folder: Path, classes: Path | None) -> tuple[str, ...]:
    for path in [classes] if classes else [folder / "classes.txt", folder / "obj.names"]:
        if classes or path.is_file():
            return load_classes(path)
    raise UserError(f"{folder} has no classes.txt; write the names, such as those in data.yaml, a line each: --classes")


def read_label(path: Path, size: tuple[int, int], names: Sequence[str], diagnostics: Diagnostics) -> list[Object]:
    """The objects in a label file: class, centre and sides in shares of the image, or the corners of a polygon."""
    objects: list[Object] = []
    for number, line in enumerate(read_lines(path) if path.exists() else [], start=1):
        if not line:
            continue
        place = f"line {number}"
        with diagnostics.capture():
            try:
                index, *values = map(parse_number, line.split())
                if len(values) < 4 or index not in range(len(names)):
                    raise ValueError(f"has class {index:g} of {len(names)} and {len(values)} numbers")
            except ValueError as error:
                raise FileError(path, f"must be a class number and four shares of the image ({error})", place) from None
            box = polygon_box(values) if len(values) > 5 else centred_box(values)  # a fifth is a confidence
            if len(values) > 5:
                diagnostics.record_repair(path, POLYGON, place)
            box = [round(edge * size[1 - i % 2], DECIMALS) for i, edge in enumerate(box)]
            if box[0] >= box[2] or box[1] >= box[3]:
                raise SkippableError(path, FLAT, place)
            objects.append((names[int(index)], box, False))
    return objects


def centred_box(values: Sequence[float]) -> list[float]:
    x, y, width, height = values[:4]
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def polygon_box(values: Sequence[float]) -> list[float]:
    return [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]


def find_images(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """The images in and below the first of the folders that has some, by their path in it without suffix."""
    for folder in folders:
        found = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found[path.relative_to(folder).with_suffix("").as_posix()].append(path)
        if found:
            return found
    raise UserError(f"there are no images in {' or '.join(map(str, folders))}; name their folder as --images")


def single_image(images: Mapping[str, Sequence[Path]], stem: str, source: Path) -> Path:
    found = images.get(stem, ())
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "none"
        raise FileError(source, f"needs one image of the name {show(stem)!r}, and there is {names}")
    return found[0]


def flat(stem: str, taken: Mapping[str, object], source: Path) -> str:
    """A name without folders, which VOC's split files cannot have."""
    name = stem.replace("/", "_")
    if not is_line(name):
        raise FileError(source, f"has an image named {name!r}, which is no line of a split file; rename it")
    if name in taken:
        raise FileError(source, f"has two images that would both be {show(name)!r}; rename one")
    return name


def known(lines: Sequence[str], items: Mapping[str, object], path: Path) -> list[str]:
    """The lines of a split file, which must all be images."""
    missing = [line for line in lines if line not in items]
    if missing:
        raise FileError(path, f"names {show(missing[0])!r}, which has no image with labels")
    return list(dict.fromkeys(lines))


def is_line(text: str) -> bool:
    """Whether a name can stand on a line of a file, to be read as it was."""
    return bool(text) and text == strip(text) and not UNWRITABLE.search(text)


def expect_classes(used: set[str], names: Sequence[str], source: Path) -> None:
    unknown = sorted(used - set(names))
    if unknown:
        raise UserError(f"{source} does not have the classes {', '.join(map(show, unknown))} that the labels have")
