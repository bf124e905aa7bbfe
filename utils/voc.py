"""Data sets in VOC layout: class files, split files and annotations, with every check of what a user wrote.

Coordinates in the files are 1-based and inclusive; inside, a box is (xmin - 1, ymin - 1, xmax, ymax).
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import parse
from tqdm import tqdm

from utils.errors import UserError
from utils.files import CACHE_FOLDER, lock, replacing

INDEX_VERSION = 1  # of the index of annotations; raise it when read_annotation returns something else
INDEX_FROM = 1000  # annotations in a folder that are worth an index
RACY_NS = 2_000_000_000  # a file this young may change again within one tick of its file system's clock
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
EDGES = ("xmin", "ymin", "xmax", "ymax")

# (height, width) where it is stated; then class name, xyxy box in pixels counted from 0, and difficult of each object
Annotation = tuple[tuple[int, int] | None, list[tuple[str, list[float], bool]]]


@dataclass(frozen=True)
class Sample:
    """One image and its objects."""

    name: str  # the image's id in its split file
    image: Path
    size: tuple[int, int] | None  # height, width that the annotation states
    boxes: np.ndarray  # (N, 4) float32 xyxy in pixels of the image
    labels: np.ndarray  # (N,) int64, index into the class names
    difficult: np.ndarray  # (N,) bool


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without a byte-order mark, blanks at their ends and blank lines at the end."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    while lines and not lines[-1]:
        lines.pop()
    return lines


def load_classes(path: str | Path) -> tuple[str, ...]:
    """Class names from a file with one name a line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no class file {path}; write one with a class name on each line")
    names = read_lines(path)
    if not names:
        raise UserError(f"{path} is empty; write a class name on each line")
    if "" in names:
        raise UserError(f"{path}, line {names.index('') + 1} is blank; remove it")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path} has the class {name!r} {names.count(name)} times; keep one")
    return tuple(names)


def split_file(devkit: Path, name: str) -> Path:
    """The split file of a set such as VOC2007/trainval."""
    folder, _, split = name.rpartition("/")
    return devkit / folder / "ImageSets" / "Main" / f"{split}.txt"


def read_split(devkit: Path, name: str) -> list[str]:
    """The image ids of a set such as VOC2007/trainval."""
    if "/" not in name:
        raise UserError(f"the set {name!r} names no split; write it as folder/split, such as {name}/train")
    path = split_file(devkit, name)
    if not path.is_file():
        raise UserError(
            f"there is no data set {name}: looked for {path}. Put a VOC data set under {devkit} "
            "(make its split files with tools/make_splits.py), or run `make demo` for one to try"
        )
    ids = [line for line in read_lines(path) if line]
    if not ids:
        raise UserError(
            f"{path} is empty: it must name an image on each line; tools/make_splits.py can make the splits"
        )
    return ids


def load_samples(devkit: str | Path, sets: Sequence[str], class_names: Sequence[str]) -> list[Sample]:
    """All samples of sets such as ("VOC2007/trainval", "VOC2012/trainval"), in the order of their split files.

    Raises UserError for whatever is missing or malformed, naming the file.
    """
    devkit = Path(devkit)
    indices = {name: i for i, name in enumerate(class_names)}
    samples, unknown = [], defaultdict(int)
    if not sets:
        raise UserError("no set was given; name one such as VOC2007/train")
    for name in sets:
        ids = read_split(devkit, name)
        folder = devkit / name.rpartition("/")[0]
        source = split_file(devkit, name)
        images = index_images(folder / "JPEGImages")
        annotations = AnnotationIndex(folder / "Annotations")
        for image_id in tqdm(ids, desc=f"annotations of {name}", leave=False, disable=None):
            image = find_image(images, image_id, folder, source)
            size, objects = annotations.read(f"{image_id}.xml")
            for class_name, *_ in objects:
                if class_name not in indices:
                    unknown[class_name] += 1
            samples.append(
                Sample(
                    image_id,
                    image,
                    size,
                    np.array([box for _, box, _ in objects], dtype=np.float32).reshape(-1, 4),
                    np.array([indices.get(name, -1) for name, _, _ in objects], dtype=np.int64),
                    np.array([difficult for *_, difficult in objects], dtype=bool),
                )
            )
        annotations.save()
    if unknown:
        found = ", ".join(f"{name!r} ({count})" for name, count in sorted(unknown.items()))
        raise UserError(
            f"the annotations of {', '.join(sets)} have classes that are not to be detected: {found}; those that are: "
            f"{', '.join(class_names)}. Correct the annotations, or the class file that the training has"
        )
    return samples


def index_images(folder: Path) -> dict[str, list[Path]]:
    """Image files of a folder by their name without suffix."""
    if not folder.is_dir():
        raise UserError(f"there is no image folder {folder}")
    images = defaultdict(list)
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            images[stem].append(folder / name)
    return images


