"""Labels in the formats of VOC, COCO and YOLO, as written by common labeling tools."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from utils.data.coco_json import read_truth
from utils.data.image_io import IMAGE_SUFFIXES, read_header, upright_size
from utils.data.voc import load_classes, single_image
from utils.data.voc_xml import LabeledObject, read_voc_xml
from utils.system.diagnostics import Diagnostics
from utils.system.errors import FileError, SkippableError, UserError
from utils.system.files import read_lines
from utils.system.text import parse_number, printable, strip

IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "data", ".")  # searched in this order
YOLO_SPLITS = ("train", "val", "valid", "test")
EVERYTHING = "all"  # name of the COCO file with all images, written if some are in no split
DECIMALS = 8  # decimals of pixel coordinates; rounding removes floating-point noise
NOT_WRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # cannot be stored in a line of text or in XML
VOC_EXTRAS = re.compile(rb"<(truncated|occluded)>\s*(?:1|True|true)\s*<|<(part|attribute)>")
FLAT = "has zero width or height"


@dataclass(frozen=True)
class LabeledImage:
    path: Path
    size: tuple[int, int]  # height, width
    objects: Sequence[LabeledObject]


@dataclass(frozen=True)
class LabelSet:
    """A dataset in any of the formats."""

    class_names: tuple[str, ...]
    images: Mapping[str, LabeledImage]  # by name: the path without suffix, with _ for /
    splits: Mapping[str, Sequence[str]]  # names of images
    notes: Sequence[str] = ()  # contents that only the source format can store

    @property
    def objects(self) -> list[LabeledObject]:
        return [item for image in self.images.values() for item in image.objects]


def read_voc(folder: Path, images: Path | None, classes: Path | None, diagnostics: Diagnostics) -> LabelSet:
    """Read VOC data; the XML files are in Annotations/ if it exists, else anywhere in the folder.

    The classes are in the order of `classes`, of classes.txt or of labelmap.txt in the folder, or else alphabetical.
    """
    source = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    files = find_images([images] if images else [folder / name for name in IMAGE_FOLDERS])
    labeled, marks = {}, set()
    for xml in sorted(source.rglob("*.xml")):
        stem = xml.relative_to(source).with_suffix("").as_posix()
        with diagnostics.capture():
            size, objects = read_voc_xml(xml, diagnostics)
            image = single_image(files, stem, xml)
            size = choose_size(xml, image, size, diagnostics)
            labeled[flat_name(stem, labeled, xml)] = LabeledImage(image, size, list(objects.values()))
            marks |= set(VOC_EXTRAS.findall(xml.read_bytes()))
    kinds = sorted({word.decode() for pair in marks for word in pair if word})
    splits = {}
    for path in sorted((folder / "ImageSets" / "Main").glob("*.txt")):
        lines = [line.strip('"').replace("/", "_") for line in read_lines(path) if line]
        if any(line in labeled for line in lines):  # other files list one class, with a number after each name
            splits[path.stem] = unique_names(lines, labeled, path)
    used = {item.class_name for image in labeled.values() for item in image.objects}
    names = find_voc_classes(folder, classes) or tuple(sorted(used))
    if unknown := sorted(used - set(names)):
        listed = ", ".join(map(printable, unknown))
        raise UserError(f"{classes or folder} does not list the classes {listed}, which the labels use")
    notes = [f"VOC's {', '.join(kinds)} of objects"] if kinds else []
    return LabelSet(names, labeled, splits, notes)


def choose_size(xml: Path, image: Path, stated: tuple[int, int] | None, diagnostics: Diagnostics) -> tuple[int, int]:
    """The height and width that boxes refer to: the image's own, as stored or, if so stated, as turned by EXIF."""
    stored, _ = read_header(image)
    if stated in (stored, upright_size(image)):
        return stated
    diagnostics.record_repair(xml, "does not state the <size> of its image; the image's own size is used")
    return stored


