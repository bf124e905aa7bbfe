"""Write the split files of a VOC data set that has none: python tools/make_splits.py --folder VOCdevkit/VOC2007

Every image that has an annotation goes into test, val or train by the shares given, so that each has about its share
of every class; trainval is train and val. Images of one video, place or animal, which are much alike, stay together
when --groups says how their names begin. The same seed makes the same split. A split file with names in it is never
replaced.
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

from utils.data.voc import index_images
from utils.data.voc_xml import AnnotationIndex
from utils.system.cli import run_script
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError, check_range
from utils.system.files import atomic_write
from utils.system.text import read_lines

Counts = Mapping[str, Counter[str]]  # of an image's name: how many objects of each class it has


@dataclass(frozen=True)
class Config:
    """Write the split files of a VOC data set that has none."""

    folder: str = "VOCdevkit/VOC2007"  # the data set, with JPEGImages/ and Annotations/
    val: float = 0.1  # share of the images to validate on
    test: float = 0.1  # share of the images held out
    folds: int = 0  # instead of train and val, write train_1, val_1 ...: each image is validated on once; 0: none
    groups: str = ""  # regular expression; images that it finds the same text in stay together, such as ^[a-z]+_
    seed: int = 0  # the same seed makes the same split

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        check_range(self, 0, 1, "val", "test")
        check_range(self, 0, 1000, "folds")
        if self.folds == 1:
            raise UserError("folds is 1, which leaves none to train on; give 2 or more, or 0 for a single split")
        if self.folds and self.test >= 1:
            raise UserError("test takes all of the images, which leaves none to train on")
        if not self.folds and self.val + self.test >= 1:
            raise UserError(f"val and test take {self.val + self.test:g} of the images, which leaves none to train on")
        try:
            re.compile(self.groups)
        except re.error as error:
            raise UserError(f"groups is {self.groups!r}, which is no regular expression: {error}") from None


def main(config: Config) -> dict[str, list[str]]:
    """Write the splits; returns the image names of each."""
    folder = Path(config.folder)
    if not folder.is_dir():
        raise UserError(f"there is no data set {folder}")
    images = index_images(folder / "JPEGImages")
    names = sorted(name for name in images if (folder / "Annotations" / f"{name}.xml").is_file())
    if not names:
        raise UserError(f"{folder} has no image in JPEGImages/ with an annotation of its name in Annotations/")
    target = folder / "ImageSets" / "Main"
    counts = count_objects(folder / "Annotations", names)
    splits = split_names(names, config, counts)
    files = [target / f"{split}.txt" for split in splits]
    existing = [file.name for file in files if file.exists() and any(read_lines(file))]
    if existing:
        raise UserError(f"{target} already has {', '.join(existing)}; to split anew, remove them")
    target.mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        with atomic_write(target / f"{split}.txt") as file:
            file.write("".join(f"{name}\n" for name in members).encode())
    print(f"{target}: " + ", ".join(f"{split} {len(members)}" for split, members in splits.items()))
    left = len(images) - len(names)
    if left:
        print(f"{left} images without an annotation were left out")
    classes = set().union(*counts.values())
    for split, members in splits.items():
        absent = sorted(classes - set().union(*(counts[name] for name in members)))
        if absent:
            print(f"{split} has no object of {', '.join(absent)}")
    return splits


def count_objects(folder: Path, names: Sequence[str]) -> Counts:
    """What the annotations of some images hold; what cannot be read does not count, and a line says so."""
    annotations, counts, diagnostics = AnnotationIndex(folder), {}, Diagnostics(collect=True)
    for name in names:
        objects = []
        with diagnostics.capture():
            _, objects = annotations.read(f"{name}.xml", diagnostics)
        counts[name] = Counter(item[0] for item in objects if item)
    annotations.save()
    errors = [problem for problem in diagnostics.found if problem.kind == "error"]
    if errors:
        print(f"{len(errors)} errors in the annotations, whose objects do not count; the first: {errors[0]}")
    return counts


def split_names(names: Sequence[str], config: Config, counts: Counts | None = None) -> dict[str, list[str]]:
    """Names by split, each in sorted order; a share above 0 gets at least one name if there are enough."""
    groups, counts = group_names(names, config.groups), counts or {}
    val = 0 if config.folds else config.val
    wanted = [max(1, round(share * len(names))) if share else 0 for share in (config.test, val)]
    parts = max(1, config.folds) + sum(map(bool, wanted))
    if parts > len(groups) or sum(wanted) >= len(names):
        kind = "groups of images" if config.groups else "images"
        raise UserError(
            f"{len(groups)} {kind} are too few to split like this; add images, or set --val 0, --test 0 or fewer folds"
        )
    rng = random.Random(config.seed)
    test, val, train = share_out(groups, [*wanted, len(names) - sum(wanted)], counts, rng)
    splits = {"train": train, "val": val, "trainval": train + val, "test": test}
    if config.folds:
        splits = {"trainval": train, "test": test}
        inner = group_names(train, config.groups)
        folds = share_out(inner, [len(train) / config.folds] * config.folds, counts, rng)
        for number, fold in enumerate(folds, start=1):
            splits |= {f"train_{number}": sorted({*train} - {*fold}), f"val_{number}": fold}
    return {split: sorted(members) for split, members in splits.items() if members}


def group_names(names: Sequence[str], pattern: str) -> list[list[str]]:
    """The names that stay together: those in which `pattern` finds the same text, and each other one alone."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        found = re.search(pattern, name) if pattern else None
        text = (found[1] if found.re.groups else found[0]) if found else name
        groups.setdefault((text, found is not None), []).append(name)
    if pattern and not any(matched for _, matched in groups):
        raise UserError(f"groups is {pattern!r}, which finds nothing in any name, such as {names[0]!r}")
    return list(groups.values())


def share_out(
    groups: Sequence[list[str]], wanted: Sequence[float], counts: Counts, rng: random.Random
) -> list[list[str]]:
    """Groups of names into parts of about `wanted` names each, all with their share of every class.

    Iterative stratification (doi 10.1007/978-3-642-23808-6_10): the rarest class first, where most of it is missing.
    """
    contents = [sum((counts.get(name, Counter()) for name in group), Counter()) for group in groups]
    totals = sum(contents, Counter())
    share = [part / sum(wanted) for part in wanted]
    missing = [{name: total * part for name, total in totals.items()} for part in share]
    free = list(wanted)
    rarest = [min(content, key=totals.__getitem__, default=None) for content in contents]
    order = list(range(len(groups)))
    rng.shuffle(order)
    order.sort(key=lambda i: (totals[rarest[i]] if rarest[i] else inf, -len(groups[i])))
    parts: list[list[str]] = [[] for _ in wanted]
    asked = [part for part, number in enumerate(wanted) if number]
    for left, i in zip(range(len(order), 0, -1), order, strict=True):
        empty = [part for part in asked if not parts[part]]
        room = [part for part in asked if free[part] > len(groups[i]) - 0.5]
        candidates = empty if left <= len(empty) else room or asked
        best = max(candidates, key=lambda part: (missing[part].get(rarest[i], 0) if room else 0, free[part]))
        parts[best] += groups[i]
        free[best] -= len(groups[i])
        for name, number in contents[i].items():
            missing[best][name] -= number
    return parts


if __name__ == "__main__":
    run_script(main, Config)
