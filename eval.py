"""Measure a checkpoint on a split: python eval.py --weights logs/RUN/best.safetensors --sets VOC2007/test

Change the constants of `Config`, or give them as flags.
"""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import supervision as sv
import torch
from tqdm import tqdm

from utils.cache import PLACES, build_cache
from utils.checkpoint import newest_checkpoint
from utils.detector import Detector, Thresholds
from utils.device import choose_device, choose_precision, keep_freed_memory
from utils.distributed import Ranks, join_ranks
from utils.errors import check_choice, check_range, make_folder, run_script
from utils.metrics import evaluate
from utils.report import metrics_table, write_report
from utils.voc import load_classes, load_samples


@dataclass(frozen=True)
class Config:
    """Measure a checkpoint on a split."""

    weights: str = ""  # checkpoint of train.py; empty: best.safetensors of the newest run under logs/
    devkit: str = "VOCdevkit"  # folder of the data sets
    sets: tuple[str, ...] = ("VOC2007/test",)  # sets to measure on, folder/split, any number
    out: str = ""  # folder for the results; empty: eval/ beside the checkpoint
    classes: str = ""  # class file to compare with the checkpoint's classes; empty: those of the checkpoint
    confidence: float = 0.001  # least score of a detection; low, so that the whole curve is seen
    nms_iou: float = 0.6  # two boxes of a class that overlap more are one object
    batch_size: int = 16  # images at a time
    cache: str = "auto"  # where the decoded images are: auto, device, ram or disk
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "fp32"  # of the network: fp32, bf16, fp16 or auto


def main(config: Config) -> dict[str, Any]:
    """Evaluate, print the table, write the report; returns the metrics. Processes of torchrun share the images."""
    device = choose_device(config.device)
    with join_ranks(device) as ranks:
        return measure(config, device, ranks)


def measure(config: Config, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    if device.type == "cpu":
        keep_freed_memory()
    check_range(config, 1, inf, "batch_size")
    check_choice(config, "cache", PLACES)
    weights = Path(config.weights) if config.weights else newest_checkpoint()
    thresholds = Thresholds(config.confidence, config.nms_iou)
    detector = Detector.load(weights, device, choose_precision(config.precision, device), thresholds)
    spec = detector.spec
    if config.classes:
        detector.expect_classes(load_classes(config.classes), config.classes)
    folder = Path(config.out) if config.out else weights.parent / "eval"
    make_folder(folder)
    samples = load_samples(config.devkit, config.sets, spec.class_names)
    cache = build_cache(samples, spec, device, config.cache, ranks=ranks)
    found: dict[int, list[sv.Detections]] = {}
    with tqdm(total=len(cache), desc="evaluating", disable=None if ranks.first else True) as progress:
        for part, heads in detector.run_cached(cache, config.batch_size, ranks):
            found[part.start] = detector.select(heads, cache.fits[part], cache.sizes[part])
            progress.update(ranks.size * (part.stop - part.start))
    detections = [item for batch in ranks.gather(found).values() for item in batch]
    if not ranks.first:
        return ranks.share(None)
    metrics, curves = evaluate(samples, detections, cache.sizes, spec.class_names)
    about = {"weights": str(weights), "sets": list(config.sets), "images": len(samples)}
    write_report(folder, about | metrics, curves, spec.class_names)
    print(f"{weights} on {', '.join(config.sets)}, {len(samples)} images")
    print(f"\n{metrics_table(metrics)}\n\nwritten to {folder}")
    return ranks.share(metrics)


if __name__ == "__main__":
    run_script(main, Config)