def find_voc_classes(folder: Path, classes: Path | None) -> tuple[str, ...] | None:
    """The class names in the order of the class file or label map; None if there is neither."""
    path = classes or folder / "classes.txt"
    if path.is_file():
        return load_classes(path)
    if (folder / "labelmap.txt").is_file():  # written by CVAT, with lines of name:color:parts:actions
        lines = [line for line in read_lines(folder / "labelmap.txt") if line and not line.startswith("#")]
        return tuple(name for name in (line.rsplit(":", 3)[0] for line in lines) if name != "background")
    return None


def read_coco(path: Path, images: Path | None, diagnostics: Diagnostics) -> LabelSet:
    """Read a COCO JSON file, or those in a folder and its annotations/, one split each; classes are sorted by id."""
    files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("annotations/*.json")])
    folder = path if path.is_dir() else path.parent
    roots = [images] if images else [folder / name for name in (*IMAGE_FOLDERS, "..", "../images")]
    labeled, splits, names, notes = {}, {}, {}, set()
    for file in files:
        truth = read_truth(file)
        split = file.stem.removeprefix("instances_")
        categories = {item["id"]: item["name"] for item in sorted(truth["categories"], key=lambda item: item["id"])}
        names |= dict.fromkeys(categories.values())
        if list(categories) != list(range(1, len(categories) + 1)):
            notes.add("COCO's category ids; the order of the classes is kept")
        if re.search(rb'"(segmentation|keypoints)":\s*[\[{]+\s*[^\]}\s]', file.read_bytes()):
            notes.add("COCO's segmentation and keypoints")
        objects = defaultdict(list)
        for item in truth["annotations"]:
            with diagnostics.capture():
                x, y, width, height = item["bbox"]
                if min(width, height) <= 0:
                    raise SkippableError(file, FLAT, f"annotation {item['id']}")
                box = [round(edge, DECIMALS) for edge in (x, y, x + width, y + height)]
                found = LabeledObject(categories[item["category_id"]], box, bool(item["iscrowd"]))
                objects[item["image_id"]].append(found)
        splits[split] = [
            add_coco_image(item, file, [*roots, folder / split], objects, labeled) for item in truth["images"]
        ]
    splits.pop(EVERYTHING, None)
    return LabelSet(tuple(names), labeled, splits, sorted(notes))


def add_coco_image(
    entry: Mapping[str, Any],
    file: Path,
    roots: Sequence[Path],
    objects: Mapping[int, list[LabeledObject]],
    labeled: dict[str, LabeledImage],
) -> str:
    """Add an image entry of a COCO file to `labeled`; returns the image's name."""
    name, size = entry["file_name"], (entry["height"], entry["width"])
    path = next((path for root in roots if os.path.isfile(path := root / name)), None)
    if path is None:
        raise FileError(file, f"lists the missing image {printable(name)}; give the image folder with --images")
    stem = PurePosixPath(name).with_suffix("").as_posix()
    same = labeled.get(stem.replace("/", "_"))  # perhaps the same image, in another split
    key = flat_name(stem, {} if same and same.path == path else labeled, file)
    labeled[key] = LabeledImage(path, size, objects.get(entry["id"], []))
    return key


def read_yolo(folder: Path, images: Path | None, classes: Path | None, diagnostics: Diagnostics) -> LabelSet:
    """Read YOLO's images/ and labels/, flat or with a subfolder per split, and image lists such as train.txt."""
    names = load_yolo_classes(folder, classes)
    root = images or folder / "images"
    labeled, splits = {}, defaultdict(list)
    for stem, paths in sorted(find_images([root]).items()):
        path = single_image({stem: paths}, stem, root)
        refuse_hidden_orientation(path)
        name, first = flat_name(stem, labeled, root), stem.partition("/")[0]
        size, label = upright_size(path), folder / "labels" / f"{stem}.txt"
        labeled[name] = LabeledImage(path, size, read_yolo_label(label, size, names, diagnostics))
        if first in YOLO_SPLITS and "/" in stem:
            splits[first].append(name)
    by_file = {os.path.abspath(image.path): name for name, image in labeled.items()}
    for path in sorted(folder.glob("*.txt")):
        lines = [os.path.abspath(folder / line) for line in read_lines(path) if line]
        if any(line in by_file for line in lines):
            splits[path.stem] = [by_file[line] for line in unique_names(lines, by_file, path)]
    return LabelSet(names, labeled, splits)


