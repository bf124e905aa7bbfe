"""Evaluation reports: metrics, plots and likely label errors, as files and as a self-contained HTML page."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch
from torch import Tensor

from utils.data.cache import ImageCache
from utils.data.statistics import anchor_fit
from utils.detection.anchors import MIN_ANCHOR_IOU, head_levels
from utils.evaluation.coco import COCO_NAMES
from utils.evaluation.label_errors import LabelError, find_label_errors
from utils.evaluation.metrics import Evaluation, confusion_matrix
from utils.evaluation.significance import CONFIDENCE, NUM_RESAMPLES, bootstrap_ap, percentile_interval
from utils.inference.detector import Detector
from utils.reports.error_pictures import ErrorPictures, describe_error
from utils.reports.html import data_uri, write_page
from utils.reports.metrics_table import format_metrics, format_number, list_class_rows
from utils.reports.plots import draw_confidence, draw_confusion, draw_precision_recall, draw_shapes
from utils.system.files import write_text
from utils.system.text import format_table

PAGE, TEMPLATE = "report.html", "evaluation_report.html"
MAX_LABEL_ERRORS = 24  # maximum number on the page; label_errors.json lists all
PLOTS = {
    "precision_recall.png": "Precision-recall curves",
    "confusion.png": "Confusion matrix",
    "confidence.png": "Precision, recall and F1 by confidence threshold",
    "shapes.png": "Objects and anchors",
}


@dataclass(frozen=True)
class EvaluationReport:
    """The evaluation of a detector on a split, and its report."""

    weights: Path
    source: str  # the devkit, or the image folder of a COCO file
    sets: Sequence[str]
    detector: Detector
    cache: ImageCache
    detections: Sequence[sv.Detections]
    evaluation: Evaluation

    @cached_property
    def shapes(self) -> tuple[Tensor, Tensor]:
        """Width and height of the objects (N, 2) and of the anchors (A, 2), in input pixels."""
        boxes = self.cache.boxes[self.cache.labels >= 0]
        return boxes[:, 2:] - boxes[:, :2], torch.cat([level.anchors for level in head_levels(self.detector.spec)])

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        spec, limits, fit = self.detector.spec, self.detector.thresholds, anchor_fit(*self.shapes)
        counts = confusion_matrix(self.cache.samples, self.detections, self.evaluation.thresholds)
        return {
            "weights": str(self.weights),
            "source": self.source,
            "sets": list(self.sets),
            "images": len(self.cache),
            "input_size": list(spec.input_size),
            "letterbox": spec.letterbox,
            "precision": str(self.detector.network.dtype).removeprefix("torch."),
            "confidence": limits.confidence,
            "nms_iou": limits.nms_iou,
            **self.evaluation.metrics,
            "best_possible_recall": fit and fit.recall,
            "confusion": {"classes": [*spec.class_names, "background"], "counts": counts.tolist()},
        }

    def write(self, folder: Path) -> None:
        """Write the metrics, likely label errors, plots and the HTML page."""
        samples, names, curves = self.cache.samples, self.detector.spec.class_names, self.evaluation.curves
        errors = find_label_errors(samples, self.detections, curves, self.evaluation.thresholds, names)
        described = [describe_error(error, samples[error.image]) for error in errors]
        write_text(folder / "metrics.json", json.dumps(self.metrics, indent=2) + "\n")
        write_text(folder / "metrics.txt", format_metrics(self.metrics) + "\n")
        write_text(folder / "label_errors.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n")
        sides, anchors = (values.numpy() for values in self.shapes)
        draw_precision_recall(curves, names, folder / "precision_recall.png")
        draw_confidence(curves, names, folder / "confidence.png")
        draw_confusion(np.array(self.metrics["confusion"]["counts"]), names, folder / "confusion.png")
        draw_shapes(sides, anchors, self.metrics["best_possible_recall"], folder / "shapes.png")
        self.write_page(folder, errors)

    def write_page(self, folder: Path, errors: Sequence[LabelError]) -> None:
        """Write the self-contained HTML page."""
        pictures = ErrorPictures(self.cache, self.detections, self.evaluation, self.detector.spec.class_names)
        write_page(
            folder / PAGE,
            TEMPLATE,
            metrics=self.metrics,
            rows=list_class_rows(self.metrics),
            coco_names=COCO_NAMES,
            plots=[(title, data_uri((folder / name).read_bytes(), "png")) for name, title in PLOTS.items()],
            worst=pictures.draw_worst_images(),
            errors=[pictures.draw_label_error(error) for error in errors[:MAX_LABEL_ERRORS]],
            num_errors=len(errors),
            kinds=Counter(error.kind for error in errors),
            format_number=format_number,
            anchor_iou=MIN_ANCHOR_IOU,
        )


def compare_checkpoints(paths: Sequence[Path], evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """AP and AP50 of each checkpoint, and the difference in AP from the first one, with bootstrap intervals."""
    draws = bootstrap_ap([evaluation.matches for evaluation in evaluations])
    first = evaluations[0].metrics["coco"]["AP"]
    rows = []
    for path, evaluation, own in zip(paths, evaluations, draws, strict=True):
        coco = evaluation.metrics["coco"]
        row = {"weights": str(path), "AP": coco["AP"], "AP50": coco["AP50"], "AP_interval": percentile_interval(own)}
        if rows:
            row |= {"difference": coco["AP"] - first, "difference_interval": percentile_interval(own - draws[0])}
        rows.append(row)
    return rows


def write_checkpoint_comparison(folder: Path, paths: Sequence[Path], evaluations: Sequence[Evaluation]) -> str:
    """Write the rows of `compare_checkpoints` to comparison.json and comparison.txt; returns the text."""
    rows, num_images = compare_checkpoints(paths, evaluations), len(evaluations[0].matches[0].num_objects)
    interval = f"{CONFIDENCE:.0%} interval"
    table = [["", "COCO AP", interval, "difference", interval, "AP50"]]
    for row in rows:
        cells = [
            row["weights"],
            f"{row['AP']:.4f}",
            "{:.4f}..{:.4f}".format(*row["AP_interval"]),
            "",
            "",
            f"{row['AP50']:.4f}",
        ]
        if "difference" in row:
            cells[3:5] = f"{row['difference']:+.4f}", "{:+.4f}..{:+.4f}".format(*row["difference_interval"])
        table.append(cells)
    text = (
        f"{format_table(table)}\nDifferences are relative to the first checkpoint. Intervals: paired bootstrap over "
        f"{num_images} images, {NUM_RESAMPLES} resamples.\n"
        "The intervals apply to these checkpoints only; training with another seed also changes AP."
    )
    write_text(folder / "comparison.json", json.dumps(rows, indent=2) + "\n")
    write_text(folder / "comparison.txt", text + "\n")
    return text
