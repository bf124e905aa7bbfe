"""Measure checkpoints on a split: python eval.py --weights logs/RUN/best.safetensors --sets VOC2007/test

Change the constants of `Config`, or give them as flags. Several checkpoints are compared.
"""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch

from utils.cache import PLACES, build_cache
from utils.checkpoint import newest_checkpoint
from utils.coco import Dataset, read_coco, write_results
from utils.detector import Detector, Thresholds
from utils.device import choose_device, choose_precision, keep_freed_memory
from utils.distributed import Ranks, join_ranks
from utils.errors import UserError, check_choice, check_range, make_folder, run_script
from utils.metrics import Evaluation, evaluate
from utils.report import Report, compare, metrics_table, write_comparison
from utils.voc import Sample, load_classes, load_samples


@dataclass(frozen=True)
class Config:
    """Measure checkpoints on a split."""

    weights: tuple[str, ...] = ()  # checkpoints of train.py; empty: best.safetensors of the newest run under logs/
    devkit: str = "VOCdevkit"  # folder of the data sets
    sets: tuple[str, ...] = ("VOC2007/test",)  # sets to measure on, folder/split, any number
    coco: str = ""  # COCO's JSON to measure on instead of sets, such as annotations/instances_val2017.json
    images: str = ""  # with coco: folder of its images
    out: str = ""  # folder for the results; empty: eval/ beside the checkpoint, the first of several
    classes: str = ""  # class file to compare with the checkpoint's classes; empty: those of the checkpoint
    confidence: float = 0.001  # least score of a detection; low, so that the whole curve is seen
    nms_iou: float = 0.6  # two boxes of a class that overlap more are one object
    batch_size: int = 16  # images at a time
    cache: str = "auto"  # where the decoded images are: auto, device, ram or disk
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "fp32"  # of the network: fp32, bf16, fp16 or auto

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        check_range(self, 1, inf, "batch_size")
        check_range(self, 0, 1, "confidence", "nms_iou")
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
    paths = [Path(name) for name in config.weights] or [newest_checkpoint()]
    folder = Path(config.out) if config.out else paths[0].parent / "eval"
    with join_ranks(device) as ranks:
        folders = [folder] if len(paths) == 1 else [folder / name for name in distinct_names(paths)]
        found = [measure(config, *where, device, ranks) for where in zip(paths, folders, strict=True)]
        if ranks.first and len(paths) > 1:
            if not found[0].coco.matches:
                raise UserError("there are no objects to compare checkpoints on")
            table = write_comparison(folder, compare([str(path) for path in paths], found))
            print(f"\n{table}\n\nwritten to {folder}")
        return ranks.share(found[0].metrics if ranks.first else None)


def load_split(config: Config, class_names: tuple[str, ...]) -> tuple[list[Sample], Dataset | None, list[str]]:
    """The samples to measure on, what COCO's JSON says of them, and the names of the sets."""
    if config.coco:
        return *read_coco(config.coco, config.images, class_names), [config.coco]
    return load_samples(config.devkit, config.sets, class_names), None, list(config.sets)


def measure(config: Config, weights: Path, folder: Path, device: torch.device, ranks: Ranks) -> Evaluation | None:
    """One checkpoint: its report in `folder`, its table printed; None in all processes but the first."""
    thresholds = Thresholds(config.confidence, config.nms_iou)
    detector = Detector.load(weights, device, choose_precision(config.precision, device), thresholds)
    if config.classes:
        detector.expect_classes(load_classes(config.classes), config.classes)
    make_folder(folder)
    samples, dataset, sets = load_split(config, detector.spec.class_names)
    cache = build_cache(samples, detector.spec, device, config.cache, ranks=ranks)
    detections = detector.detect_cached(cache, config.batch_size, ranks)
    if not ranks.first:
        return None
    evaluation = evaluate(samples, detections, cache.sizes, detector.spec.class_names, dataset)
    about = {"weights": str(weights), "sets": sets}
    Report(about, detector.spec, cache, detections, evaluation).write(folder)
    write_results(folder, dataset, detections)
    print(f"{weights} on {', '.join(sets)}, {len(samples)} images\n\n{metrics_table(evaluation.metrics)}\n")
    print(f"written to {folder}: look at {folder / 'report.html'}")
    return evaluation


def distinct_names(paths: list[Path]) -> list[str]:
    """A folder's name for each of several checkpoints, such as 1_run_best."""
    return [f"{i}_{path.parent.name}_{path.stem}" for i, path in enumerate(paths, start=1)]


if __name__ == "__main__":
    run_script(main, Config)
