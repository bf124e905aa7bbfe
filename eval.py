"""Evaluate checkpoints on a split: python eval.py --weights logs/RUN/best.safetensors --sets VOC2007/test

Change the defaults in `Config`, or override them on the command line. Two or more checkpoints are also compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch

from utils.data.cache import PLACES, ImageCache, build_cache
from utils.data.coco_json import CocoDataset, load_coco_samples
from utils.data.voc import Sample, check_unique, load_classes, load_samples
from utils.detection.nms import Thresholds
from utils.evaluation.coco import RESULTS, write_results
from utils.evaluation.label_errors import MISSED_CONFIDENCE
from utils.evaluation.metrics import evaluate
from utils.inference.detector import Detector
from utils.reports.evaluation_report import PAGE, EvaluationReport, write_checkpoint_comparison
from utils.reports.metrics_table import format_metrics
from utils.system.cli import run_script
from utils.system.device import choose_device, choose_precision, keep_freed_memory
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup, join_process_group
from utils.system.errors import UserError, check_choice, check_range
from utils.system.files import make_folder
from utils.weights.checkpoint import find_checkpoint


@dataclass(frozen=True)
class Config:
    """Evaluate checkpoints on a split."""

    weights: tuple[str, ...] = ()  # checkpoints or run folders; empty: the newest run in logs/
    devkit: str = "VOCdevkit"  # folder with the datasets
    sets: tuple[str, ...] = ("VOC2007/test",)  # sets to evaluate on, as folder/split
    coco: str = ""  # COCO JSON file to evaluate on instead of sets, such as annotations/instances_val2017.json
    images: str = ""  # image folder of the COCO file
    out: str = ""  # output folder; empty: a folder in eval/ or compare/ next to the (first) checkpoint
    classes: str = ""  # class file that must match the classes of the checkpoints; empty: no check
    confidence: float = 0.001  # minimum confidence; low, to cover the whole precision-recall curve
    nms_iou: float = 0.5  # IoU above which NMS suppresses a lower-scoring box of the same class
    batch_size: int = 16  # images per batch
    cache: str = "auto"  # where to keep decoded images: auto, device, ram or disk
    device: str = "auto"  # auto, cpu, cuda or cuda:N (the GPU with index N)
    precision: str = "fp32"  # precision of the network: auto, bf16, fp16 or fp32

    def __post_init__(self) -> None:
        check_range(self, 1, inf, "batch_size")
        check_range(self, 0, MISSED_CONFIDENCE, "confidence")  # more would hide best thresholds and label errors
        check_range(self, 0, 1, "nms_iou")
        check_choice(self, "cache", PLACES)
        if bool(self.coco) != bool(self.images):
            raise UserError("coco and images must be given together: the JSON file and the folder of its images")

    @property
    def source_sets(self) -> list[str]:
        return [self.coco] if self.coco else list(self.sets)


def main(config: Config) -> dict[str, Any]:
    """Evaluate the checkpoints, write reports and print the metrics; returns those of the first checkpoint."""
    device, sets = choose_device(config.device), ", ".join(config.source_sets)
    if device.type == "cpu":
        keep_freed_memory()
    with join_process_group(config.device) as group:
        paths = [find_checkpoint(name) for name in config.weights or [""]]
        detectors = load_detectors(config, paths, device)
        diagnostics = Diagnostics(skips=False)  # skipping images would change AP
        samples, dataset = load_split(config, detectors[0].spec.class_names, diagnostics)
        if len(paths) > 1 and all(sample.difficult.all() for sample in samples):
            raise UserError(f"{sets} contains no objects, so checkpoints cannot be compared on it")
        folders = make_folders(config, paths) if group.is_main else paths
        caches = build_caches(config, samples, detectors, group, diagnostics)
        diagnostics.print_summary(sets, group.print_once)
        evaluations = []
        for path, detector, cache, folder in zip(paths, detectors, caches, folders, strict=True):
            detections = detector.detect_cached(cache, config.batch_size, group)
            if not group.is_main:
                continue
            write_results(folder, dataset, detections)
            if dataset and not dataset.truth["annotations"]:
                print(f"{sets} has no annotations, so there are no metrics; the detections are in {folder / RESULTS}")
                continue
            evaluation = evaluate(cache.samples, detections, cache.sizes, detector.spec.class_names, dataset)
            source = config.images or config.devkit
            EvaluationReport(path, source, config.source_sets, detector, cache, detections, evaluation).write(folder)
            print(f"{path} on {sets}, {len(cache)} images\n\n{format_metrics(evaluation.metrics)}\n")
            print(f"report: {folder / PAGE}\n")
            evaluations.append(evaluation)
        if group.is_main and len(paths) > 1:
            out = folders[0].parent
            print(f"{write_checkpoint_comparison(out, paths, evaluations)}\n\nwritten to {out}")
        return group.broadcast(evaluations[0].metrics if evaluations else {})


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


def load_split(
    config: Config, class_names: tuple[str, ...], diagnostics: Diagnostics
) -> tuple[list[Sample], CocoDataset | None]:
    """The samples to evaluate on, and the COCO dataset, if any."""
    if config.coco:
        samples, dataset = load_coco_samples(config.coco, config.images, class_names)
    else:
        samples, dataset = load_samples(config.devkit, config.sets, class_names, diagnostics), None
    check_unique(samples, config.source_sets, diagnostics)
    return samples, dataset


def make_folders(config: Config, paths: Sequence[Path]) -> list[Path]:
    """Create an output folder for each checkpoint; several checkpoints get subfolders of a common folder."""
    sets = [Path(name).stem if name.endswith(".json") else name.replace("/", "_") for name in config.source_sets]
    out = Path(config.out or paths[0].parent / ("compare" if len(paths) > 1 else "eval") / "_".join(sets))
    names = [f"{i}_{path.parent.name}_{path.stem}" for i, path in enumerate(paths, start=1)]
    folders = [out / name for name in names] if len(paths) > 1 else [out]
    for folder in folders:
        make_folder(folder)
    return folders


def build_caches(
    config: Config, samples: list[Sample], detectors: Sequence[Detector], group: ProcessGroup, diagnostics: Diagnostics
) -> list[ImageCache]:
    """Decode the images for each detector; those with the same input size and letterboxing share a cache."""
    caches: dict[tuple[object, ...], ImageCache] = {}
    keys = [(detector.spec.input_size, detector.spec.letterbox) for detector in detectors]
    for key, detector in zip(keys, detectors, strict=True):
        if key not in caches:
            device = detector.network.device
            caches[key] = build_cache(samples, detector.spec, device, config.cache, group, diagnostics)
            diagnostics = Diagnostics(skips=False)  # report each diagnostic once
    return [caches[key] for key in keys]


if __name__ == "__main__":
    run_script(main, Config)
