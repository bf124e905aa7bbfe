"""What an evaluation leaves behind: a table, `metrics.json` and the precision-recall curves; pictures of batches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import supervision as sv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from utils.augment import draw
from utils.batches import Batches
from utils.cache import ImageCache
from utils.detector import Thresholds
from utils.images import draw_sheet, draw_targets
from utils.metrics import COCO_NAMES, Curve

PICTURES = 8  # images drawn of a batch and of a validation


def metrics_table(metrics: dict[str, Any]) -> str:
    """The figures as text: a row per class, the mean, and COCO's twelve."""
    rows = [
        (name, values["objects"], values["AP_11point"], values["AP_area"], metrics["coco"]["per_class"][name])
        for name, values in metrics["voc"]["per_class"].items()
    ]
    objects = sum(row[1] for row in rows)
    rows.append(("mean", objects, metrics["voc"]["mAP_11point"], metrics["voc"]["mAP_area"], metrics["coco"]["AP"]))
    width = max(5, *(len(row[0]) for row in rows))
    lines = [f"{'class':{width}}  objects  VOC AP 11-point  VOC AP area  COCO AP"]
    lines += [f"{name:{width}}  {count:7}  {a:15.4f}  {b:11.4f}  {c:7.4f}" for name, count, a, b, c in rows]
    figures = [f"{name} {metrics['coco'][name]:.4f}" for name in COCO_NAMES]
    lines += ["", "COCO  " + "  ".join(figures[:6]), "      " + "  ".join(figures[6:])]
    return "\n".join(lines)


def write_report(folder: Path, metrics: dict[str, Any], curves: Sequence[Curve], class_names: Sequence[str]) -> None:
    """`metrics.json`, `metrics.txt` and `precision_recall.png` in `folder`."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "metrics.txt").write_text(metrics_table(metrics) + "\n", encoding="utf-8")
    draw_precision_recall(curves, class_names, folder / "precision_recall.png")


def draw_precision_recall(curves: Sequence[Curve], class_names: Sequence[str], path: Path) -> None:
    """One line per class that has objects; with many classes the legend stands beside the plot."""
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    lines, labels = [], []
    for curve, name in zip(curves, class_names, strict=True):
        if curve.positives:
            lines += axes.plot(curve.recall, curve.precision)
            labels.append(f"{name} {curve.ap_area():.3f}".replace("$", r"\$"))  # $ would begin a formula
    axes.set(xlabel="recall", ylabel="precision", title="precision and recall at IoU 0.5 (AP by area)")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if lines:
        side = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        axes.legend(lines, labels, ncols=1 + len(lines) // 25, fontsize="small", **side)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_examples(detections: Sequence[sv.Detections], cache: ImageCache, class_names: Sequence[str]) -> np.ndarray:
    """The first validation images as the network sees them, with what prediction would show."""
    shown = []
    for found, fit in zip(detections[:PICTURES], cache.fits, strict=False):
        sure = found.confidence > Thresholds().confidence
        boxes = fit.to_input(found.xyxy[sure])
        shown.append(sv.Detections(boxes, confidence=found.confidence[sure], class_id=found.class_id[sure]))
    return draw_sheet(cache.images[:PICTURES], shown, class_names)


def draw_batch(batches: Batches, number: int, class_names: Sequence[str]) -> np.ndarray:
    """The first images of a batch as the network will see them, with their boxes."""
    batch = batches.prepare(number, PICTURES)
    images = draw(batch._replace(images=batch.images.cpu()))
    return draw_targets(images, batch.boxes, batch.labels, class_names)
