"""Check a dataset and report its statistics: python tools/check_data.py --train-sets MySet/train --val-sets MySet/val

Lists everything that training would stop at, skip or repair, with file and object; objects per class and split; sizes;
near-duplicates across the splits; and how well the anchors fit. Writes text, JSON and an HTML page. Exits with 0 if
training with these settings would start, otherwise with 2.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.spec import ModelSpec
from utils.data.duplicates import near_duplicates
from utils.data.statistics import input_sides, inspect_samples
from utils.data.voc import check_overlap, check_unique, load_classes, load_samples
from utils.detection.anchors import head_levels, load_anchors
from utils.reports.dataset_report import PAGE, TEXT, DatasetReport, Duplicate, Part
from utils.system.cli import INPUT_SIZE, run_script
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.errors import UserError
from utils.system.files import make_folder


@dataclass(frozen=True)
class Config:
    """Check a dataset and report its statistics."""

    devkit: str = "VOCdevkit"  # folder with the datasets
    train_sets: tuple[str, ...] = ("VOC2007/train",)  # one or more training sets, as folder/split
    val_sets: tuple[str, ...] = ("VOC2007/val",)  # validation sets
    test_sets: tuple[str, ...] = ()  # test sets
    classes: str = "model_data/voc_classes.txt"  # file with one class name per line
    anchors: str = "model_data/yolo_anchors.txt"  # file with six width, height pairs in input pixels
    input_size: Annotated[tuple[int, int], INPUT_SIZE] = (416, 416)  # input height and width, multiples of 32
    letterbox: bool = False  # keep the aspect ratio of images, as in training with --letterbox
    strict: bool = False  # treat everything that would be skipped or repaired as an error
    out: str = "logs/check"  # folder for check.txt, check.json and check.html


def main(config: Config) -> DatasetReport:
    """Check the data and write the report; raises UserError if training would not start."""
    report, out = check(config), Path(config.out)
    make_folder(out)
    report.write(out)
    print(f"{report.format_text()}\n\nwrote the report to {out}; open {out / PAGE} in a browser")
    if report.stops:
        raise UserError(f"training would not start (errors: {report.stops}, listed in {out / TEXT})")
    return report


def check(config: Config) -> DatasetReport:
    """Read everything; raises UserError for an error that prevents further checks."""
    settings = Diagnostics(config.strict, collect=True)
    class_names = load_classes(config.classes, settings)
    parts = read_parts(config, class_names)
    anchors = torch.zeros(0, 2)
    with settings.capture():
        anchors = torch.cat([level.anchors for level in head_levels(ModelSpec((), load_anchors(config.anchors)))])
    sides = input_sides(parts["train"].samples, config.input_size, config.letterbox)
    return DatasetReport(class_names, parts, settings, find_duplicates(parts), sides, anchors)


def read_parts(config: Config, class_names: Sequence[str]) -> dict[str, Part]:
    """Read the data as training and evaluation do, with the same checks."""
    parts, objects = {}, {}
    for name, sets in (("train", config.train_sets), ("val", config.val_sets), ("test", config.test_sets)):
        if sets:
            diagnostics = Diagnostics(config.strict, skips=name == "train", collect=True)
            samples = load_samples(config.devkit, sets, class_names, diagnostics)
            objects[name] = sum(len(sample.labels) for sample in samples)
            if name != "train":
                check_unique(samples, sets, diagnostics)
            inspected = inspect_samples(samples, ", ".join(sets), diagnostics)
            parts[name] = Part(sets, inspected, diagnostics, stops=name != "test")
    if "train" not in parts:
        raise UserError("no training set was given; specify one, such as VOC2007/train")
    train, diagnostics = parts["train"], parts["train"].diagnostics
    if "val" in parts:
        check_overlap(train.samples, parts["val"].samples, diagnostics)
    diagnostics.check_skip_limit(len(train.found), objects["train"])
    if not train.samples:
        diagnostics.add(Diagnostic("error", ", ".join(config.train_sets), "", "has no usable images"))
    return parts


def find_duplicates(parts: dict[str, Part]) -> list[Duplicate]:
    """Near-duplicates between each pair of parts."""
    found = []
    for first, second in combinations(parts, 2):
        one, other = parts[first].usable, parts[second].usable
        for pair in near_duplicates([item.image_hash for item in one], [item.image_hash for item in other]):
            samples = one[pair.first].sample, other[pair.second].sample
            found.append(Duplicate((first, second), samples, pair.bits))
    return found


if __name__ == "__main__":
    run_script(main, Config)
