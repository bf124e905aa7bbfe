"""Read a whole data set and say what is in it and what is wrong: python tools/check_data.py --train-sets MySet/train

Everything that a training would stop at, leave out or repair, with file and object; objects by class and split; sizes;
near-duplicates across the splits; how well the anchors fit. As text, JSON and one page. The exit code is 0 if a
training with these settings would start, else 2.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.spec import ModelSpec
from utils.data.duplicates import near_duplicates
from utils.data.statistics import input_sides, inspect_all
from utils.data.voc import check_overlap, check_unique, load_classes, load_samples
from utils.detection.anchors import head_levels, load_anchors
from utils.reports.dataset_report import PAGE, TEXT, DataReport, Duplicate, Part
from utils.system.cli import run_script
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.errors import UserError, make_folder


@dataclass(frozen=True)
class Config:
    """Read a whole data set and say what is in it and what is wrong."""

    devkit: str = "VOCdevkit"  # folder of the data sets
    train_sets: tuple[str, ...] = ("VOC2007/train",)  # sets to train on, folder/split, any number
    val_sets: tuple[str, ...] = ("VOC2007/val",)  # sets to choose the best checkpoint on
    test_sets: tuple[str, ...] = ()  # sets to measure on at the end
    classes: str = "model_data/voc_classes.txt"  # file with a class name on each line
    anchors: str = "model_data/yolo_anchors.txt"  # file with six width, height pairs in input pixels
    input_size: tuple[int, int] = (416, 416)  # height and width of the network's input, for the anchors
    letterbox: bool = False  # keep the aspect ratio of images, for the anchors
    strict: bool = False  # what would be left out or repaired is an error
    out: str = "logs/check"  # folder for check.txt, check.json and check.html


def main(config: Config) -> DataReport:
    """Check, and write the report; returns it. Raises UserError when a training would not start."""
    report, out = check(config), Path(config.out)
    make_folder(out)
    report.write(out)
    print(f"{report.text()}\n\nwritten to {out}: look at {out / PAGE}")
    if report.stops:
        raise UserError(f"a training would not start: {report.stops} errors; they are in {out / TEXT}")
    return report


def check(config: Config) -> DataReport:
    """Read everything; raises UserError where nothing can be read for a mistake."""
    settings = Diagnostics(config.strict, collect=True)
    class_names = load_classes(config.classes, settings)
    parts = read_parts(config, class_names)
    anchors = torch.zeros(0, 2)
    with settings.capture():
        anchors = torch.cat([level.anchors for level in head_levels(ModelSpec((), load_anchors(config.anchors)))])
    sides = input_sides(parts["train"].samples, config.input_size, config.letterbox)
    return DataReport(class_names, parts, settings, find_duplicates(parts), sides, anchors)


def read_parts(config: Config, class_names: Sequence[str]) -> dict[str, Part]:
    """All that training and evaluation read, checked as they do."""
    parts, objects = {}, {}
    for name, sets in (("train", config.train_sets), ("val", config.val_sets), ("test", config.test_sets)):
        if sets:
            diagnostics = Diagnostics(config.strict, skips=name == "train", collect=True)
            samples = load_samples(config.devkit, sets, class_names, diagnostics)
            objects[name] = sum(len(sample.labels) for sample in samples)
            if name != "train":
                check_unique(samples, sets, diagnostics)
            found = inspect_all(samples, ", ".join(sets), diagnostics)
            parts[name] = Part(sets, found, diagnostics, stops=name != "test")
    if "train" not in parts:
        raise UserError("no set to train on was given; name one such as VOC2007/train")
    train, diagnostics = parts["train"], parts["train"].diagnostics
    if "val" in parts:
        check_overlap(train.samples, parts["val"].samples, diagnostics)
    diagnostics.check_skip_limit(len(train.found), objects["train"])
    if not train.samples:
        diagnostics.add(Diagnostic("error", ", ".join(config.train_sets), "", "has no image that can be used"))
    return parts


def find_duplicates(parts: dict[str, Part]) -> list[Duplicate]:
    """Near-duplicates in two parts, those of the same two parts together."""
    found = []
    for first, second in combinations(parts, 2):
        one, other = parts[first].usable, parts[second].usable
        for pair in near_duplicates([item.look for item in one], [item.look for item in other]):
            samples = one[pair.first].sample, other[pair.second].sample
            found.append(Duplicate((first, second), samples, pair.bits))
    return found


if __name__ == "__main__":
    run_script(main, Config)
