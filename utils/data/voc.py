"""Data sets in VOC layout: class files, split files and the samples that they name, each checked as it is read."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from unicodedata import normalize

import numpy as np
from tqdm import tqdm

from nets.spec import MAX_CLASSES
from utils.data.voc_xml import Annotation, AnnotationIndex
from utils.system.diagnostics import Diagnostic, Diagnostics, FileError
from utils.system.errors import UserError
from utils.system.text import BOM, read_lines, read_text, show

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
SIMILAR = 0.8  # share of letters that a misspelt class has in common with the one that is meant

Unknown = dict[str, list[tuple[Path, str]]]  # of each class that is not known the files and places that have it


@dataclass(frozen=True)
class Sample:
    """One image and its objects."""

    name: str  # the image's id in its split file
    image: Path
    size: tuple[int, int] | None  # height, width that the annotation states; (0, 0) where that cannot be
    boxes: np.ndarray  # (N, 4) float32 xyxy in pixels of the image
    labels: np.ndarray  # (N,) int64, index into the class names
    difficult: np.ndarray  # (N,) bool
    annotation: Path | None = None  # the XML file
    numbers: tuple[int, ...] = ()  # of each object its place among those of the annotation, from 1; empty: all of them

    @property
    def source(self) -> Path:
        """The file to name where an object is wrong."""
        return self.annotation or self.image

    def place(self, index: int) -> str:
        """The words for an object in a message."""
        return f"object {self.numbers[index] if self.numbers else index + 1}"


def load_classes(path: str | Path, diagnostics: Diagnostics | None = None) -> tuple[str, ...]:
    """Class names from a file with one name a line."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no class file {path}; write one with a class name on each line")
    names = read_lines(path)
    if not names:
        raise FileError(path, "is empty; write a class name on each line")
    if "" in names:
        raise FileError(path, "is blank; remove it", f"line {names.index('') + 1}")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise FileError(path, f"has the class {show(name)!r} {times} times; keep one")
    if len(names) > MAX_CLASSES:
        raise FileError(path, f"has {len(names):,} classes, but a network has at most {MAX_CLASSES:,}")
    if diagnostics and BOM in read_text(path):
        diagnostics.record_repair(path, "a byte-order mark before a class; it counts without", "line 1")
    return tuple(names)


def split_file(devkit: Path, name: str) -> Path:
    """The split file of a set such as VOC2007/trainval."""
    folder, _, split = name.rpartition("/")
    return devkit / folder / "ImageSets" / "Main" / f"{split}.txt"


def read_split(devkit: Path, name: str, diagnostics: Diagnostics | None = None) -> list[str]:
    """The image ids of a set such as VOC2007/trainval, each once."""
    diagnostics = diagnostics or Diagnostics(skips=False)
    if "/" not in name:
        raise UserError(f"the set {name!r} names no split; write it as folder/split, such as {name}/train")
    path = split_file(devkit, name)
    if not path.exists():
        raise UserError(
            f"there is no data set {name}: looked for {path}. Put a VOC data set under {devkit} "
            "(make its split files with tools/make_splits.py), or run `make demo` for one to try"
        )
    ids: dict[str, None] = {}
    for number, image_id in enumerate(read_lines(path), start=1):
        place = f"line {number}"
        with diagnostics.capture():
            if re.search(r"[/\\]|^\.\.?$", image_id):
                raise FileError(path, f"names the path {show(image_id)!r}; it must be an image's name alone", place)
            if image_id in ids:
                diagnostics.record_repair(path, "the same image again; it counts once", place)
            elif image_id:
                ids[image_id] = None
    if not ids:
        raise FileError(path, "is empty: it must name an image on each line; tools/make_splits.py can make the splits")
    return list(ids)


