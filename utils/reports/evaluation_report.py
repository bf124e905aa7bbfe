"""Evaluation reports: metrics, plots and likely label errors, as files and as one self-contained page."""

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
from utils.data.image_checks import read_sample
from utils.data.image_io import encode_image
from utils.data.statistics import anchor_fit
from utils.data.voc import Sample
from utils.detection.anchors import MIN_ANCHOR_IOU, head_levels
from utils.evaluation.coco import COCO_NAMES, estimate_influence
from utils.evaluation.label_errors import LabelError, find_label_errors
from utils.evaluation.metrics import Evaluation, confusion_matrix, filter_confident, inside_difficult, pair_boxes
from utils.evaluation.significance import CONFIDENCE, NUM_RESAMPLES, bootstrap_ap, percentile_interval
from utils.inference.detector import Detector
from utils.inference.drawing import choose_region, draw_view
from utils.reports.html import data_uri, write_page
from utils.reports.plots import draw_confidence, draw_confusion, draw_precision_recall, draw_shapes
from utils.system.files import write_text
from utils.system.text import format_table

PAGE, TEMPLATE = "report.html", "evaluation_report.html"
MAX_WORST = 12  # images on the page
MAX_LABEL_ERRORS = 24  # on the page; label_errors.json lists all
PLOTS = {
    "precision_recall.png": "Precision-recall curves",
    "confusion.png": "Confusion matrix",
    "confidence.png": "Precision, recall and F1 by confidence threshold",
    "shapes.png": "Objects and anchors",
}
CLASS_COLUMNS = {"objects": "objects", "AP_11point": "VOC AP 11-point", "AP_area": "VOC AP area", "AP": "COCO AP"}
CLASS_COLUMNS |= {name: name for name in ("threshold", "precision", "recall", "F1")}


def list_class_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """A table of the CLASS_COLUMNS of each class, and of their means over the classes with objects."""
    voc, coco, best = metrics["voc"], metrics["coco"], metrics["best"]
    rows = {name: row | best[name] | {"AP": coco["per_class"][name]} for name, row in voc["per_class"].items()}
    present = [row for row in rows.values() if row["objects"]]
    means = {key: float(np.mean([row[key] for row in present] or [-1])) for key in ("precision", "recall", "F1")}
    means |= {"AP_11point": voc["mAP_11point"], "AP_area": voc["mAP_area"], "AP": coco["AP"]}
    rows = [*rows.items(), ("mean", means | {"objects": sum(row["objects"] for row in present)})]
    cells = [[name, *(format_number(row.get(column)) for column in CLASS_COLUMNS)] for name, row in rows]
    return [["class", *CLASS_COLUMNS.values()], *cells]


def format_number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def format_metrics(metrics: dict[str, Any]) -> str:
    """A text table of the classes and their mean, and the 12 COCO metrics."""
    coco = [f"{name} {metrics['coco'][name]:.4f}" for name in COCO_NAMES]
    return f"{format_table(list_class_rows(metrics))}\n\nCOCO  {'  '.join(coco[:6])}\n      {'  '.join(coco[6:])}"


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
        write_page(
            folder / PAGE,
            TEMPLATE,
            metrics=self.metrics,
            rows=list_class_rows(self.metrics),
            coco_names=COCO_NAMES,
            plots=[(title, data_uri((folder / name).read_bytes(), "png")) for name, title in PLOTS.items()],
            worst=self.draw_worst_images(),
            errors=[self.draw_error(error) for error in errors[:MAX_LABEL_ERRORS]],
            num_errors=len(errors),
            kinds=Counter(error.kind for error in errors),
            format_number=format_number,
            anchor_iou=MIN_ANCHOR_IOU,
        )

    def draw_worst_images(self) -> list[dict[str, Any]]:
        """The images that lower AP the most, with missed objects and false positives marked."""
        costs = estimate_influence(self.evaluation.matches, len(self.cache))
        worst = []
        for i in np.argsort(-costs, kind="stable")[:MAX_WORST].tolist():
            if costs[i] <= 0:
                break
            sample, found = self.cache.samples[i], filter_confident(self.detections[i], self.evaluation.thresholds)
            missed, false = ~sample.difficult, ~inside_difficult(sample, found)
            for row, column in pair_boxes(sample, found):
                correct = sample.labels[column] == found.class_id[row]
                missed[column] &= not correct
                false[row] &= not (correct or sample.difficult[column])
            caption = (
                f"lowers AP by {100 * costs[i]:.2f} points: {missed.sum()} of {(~sample.difficult).sum()} objects "
                f"missed, {false.sum()} false positives"
            )
            pictures = self.draw_pictures(i, sample.boxes[missed], found.xyxy[false])
            worst.append({"image": sample.name, "file": str(sample.image), "caption": caption} | pictures)
        return worst

    def draw_error(self, error: LabelError) -> dict[str, Any]:
        part, box = choose_region(error.box, self.cache.sizes[error.image]), error.box[None]
        pictures = self.draw_pictures(error.image, box, box, part)
        return describe_error(error, self.cache.samples[error.image]) | pictures

    def draw_pictures(
        self, i: int, marks: np.ndarray, found_marks: np.ndarray, part: tuple[int, int, int, int] | None = None
    ) -> dict[str, str]:
        """Data URIs of an image, or a part of it, with its labels and with its detections."""
        sample, names = self.cache.samples[i], self.detector.spec.class_names
        image, _ = read_sample(sample)
        found = filter_confident(self.detections[i], self.evaluation.thresholds)
        views = {
            "labels": draw_view(image, sv.Detections(sample.boxes, class_id=sample.labels), names, marks, part),
            "detections": draw_view(image, found, names, found_marks, part),
        }
        return {name: data_uri(encode_image(view, ".jpg"), "jpeg") for name, view in views.items()}


def describe_error(error: LabelError, sample: Sample) -> dict[str, Any]:
    """The entry of a label error in label_errors.json; the box is in pixels, counted from 0."""
    score, box = round(float(error.score), 4), [round(float(edge), 1) for edge in error.box]
    entry = {"image": sample.name, "file": str(sample.image), "kind": error.kind}
    return entry | {"score": score, "box": box, "reason": error.reason}


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
