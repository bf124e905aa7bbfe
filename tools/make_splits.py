"""Write split files for a VOC dataset that has none: python tools/make_splits.py --folder VOCdevkit/VOC2007

Assigns every annotated image to test, val or train, so that each split has about its share of every class; trainval is
train and val together. With --groups, similar images (frames of one video, photos of one place) stay in one split. The
same seed produces the same splits. Existing split files are replaced only if they are empty.
"""

import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data.label_writers import write_lines
from utils.data.voc import index_images
from utils.data.voc_xml import read_voc_xml
from utils.system.cli import run_script
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError, check_range
from utils.system.files import read_lines

Counts = Mapping[str, Counter[str]]  # image name -> number of objects per class


@dataclass(frozen=True)
class Config:
    """Write split files for a VOC dataset that has none."""

    folder: str = "VOCdevkit/VOC2007"  # dataset with JPEGImages/ and Annotations/
    val: float = 0.1  # fraction of the images for validation
    test: float = 0.1  # fraction of the images held out for testing
    folds: int = 0  # cross-validation: write train_1, val_1, ... instead of train and val; 0: off
    groups: str = ""  # regular expression such as ^[a-z]+_; images with the same match stay together
    seed: int = 0  # random seed

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "val", "test")
        check_range(self, 0, 1000, "folds")
        if self.folds == 1:
            raise UserError("folds is 1, which leaves no images to train on; use 2 or more, or 0 for a single split")
        if self.test + (0 if self.folds else self.val) >= 1:
            raise UserError("test and val take all images, which leaves none to train on")
        try:
            re.compile(self.groups)
        except re.error as error:
            raise UserError(f"groups is {self.groups!r}, which is not a regular expression: {error}") from None


def main(config: Config) -> dict[str, list[str]]:
    """Write the splits; returns the image names in each."""
    folder = Path(config.folder)
    if not folder.is_dir():
        raise UserError(f"the dataset {folder} does not exist")
    images = index_images(folder / "JPEGImages")
    names = sorted(name for name in images if (folder / "Annotations" / f"{name}.xml").is_file())
    if not names:
        raise UserError(f"{folder} has no image in JPEGImages/ with an annotation of the same name in Annotations/")
    target = folder / "ImageSets" / "Main"
    counts = count_objects(folder / "Annotations", names)
    splits = split_names(names, config, counts)
    files = [target / f"{split}.txt" for split in splits]
    existing = [file.name for file in files if file.exists() and any(read_lines(file))]
    if existing:
        raise UserError(f"{target} already has {', '.join(existing)}; remove them to make new splits")
    for split, members in splits.items():
        write_lines(target / f"{split}.txt", members)
    print(f"{target}: " + ", ".join(f"{split} {len(members)}" for split, members in splits.items()))
    if len(images) > len(names):
        print(f"left out {len(images) - len(names)} images without an annotation")
    classes = set().union(*counts.values())
    for split, members in splits.items():
        absent = sorted(classes - set().union(*(counts[name] for name in members)))
        if absent:
            print(f"{split} has no objects of {', '.join(absent)}")
    return splits


def count_objects(folder: Path, names: Sequence[str]) -> Counts:
    """The objects per class of each image; prints a note about objects that cannot be read."""
    counts, diagnostics = {}, Diagnostics(collect=True)
    for name in names:
        counts[name] = Counter()
        with diagnostics.capture():
            annotation = read_voc_xml(folder / f"{name}.xml", diagnostics)
            counts[name] = Counter(item.class_name for item in annotation.objects.values())
    errors = [item for item in diagnostics.found if item.kind == "error"]
    if errors:
        print(f"{len(errors)} errors in the annotations; the affected objects are not counted. The first: {errors[0]}")
    return counts


def split_names(names: Sequence[str], config: Config, counts: Counts | None = None) -> dict[str, list[str]]:
    """The sorted names in each split; every split with a fraction above 0 has at least one."""
    groups, counts = group_names(names, config.groups), counts or {}
    val = 0 if config.folds else config.val
    wanted = [max(1, round(fraction * len(names))) if fraction else 0 for fraction in (config.test, val)]
    parts = max(1, config.folds) + sum(map(bool, wanted))
    if parts > len(groups) or sum(wanted) >= len(names):
        kind = "groups of images" if config.groups else "images"
        raise UserError(
            f"{len(groups)} {kind} are too few for these splits; add images, or use --val 0, --test 0 or fewer folds"
        )
    rng = random.Random(config.seed)
    test, val, train = stratify(groups, [*wanted, len(names) - sum(wanted)], counts, rng)
    splits = {"train": train, "val": val, "trainval": train + val, "test": test}
    if config.folds:
        splits = {"trainval": train, "test": test}
        inner = group_names(train, config.groups)
        folds = stratify(inner, [len(train) / config.folds] * config.folds, counts, rng)
        for number, fold in enumerate(folds, start=1):
            splits |= {f"train_{number}": sorted({*train} - {*fold}), f"val_{number}": fold}
    return {split: sorted(members) for split, members in splits.items() if members}


def group_names(names: Sequence[str], pattern: str) -> list[list[str]]:
    """Group names by the text that `pattern` matches in them; a name without a match forms its own group."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        match = re.search(pattern, name) if pattern else None
        text = (match[1] if match.re.groups else match[0]) if match else name
        groups.setdefault((text, match is not None), []).append(name)
    if pattern and not any(matched for _, matched in groups):
        raise UserError(f"groups is {pattern!r}, which does not match any image name, such as {names[0]!r}")
    return list(groups.values())


def stratify(
    groups: Sequence[list[str]], wanted: Sequence[float], counts: Counts, rng: random.Random
) -> list[list[str]]:
    """Distribute groups of names over parts of about `wanted` names, each with its share of every class.

    Iterative stratification (doi 10.1007/978-3-642-23808-6_10): groups with the rarest class first, each to the part
    that lacks the most objects of that class.
    """
    contents = [sum((counts.get(name, Counter()) for name in group), Counter()) for group in groups]
    totals = sum(contents, Counter())
    fractions = [size / sum(wanted) for size in wanted]
    missing = [{name: total * fraction for name, total in totals.items()} for fraction in fractions]
    free = list(wanted)
    rarest = [min(content, key=totals.__getitem__, default=None) for content in contents]
    order = list(range(len(groups)))
    rng.shuffle(order)
    order.sort(key=lambda i: (totals[rarest[i]] if rarest[i] else inf, -len(groups[i])))
    parts: list[list[str]] = [[] for _ in wanted]
    used = [part for part, size in enumerate(wanted) if size]
    for left, i in zip(range(len(order), 0, -1), order, strict=True):
        empty = [part for part in used if not parts[part]]
        room = [part for part in used if free[part] > len(groups[i]) - 0.5]
        candidates = empty if left <= len(empty) else room or used
        best = max(candidates, key=lambda part: (missing[part].get(rarest[i], 0) if room else 0, free[part]))
        parts[best] += groups[i]
        free[best] -= len(groups[i])
        for name, number in contents[i].items():
            missing[best][name] -= number
    return parts


if __name__ == "__main__":
    run_script(main, Config)