def load_samples(
    devkit: str | Path, sets: Sequence[str], class_names: Sequence[str], diagnostics: Diagnostics | None = None
) -> list[Sample]:
    """All samples of sets such as ("VOC2007/trainval", "VOC2012/trainval"), in the order of their split files.

    Raises UserError for whatever is missing or malformed, naming the file, unless `diagnostics` lets it go on; objects of
    unknown classes then have the label -1.
    """
    diagnostics = diagnostics or Diagnostics(skips=False)
    if not sets:
        raise UserError("no set was given; name one such as VOC2007/train")
    indices = {name: i for i, name in enumerate(class_names)}
    unknown: Unknown = defaultdict(list)
    samples = [sample for name in sets for sample in load_set(Path(devkit), name, indices, diagnostics, unknown)]
    if unknown and not diagnostics.collect:
        found = [f"{show(name)!r} ({len(unknown[name])}){hint(name, class_names)}" for name in sorted(unknown)]
        raise UserError(
            f"the annotations of {', '.join(sets)} have classes that are not to be detected: {', '.join(found)}; those "
            f"that are: {', '.join(class_names)}. Correct them, or take the class file or checkpoint that fits"
        )
    for name, places in unknown.items():
        reason = f"has the class {show(name)!r}{hint(name, class_names)}, which is not to be detected"
        diagnostics.extend(Diagnostic("error", str(file), place, reason) for file, place in places)
    return samples


def hint(name: str, class_names: Sequence[str]) -> str:
    """The class that is meant, where a name differs from it little or in its case alone."""
    folded = {known.casefold(): known for known in class_names}
    near = get_close_matches(name.casefold(), folded, 1, SIMILAR)
    return f" instead of {folded[near[0]]!r}" if near else ""


def load_set(
    devkit: Path, name: str, indices: Mapping[str, int], diagnostics: Diagnostics, unknown: Unknown
) -> list[Sample]:
    """The samples of one set, with the labels that `indices` gives; other classes are noted in `unknown`."""
    source, folder = split_file(devkit, name), devkit / name.rpartition("/")[0]
    ids = read_split(devkit, name, diagnostics)
    images = index_images(folder / "JPEGImages")
    annotations = AnnotationIndex(folder / "Annotations")
    samples = []
    for image_id in tqdm(ids, desc=f"annotations of {name}", leave=False, disable=None):
        with diagnostics.capture():
            stem, xml = spelled(image_id, images), spelled(f"{image_id}.xml", annotations.states)
            if stem != image_id or xml != f"{image_id}.xml":
                diagnostics.record_repair(
                    source, "writes an accent in another way than the file's name", show(image_id)
                )
            image = find_image(images, stem, folder, source)
            size, objects = annotations.read(xml, diagnostics)
            sample = make_sample(image_id, image, folder / "Annotations" / xml, (size, objects), indices)
            for i in np.flatnonzero(sample.labels < 0):
                unknown[objects[sample.numbers[i] - 1][0]].append((sample.source, sample.place(i)))
            samples.append(sample)
    annotations.save()
    return samples


def make_sample(image_id: str, image: Path, xml: Path, annotation: Annotation, indices: Mapping[str, int]) -> Sample:
    size, objects = annotation
    numbers = [number for number, item in enumerate(objects, start=1) if item]
    names, boxes, difficult = zip(*filter(None, objects), strict=True) if numbers else ((), (), ())
    return Sample(
        image_id,
        image,
        size,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array([indices.get(name, -1) for name in names], dtype=np.int64),
        np.array(difficult, dtype=bool),
        xml,
        tuple(numbers),
    )


def index_images(folder: Path) -> dict[str, list[Path]]:
    """Image files of a folder by their name without suffix."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"there is no image folder {folder} that can be read: {error.strerror}") from None
    images = defaultdict(list)
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            images[stem].append(folder / name)
    return images


def spelled(name: str, names: Container[str]) -> str:
    """A name as it stands among `names`, in either of the two ways in which Unicode can write accents."""
    return next((form for form in (name, normalize("NFC", name), normalize("NFD", name)) if form in names), name)


def find_image(images: Mapping[str, list[Path]], stem: str, folder: Path, source: Path) -> Path:
    found = images.get(stem, [])
    if not found:
        raise FileError(source, f"names {show(stem)!r}, but {folder / 'JPEGImages'} has no image of that name")
    if len(found) > 1:
        raise FileError(
            source,
            f"names {show(stem)!r}, which has several images, {', '.join(path.name for path in found)}: keep one",
        )
    return found[0]
