"""Datasets in VOC layout: class files, split files and the samples they list, checked as they are read."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from unicodedata import normalize

import numpy as np
from tqdm import tqdm

from nets.spec import MAX_CLASSES
from utils.data.image_io import IMAGE_SUFFIXES
from utils.data.voc_xml import read_voc_xml
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.errors import FileError, UserError
from utils.system.files import read_lines, read_text
from utils.system.text import BOM, printable

MIN_SIMILARITY = 0.8  # minimum similarity, from 0 to 1, between a misspelled class name and the suggested one

UnknownClasses = dict[str, list[tuple[Path, str]]]  # class name -> files and places where it occurs


@dataclass(frozen=True)
class Sample:
    """An image and its objects."""

    name: str  # the image's id in its split file
    image: Path
    size: tuple[int, int] | None  # height, width as the annotation states them; (0, 0) if invalid, None if missing
    boxes: np.ndarray  # (N, 4) float32 xyxy in pixels of the image
    labels: np.ndarray  # (N,) int64, index into the class names
    difficult: np.ndarray  # (N,) bool
    annotation: Path | None = None  # the XML file
    numbers: tuple[int, ...] = ()  # position of each object in the annotation, counted from 1; empty: 1 to N

    @property
    def source(self) -> Path:
        """The file to name in messages about an object."""
        return self.annotation or self.image

    def number(self, index: int) -> int:
        """The position of an object in its annotation, counted from 1."""
        return self.numbers[index] if self.numbers else index + 1

    def place(self, index: int) -> str:
        """How messages refer to an object."""
        return f"object {self.number(index)}"


def load_classes(path: str | Path, diagnostics: Diagnostics | None = None) -> tuple[str, ...]:
    """The class names in a file with one name per line; raises UserError for a file that is missing or invalid."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"the class file {path} does not exist; write one class name per line to it")
    names = read_lines(path)
    if not names:
        raise FileError(path, "is empty; write one class name per line")
    if "" in names:
        raise FileError(path, "is blank; remove it", f"line {names.index('') + 1}")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise FileError(path, f"lists the class {printable(name)!r} {times} times; keep one")
    if len(names) > MAX_CLASSES:
        raise FileError(path, f"lists {len(names):,} classes, but at most {MAX_CLASSES:,} are supported")
    if diagnostics and BOM in read_text(path):
        diagnostics.record_repair(path, "has a byte-order mark, which is ignored")
    return tuple(names)


def split_file(devkit: Path, name: str) -> Path:
    """The split file of a set such as VOC2007/trainval."""
    folder, _, split = name.rpartition("/")
    return devkit / folder / "ImageSets" / "Main" / f"{split}.txt"


def read_split(devkit: Path, name: str, diagnostics: Diagnostics | None = None) -> list[str]:
    """The image ids of a set such as VOC2007/trainval, without repetitions."""
    diagnostics = diagnostics or Diagnostics(skips=False)
    if "/" not in name:
        raise UserError(f"the set {name!r} does not name a split; write folder/split, such as {name}/train")
    path = split_file(devkit, name)
    if not path.exists():
        raise UserError(
            f"the set {name} does not exist: looked for {path}. Put a VOC dataset in {devkit} (tools/make_splits.py "
            "can make its split files), or try the demo dataset with `make demo`"
        )
    ids: dict[str, None] = {}
    for number, image_id in enumerate(read_lines(path), start=1):
        place = f"line {number}"
        with diagnostics.capture():
            if re.search(r"[/\\]|^\.\.?$", image_id):
                raise FileError(path, f"is the path {printable(image_id)!r}, but must be the name of an image", place)
            if image_id in ids:
                diagnostics.record_repair(path, "repeats an earlier image and is ignored", place)
            elif image_id:
                ids[image_id] = None
    if not ids:
        raise FileError(path, "is empty; it must list one image per line (tools/make_splits.py can make the splits)")
    return list(ids)


def load_samples(
    devkit: str | Path, sets: Sequence[str], class_names: Sequence[str], diagnostics: Diagnostics | None = None
) -> list[Sample]:
    """All samples of sets such as ("VOC2007/trainval", "VOC2012/trainval"), in the order of their split files.

    Raises UserError for any error, unless `diagnostics` collects them; objects of unknown classes then have label -1.
    """
    diagnostics = diagnostics or Diagnostics(skips=False)
    if not sets:
        raise UserError("no dataset was given; name one or more sets such as VOC2007/train")
    indices = {name: i for i, name in enumerate(class_names)}
    unknown: UnknownClasses = defaultdict(list)
    samples = [sample for name in sets for sample in load_set(Path(devkit), name, indices, diagnostics, unknown)]
    if unknown and not diagnostics.collect:
        found = [f"{printable(name)!r} ({len(unknown[name])}{suggest(name, class_names)})" for name in sorted(unknown)]
        raise UserError(
            f"the annotations of {', '.join(sets)} have unknown classes: {', '.join(found)}; the known classes are "
            f"{', '.join(class_names)}. Correct the annotations, or use a class file or checkpoint that matches"
        )
    for name, places in unknown.items():
        reason = f"has the unknown class {printable(name)!r}{suggest(name, class_names)}"
        diagnostics.extend(Diagnostic("error", str(file), place, reason) for file, place in places)
    return samples


