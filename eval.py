"""Measure checkpoints on a split: python eval.py --weights logs/RUN/best.safetensors --sets VOC2007/test

Change the constants of `Config`, or give them as flags. Several checkpoints are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch

from utils.data.cache import PLACES, ImageCache, build_cache
from utils.data.coco_json import CocoDataset, load_coco_samples
from utils.data.voc import Sample, check_unique, load_classes, load_samples
from utils.detection.nms import Thresholds
from utils.evaluation.coco import RESULTS, write_results
from utils.evaluation.label_errors import BARELY
from utils.evaluation.metrics import Evaluation, evaluate
from utils.inference.detector import Detector
from utils.reports.evaluation_report import Report, compare, metrics_table, write_comparison
from utils.system.cli import run_script
from utils.system.device import choose_device, choose_precision, keep_freed_memory
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup, join_process_group
from utils.system.errors import UserError, check_choice, check_range, make_folder
from utils.weights.checkpoint import find_checkpoint


@dataclass(frozen=True)
class Config:
    """Measure checkpoints on a split."""

    weights: tuple[str, ...] = ()  # checkpoints of train.py, or folders of runs; empty: the newest run under logs/
    devkit: str = "VOCdevkit"  # folder of the data sets
    sets: tuple[str, ...] = ("VOC2007/test",)  # sets to measure on, folder/split, any number
    coco: str = ""  # COCO's JSON to measure on instead of sets, such as annotations/instances_val2017.json
    images: str = ""  # with coco: folder of its images
    out: str = ""  # folder for the results; empty: under eval/ beside the checkpoint, or compare/ beside the first
    classes: str = ""  # class file to compare with the checkpoint's classes; empty: those of the checkpoint
    confidence: float = 0.001  # least score of a detection; low, so that the whole curve is seen
    nms_iou: float = 0.5  # two boxes of a class that overlap more are one object
    batch_size: int = 16  # images at a time
    cache: str = "auto"  # where the decoded images are: auto, device, ram or disk
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "fp32"  # of the network: fp32, bf16, fp16 or auto

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        check_range(self, 1, inf, "batch_size")
        check_range(self, 0, BARELY, "confidence")  # from a higher one neither thresholds nor lost objects can be told
        check_range(self, 0, 1, "nms_iou")
        check_choice(self, "cache", PLACES)
        if bool(self.coco) != bool(self.images):
            raise UserError("coco and images go together: the JSON file, and the folder of its images")


def main(config: Config) -> dict[str, Any]:
    """Measure, print the tables, write the reports; returns the metrics of the first checkpoint.

    Processes of torchrun share the images.
    """
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with join_process_group(device) as group:
        found = measure(config, device, group)
        return group.broadcast(found[0].metrics if found else {})


def load_detectors(config: Config, paths: Sequence[Path], device: torch.device) -> list[Detector]:
    """The checkpoints, which must know the same classes."""
    dtype = choose_precision(config.precision, device)
    thresholds = Thresholds(config.confidence, nms_iou=config.nms_iou)
    detectors = [Detector.load(path, device, dtype, thresholds) for path in paths]
    first = detectors[0].spec.class_names
    for path, detector in zip(paths, detectors, strict=True):
        own = detector.spec.class_names
        if own != first:
            raise UserError(
                f"{path} detects {', '.join(own)}, but {paths[0]} detects {', '.join(first)}; only checkpoints of the "
                "same classes can be compared"
            )
        if config.classes:
            detector.expect_classes(load_classes(config.classes), config.classes)
    return detectors


def load_split(
    config: Config, class_names: tuple[str, ...], diagnostics: Diagnostics
) -> tuple[list[Sample], CocoDataset | None, list[str]]:
    """The samples to measure on, what COCO's JSON says of them, and the names of the sets."""
    sets = [config.coco] if config.coco else list(config.sets)
    if config.coco:
        samples, dataset = load_coco_samples(config.coco, config.images, class_names)
    else:
        samples, dataset = load_samples(config.devkit, config.sets, class_names, diagnostics), None
    check_unique(samples, sets, diagnostics)
    return samples, dataset, sets


def sets_name(name: str) -> str:
    """A set, or a COCO file, as part of a folder's name."""
    return Path(name).stem if name.endswith(".json") else name.replace("/", "_")


def measure(config: Config, device: torch.device, group: ProcessGroup) -> list[Evaluation]:
    """Every checkpoint: its report written, its table printed; then the comparison. Only the first process has them."""
    paths = [find_checkpoint(name) for name in config.weights or [""]]
    several = len(paths) > 1
    detectors = load_detectors(config, paths, device)
    diagnostics = Diagnostics(skips=False)  # a missing image would make the figures better
    samples, dataset, sets = load_split(config, detectors[0].spec.class_names, diagnostics)
    part = paths[0].parent / ("compare" if several else "eval")
    out = Path(config.out) if config.out else part / "_".join(sets_name(name) for name in sets)
    if several and all(sample.difficult.all() for sample in samples):
        raise UserError(f"{', '.join(sets)} has no objects, so that there is nothing to compare checkpoints by")
    if group.is_main:
        make_folder(out)
    caches: dict[tuple[object, ...], ImageCache] = {}
    found = []
    for i, (path, detector) in enumerate(zip(paths, detectors, strict=True), start=1):
        spec = detector.spec
        fitted = spec.input_size, spec.letterbox
        if fitted not in caches:
            again = replace(diagnostics, found=[])  # what the first cache has told
            caches[fitted] = build_cache(samples, spec, device, config.cache, group, again if caches else diagnostics)
        detections = detector.detect_cached(caches[fitted], config.batch_size, group)
        if not group.is_main:
            continue
        evaluation = evaluate(caches[fitted].samples, detections, caches[fitted].sizes, spec.class_names, dataset)
        folder = out / f"{i}_{path.parent.name}_{path.stem}" if several else out
        make_folder(folder)
        write_results(folder, dataset, detections)
        if dataset and not dataset.truth["annotations"]:
            print(f"{config.coco} has no annotations to measure on; detections are in {folder / RESULTS}")
            continue
        source = config.images or config.devkit
        Report(path, source, sets, detector, caches[fitted], detections, evaluation).write(folder)
        print(f"{path} on {', '.join(sets)}, {len(samples)} images\n\n{metrics_table(evaluation.metrics)}\n")
        print(f"written to {folder}: look at {folder / 'report.html'}" + (f"; {RESULTS}" if dataset else "") + "\n")
        found.append(evaluation)
    diagnostics.print_summary(", ".join(sets), group.print_once)
    if several and group.is_main:
        rows = compare([str(path) for path in paths], found)
        print(f"{write_comparison(out, rows, len(samples))}\n\nwritten to {out}")
    return found


if __name__ == "__main__":
    run_script(main, Config)