def refuse_hidden_orientation(image: Path) -> None:
    """Raise FileError if EXIF mirrors or turns an image at the same size, which VOC and COCO cannot express."""
    (height, width), orientation = read_header(image)
    if orientation > 1 and (orientation <= 4 or height == width):
        reason = "is mirrored or turned by EXIF, which YOLO programs apply and others ignore"
        raise FileError(image, f"{reason}; save the image without the EXIF orientation")


def load_yolo_classes(folder: Path, classes: Path | None) -> tuple[str, ...]:
    for path in [classes] if classes else [folder / "classes.txt", folder / "obj.names"]:
        if classes or path.is_file():
            return load_classes(path)
    raise UserError(f"{folder} has no classes.txt; give a file with one class name per line, in order, with --classes")


def read_yolo_label(
    path: Path, size: tuple[int, int], names: Sequence[str], diagnostics: Diagnostics
) -> list[LabeledObject]:
    """The objects in a label file: each a class index with a box (center, width, height) or a polygon in fractions."""
    objects = []
    for number, line in enumerate(read_lines(path) if path.exists() else [], start=1):
        if not line:
            continue
        place = f"line {number}"
        with diagnostics.capture():
            try:
                index, values = parse_yolo_line(line, len(names))
            except ValueError as error:
                raise FileError(path, str(error), place) from None
            if len(values) > 5:
                diagnostics.record_repair(path, "is a polygon; its bounding box is used", place)
                box = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
            else:
                x, y, width, height = values[:4]
                box = x - width / 2, y - height / 2, x + width / 2, y + height / 2
            box = [round(edge * size[1 - i % 2], DECIMALS) for i, edge in enumerate(box)]
            if box[0] >= box[2] or box[1] >= box[3]:
                raise SkippableError(path, FLAT, place)
            objects.append(LabeledObject(names[index], box, False))
    return objects


def parse_yolo_line(line: str, num_classes: int) -> tuple[int, list[float]]:
    """The class index, and a box (with or without a confidence) or the coordinates of a polygon; raises ValueError."""
    index, *values = map(parse_number, line.split())
    if index not in range(num_classes):
        known = "is 1 class" if num_classes == 1 else f"are {num_classes} classes"
        raise ValueError(f"class {index:g} does not exist: there {known}, numbered from 0")
    if len(values) < 4:
        raise ValueError(f"must be a class index and four fractions of the image, but has {1 + len(values)} numbers")
    if len(values) > 5 and len(values) % 2:
        raise ValueError(f"must have an even number of polygon coordinates, but has {len(values)}")
    return int(index), values


def find_images(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """The images in the first folder that has any, subfolders included, by relative path without suffix."""
    for folder in folders:
        found = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found[path.relative_to(folder).with_suffix("").as_posix()].append(path)
        if found:
            return found
    raise UserError(f"there are no images in {' or '.join(map(str, folders))}; give the image folder with --images")


def flat_name(stem: str, taken: Mapping[str, object], source: Path) -> str:
    """An image name with _ for /, since VOC's split files do not allow folders; raises FileError if it is taken."""
    name = stem.replace("/", "_")
    if not fits_on_line(name):
        raise FileError(source, f"has an image named {name!r}, which cannot be listed in a split file; rename it")
    if name in taken:
        raise FileError(source, f"has two images that would both be named {printable(name)!r}; rename one")
    return name


def unique_names(lines: Sequence[str], images: Mapping[str, object], path: Path) -> list[str]:
    """The lines of a split file without repetitions; raises FileError for a line that is not in `images`."""
    missing = [line for line in lines if line not in images]
    if missing:
        raise FileError(path, f"lists {printable(missing[0])!r}, but there is no image with labels of that name")
    return list(dict.fromkeys(lines))


def fits_on_line(text: str) -> bool:
    """Whether a name can be written on a line of a text file and read back unchanged."""
    return bool(text) and text == strip(text) and not NOT_WRITABLE.search(text)