def suggest(name: str, class_names: Sequence[str]) -> str:
    """A hint at the class that is probably meant, if one has a similar name."""
    folded = {known.casefold(): known for known in class_names}
    similar = get_close_matches(name.casefold(), folded, 1, MIN_SIMILARITY)
    return f"; did you mean {folded[similar[0]]!r}?" if similar else ""


def load_set(
    devkit: Path, name: str, indices: Mapping[str, int], diagnostics: Diagnostics, unknown: UnknownClasses
) -> list[Sample]:
    """The samples of one set, with the labels in `indices`; other classes are added to `unknown`."""
    source, folder = split_file(devkit, name), devkit / name.rpartition("/")[0]
    ids = read_split(devkit, name, diagnostics)
    images, annotations = index_images(folder / "JPEGImages"), folder / "Annotations"
    samples = []
    for image_id in tqdm(ids, desc=f"annotations of {name}", leave=False, disable=None):
        with diagnostics.capture():
            stem = match_spelling(image_id, images.__contains__)
            annotation_stem = match_spelling(image_id, lambda form: os.path.lexists(annotations / f"{form}.xml"))
            if stem != image_id or annotation_stem != image_id:
                diagnostics.record_repair(source, "encodes accents differently than the file", printable(image_id))
            image = single_image(images, stem, source)
            path = annotations / f"{annotation_stem}.xml"
            size, objects = read_voc_xml(path, diagnostics)
            for number, item in objects.items():
                if item.class_name not in indices:
                    unknown[item.class_name].append((path, f"object {number}"))
            boxes = np.array([item.box for item in objects.values()], dtype=np.float32).reshape(-1, 4)
            labels = np.array([indices.get(item.class_name, -1) for item in objects.values()], dtype=np.int64)
            difficult = np.array([item.difficult for item in objects.values()], dtype=bool)
            samples.append(Sample(image_id, image, size, boxes, labels, difficult, path, tuple(objects)))
    return samples


def index_images(folder: Path) -> dict[str, list[Path]]:
    """The image files in a folder by their names without suffix."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot read the image folder {folder}: {error.strerror}") from None
    images = defaultdict(list)
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            images[stem].append(folder / name)
    return images


def match_spelling(name: str, exists: Callable[[str], bool]) -> str:
    """The Unicode form of a name, NFC or NFD, that exists; otherwise the name itself."""
    return next((form for form in (name, normalize("NFC", name), normalize("NFD", name)) if exists(form)), name)


def single_image(images: Mapping[str, Sequence[Path]], stem: str, source: Path) -> Path:
    """The image named `stem`; raises FileError about the file `source` unless there is exactly one."""
    found = images.get(stem, ())
    if len(found) != 1:
        names = f"{', '.join(path.name for path in found)}; keep one" if found else "none"
        raise FileError(source, f"needs exactly one image named {printable(stem)!r}, but found {names}")
    return found[0]


def check_unique(samples: Sequence[Sample], sets: Sequence[str], diagnostics: Diagnostics) -> None:
    """Add an error if `sets` list an image more than once, since an evaluation would count it more than once."""
    counts = Counter(os.path.realpath(sample.image) for sample in samples)
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        images = "1 image" if len(repeated) == 1 else f"{len(repeated)} images"
        verb = "lists" if len(sets) == 1 else "list"
        reason = f"{verb} {images} more than once, such as {repeated[0]}; each must be counted once"
        diagnostics.add(Diagnostic("error", ", ".join(sets), "", reason))


def check_overlap(train: Sequence[Sample], val: Sequence[Sample], diagnostics: Diagnostics) -> None:
    """Add an error if an image is in both the training and the validation sets, which would invalidate validation."""
    known = {os.path.realpath(sample.image) for sample in train}
    shared = [sample for sample in val if os.path.realpath(sample.image) in known]
    if shared:
        others = len(shared) - 1
        more = f", and so {'is 1 other' if others == 1 else f'are {others} others'}" if others else ""
        reason = f"is in both the training and the validation sets{more}; tools/make_splits.py can make new splits"
        diagnostics.add(Diagnostic("error", str(shared[0].image), "", reason))