def find_image(images: dict[str, list[Path]], image_id: str, folder: Path, source: Path) -> Path:
    found = images.get(image_id, [])
    if not found:
        raise UserError(f"{source} names {image_id!r}, but {folder / 'JPEGImages'} has no image of that name")
    if len(found) > 1:
        raise UserError(f"{image_id!r} has several images, {', '.join(path.name for path in found)}: keep one")
    return found[0]


class AnnotationIndex:
    """The annotations of a folder; of a large one, what was read of each file is kept in CACHE_FOLDER for the next run.

    What was kept counts as long as its file has the modification time and size that it had then.
    """

    def __init__(self, folder: Path) -> None:
        digest = sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
        self.folder = folder
        self.path = CACHE_FOLDER / f"annotations-{digest[:16]}.json"
        self.settled_ns = time.time_ns() - RACY_NS
        self.states = file_states(folder)
        self.large = len(self.states) >= INDEX_FROM
        self.entries = load_entries(self.path) if self.large else {}
        self.changed = False

    def read(self, name: str) -> Annotation:
        """The annotation in the file of this name; raises UserError like read_annotation."""
        state = self.states.get(name)
        match self.entries.get(name):
            case [int(mtime), int(size), annotation] if (mtime, size) == state and is_annotation(annotation):
                stated, objects = annotation
                return stated and tuple(stated), objects
        annotation = read_annotation(self.folder / name)
        if state and state[0] < self.settled_ns:
            self.entries[name] = [*state, annotation]
            self.changed = True
        return annotation

    def save(self) -> None:
        """Write the index where it is worth one and has changed, unless another process is at it.

        Where it cannot be written, a line on stderr says so.
        """
        if not (self.large and self.changed):
            return
        kept = {name: entry for name, entry in self.entries.items() if name in self.states}
        try:
            CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
            held = lock(self.path.with_suffix(".lock"))
            if held is None:
                return
            with held, replacing(self.path) as file:
                file.write(json.dumps({"version": INDEX_VERSION, "annotations": kept}).encode())
        except (OSError, UserError) as error:
            print(f"the index of {self.folder} could not be written, which costs only time: {error}", file=sys.stderr)


def file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """Modification time in ns and size in bytes of a folder's XML files by name, as far as they can be listed."""
    states = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".xml") and entry.is_file():
                state = entry.stat()
                states[entry.name] = state.st_mtime_ns, state.st_size
    return states


def load_entries(path: Path) -> dict:
    """What an index file holds by annotation file; nothing if it is missing, damaged or of another version."""
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    match index:
        case {"version": version, "annotations": dict(entries)} if version == INDEX_VERSION:
            return entries
    return {}


def is_annotation(value: object) -> bool:
    """Whether a value from JSON has the form of an Annotation."""
    match value:
        case [None | [int(), int()], list(objects)]:
            return all(map(is_object, objects))
    return False


def is_object(value: object) -> bool:
    match value:
        case [str(), [float(), float(), float(), float()], bool()]:
            return True
    return False


def read_annotation(path: Path) -> Annotation:
    """Parse an annotation file; raises UserError naming what is wrong in it."""
    if not path.is_file():
        raise UserError(f"there is no annotation {path}; an image without objects needs one without <object>")
    try:
        root = parse(path, forbid_dtd=True).getroot()
    except ParseError as error:
        raise UserError(
            f"{path} is not well-formed XML ({error}); mend it, or take the image out of its split file"
        ) from None
    except DefusedXmlException:
        raise UserError(f"{path} has a DOCTYPE or entities, which annotations must not have; remove them") from None
    except (ValueError, LookupError) as error:
        raise UserError(f"{path} declares an encoding that cannot be read ({error}); save it as UTF-8") from None
    if root.tag != "annotation":
        raise UserError(f"{path} starts with <{root.tag}>, but a VOC annotation starts with <annotation>")
    size = root.findtext("size/height", ""), root.findtext("size/width", "")
    stated = (int(size[0]), int(size[1])) if all(side.strip().isdecimal() and int(side) for side in size) else None
    return stated, [read_object(item, f"{path}, object {i}") for i, item in enumerate(root.findall("object"), start=1)]


def read_object(item: Element, where: str) -> tuple[str, list[float], bool]:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{where} has no <name>")
    box = []
    for edge in EDGES:
        text = (item.findtext(f"bndbox/{edge}") or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not isfinite(value):
            raise UserError(f"{where} ({name}): <{edge}> is {text!r}, but must be a number")
        box.append(value)
    xmin, ymin, xmax, ymax = box
    if xmin > xmax or ymin > ymax:
        raise UserError(f"{where} ({name}): the box {box} ends before it begins")
    difficult = (item.findtext("difficult") or "").strip() or "0"
    if difficult not in ("0", "1"):
        raise UserError(f"{where} ({name}): <difficult> is {difficult!r}, but must be 0 or 1")
    return name, [xmin - 1, ymin - 1, xmax, ymax], difficult == "1"
