"""Evaluate checkpoints on a split: python eval.py --weights logs/RUN/best.safetensors --sets VOC2007/test

Edit the constants of `Config`, or pass them as flags. Several checkpoints are compared with each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import supervision as sv
import torch

from utils.data.cache import PLACES, ImageCache, build_cache
from utils.data.coco_json import CocoDataset, load_coco_samples
from utils.data.voc import Sample, check_unique, load_classes, load_samples
from utils.detection.nms import Thresholds
from utils.evaluation.coco import RESULTS, write_results
from utils.evaluation.label_errors import MISSED_CONFIDENCE
from utils.evaluation.metrics import Evaluation, evaluate
from utils.inference.detector import Detector
from utils.reports.evaluation_report import PAGE, EvaluationReport, format_metrics, write_checkpoint_comparison
from utils.system.cli import run_script
from utils.system.device import choose_device, choose_precision, keep_freed_memory
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup, join_process_group
from utils.system.errors import UserError, check_choice, check_range, make_folder
from utils.weights.checkpoint import find_checkpoint


@dataclass(frozen=True)
class Config:
    """Evaluate checkpoints on a split."""

    weights: tuple[str, ...] = ()  # checkpoints of train.py, or run folders; empty: the newest run under logs/
    devkit: str = "VOCdevkit"  # folder of the datasets
    sets: tuple[str, ...] = ("VOC2007/test",)  # sets to evaluate on, each folder/split
    coco: str = ""  # COCO JSON file to evaluate on instead of sets, such as annotations/instances_val2017.json
    images: str = ""  # folder of the images of the COCO file
    out: str = ""  # output folder; empty: a folder in eval/ or compare/ beside the (first) checkpoint
    classes: str = ""  # class file that the checkpoints must match; empty: do not check
    confidence: float = 0.001  # minimum confidence of a detection; low, to obtain the whole precision-recall curve
    nms_iou: float = 0.5  # NMS removes boxes of the same class that overlap more than this
    batch_size: int = 16  # images per batch
    cache: str = "auto"  # where to keep decoded images: auto, device, ram or disk
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "fp32"  # of the network: fp32, bf16, fp16 or auto

    def __post_init__(self) -> None:
        """Raise UserError for an invalid value."""
        check_range(self, 1, inf, "batch_size")
        check_range(self, 0, MISSED_CONFIDENCE, "confidence")  # a higher one would hide thresholds and label errors
        check_range(self, 0, 1, "nms_iou")
        check_choice(self, "cache", PLACES)
        if bool(self.coco) != bool(self.images):
            raise UserError("coco and images must be given together: the JSON file and the folder of its images")


@dataclass(frozen=True)
class Split:
    """The images to evaluate on."""

    source: str  # folder of the datasets, or of the COCO images
    sets: list[str]  # names of the sets, or the COCO file
    samples: list[Sample]
    dataset: CocoDataset | None  # ground truth of the COCO file
    diagnostics: Diagnostics


def main(config: Config) -> dict[str, Any]:
    """Evaluate the checkpoints, write reports and print the metrics; returns those of the first checkpoint.

    Under torchrun, the processes divide the images among themselves.
    """
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with join_process_group(device) as group:
        paths = [find_checkpoint(name) for name in config.weights or [""]]
        detectors = load_detectors(config, paths, device)
        split = load_split(config, detectors[0].spec.class_names)
        if len(paths) > 1 and all(sample.difficult.all() for sample in split.samples):
            raise UserError(f"{', '.join(split.sets)} contains no objects, so checkpoints cannot be compared on it")
        folders = make_folders(config, split, paths) if group.is_main else paths
        caches = build_caches(config, split, detectors, device, group)
        evaluations = []
        for path, detector, cache, folder in zip(paths, detectors, caches, folders, strict=True):
            detections = detector.detect_cached(cache, config.batch_size, group)
            if group.is_main:
                evaluations.append(write_evaluation(folder, path, split, detector, cache, detections))
        if group.is_main and len(paths) > 1:
            out = folders[0].parent
            print(f"{write_checkpoint_comparison(out, paths, evaluations)}\n\nwritten to {out}")
        return group.broadcast(evaluations[0].metrics if evaluations and evaluations[0] else {})


def load_detectors(config: Config, paths: Sequence[Path], device: torch.device) -> list[Detector]:
    """Load the checkpoints; raises UserError unless they have the same classes."""
    dtype = choose_precision(config.precision, device)
    thresholds = Thresholds(config.confidence, nms_iou=config.nms_iou)
    detectors = [Detector.load(path, device, dtype, thresholds) for path in paths]
    first = detectors[0].spec.class_names
    for path, detector in zip(paths, detectors, strict=True):
        names = detector.spec.class_names
        if names != first:
            raise UserError(
                f"{path} detects {', '.join(names)}, but {paths[0]} detects {', '.join(first)}; only checkpoints with "
                "the same classes can be compared"
            )
        if config.classes:
            detector.expect_classes(load_classes(config.classes), config.classes)
    return detectors


def load_split(config: Config, class_names: tuple[str, ...]) -> Split:
    """Load the annotations; raises UserError for invalid ones, since skipping images would raise AP."""
    diagnostics = Diagnostics(skips=False)
    if config.coco:
        samples, dataset = load_coco_samples(config.coco, config.images, class_names)
        split = Split(config.images, [config.coco], samples, dataset, diagnostics)
    else:
        samples = load_samples(config.devkit, config.sets, class_names, diagnostics)
        split = Split(config.devkit, list(config.sets), samples, None, diagnostics)
    check_unique(samples, split.sets, diagnostics)
    return split


def make_folders(config: Config, split: Split, paths: Sequence[Path]) -> list[Path]:
    """Make an output folder for each checkpoint; for several, they are subfolders of a common one."""
    name = "_".join(Path(name).stem if name.endswith(".json") else name.replace("/", "_") for name in split.sets)
    out = Path(config.out or paths[0].parent / ("compare" if len(paths) > 1 else "eval") / name)
    names = [f"{i}_{path.parent.name}_{path.stem}" for i, path in enumerate(paths, start=1)]
    folders = [out / name for name in names] if len(paths) > 1 else [out]
    for folder in folders:
        make_folder(folder)
    return folders


def build_caches(
    config: Config, split: Split, detectors: Sequence[Detector], device: torch.device, group: ProcessGroup
) -> list[ImageCache]:
    """Decode the images for each detector; detectors with the same input size and letterboxing share a cache."""
    caches: dict[tuple[object, ...], ImageCache] = {}
    for spec in (detector.spec for detector in detectors):
        if (spec.input_size, spec.letterbox) not in caches:
            diagnostics = Diagnostics(skips=False) if caches else split.diagnostics  # report each problem once
            cache = build_cache(split.samples, spec, device, config.cache, group, diagnostics)
            caches[spec.input_size, spec.letterbox] = cache
    split.diagnostics.print_summary(", ".join(split.sets), group.print_once)
    return [caches[detector.spec.input_size, detector.spec.letterbox] for detector in detectors]


def write_evaluation(
    folder: Path, path: Path, split: Split, detector: Detector, cache: ImageCache, detections: Sequence[sv.Detections]
) -> Evaluation | None:
    """Compute the metrics, write the report and print the table; without annotations, write the COCO results only."""
    write_results(folder, split.dataset, detections)
    if split.dataset and not split.dataset.truth["annotations"]:
        print(f"{split.sets[0]} has no annotations, so there are no metrics; the detections are in {folder / RESULTS}")
        return None
    evaluation = evaluate(cache.samples, detections, cache.sizes, detector.spec.class_names, split.dataset)
    EvaluationReport(path, split.source, split.sets, detector, cache, detections, evaluation).write(folder)
    print(f"{path} on {', '.join(split.sets)}, {len(cache)} images\n\n{format_metrics(evaluation.metrics)}\n")
    print(f"report: {folder / PAGE}\n")
    return evaluation


if __name__ == "__main__":
    run_script(main, Config)
