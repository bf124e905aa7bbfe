"""What an evaluation leaves in its folder: tables, plots, and `report.html`, one page that needs nothing else."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch

from utils.data.cache import ImageCache
from utils.data.image_io import encode_image
from utils.data.image_checks import read_sample
from utils.data.statistics import anchor_fit
from utils.data.voc import Sample
from utils.detection.anchors import head_levels
from utils.detection.anchors import MIN_ANCHOR_IOU
from utils.evaluation.coco import COCO_NAMES
from utils.evaluation.label_errors import Suspicion, suspect_labels
from utils.evaluation.metrics import Evaluation, confident, confusion_matrix, on_difficult, pair
from utils.evaluation.significance import DRAWS, INTERVAL, bootstrap, influence, interval
from utils.inference.detector import Detector
from utils.inference.drawing import around, draw_view
from utils.reports.html import data_uri, write_page
from utils.reports.plots import draw_confidence, draw_confusion, draw_precision_recall, draw_shapes
from utils.system.files import write_text

PAGE, TEMPLATE = "report.html", "evaluation_report.html"
WORST = 12  # images shown that cost the most AP
SUSPICIONS = 24  # label errors shown; label_errors.json has all
PLOTS = {
    "precision_recall.png": "precision and recall",
    "confusion.png": "confusion matrix",
    "confidence.png": "precision, recall and F1 against confidence",
    "shapes.png": "objects and anchors",
}
CLASS_COLUMNS = {
    "objects": "objects",
    "AP_11point": "VOC AP 11-point",
    "AP_area": "VOC AP area",
    "AP": "COCO AP",
    "threshold": "threshold",
    "precision": "precision",
    "recall": "recall",
    "F1": "F1",
}


def class_rows(metrics: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Of each class its name and CLASS_COLUMNS, and then the means over the classes."""
    voc, coco = metrics["voc"], metrics["coco"]
    rows = [
        (name, values | {"AP": coco["per_class"][name]} | metrics["best"][name])
        for name, values in voc["per_class"].items()
    ]
    present = [values for _, values in rows if values["objects"]]
    means = {
        column: float(np.mean([row[column] for row in present] or [-1])) for column in ("precision", "recall", "F1")
    }
    total = {"objects": sum(values["objects"] for _, values in rows), "AP": coco["AP"]}
    return [*rows, ("mean", total | {"AP_11point": voc["mAP_11point"], "AP_area": voc["mAP_area"]} | means)]


def show(value: float | None) -> str:
    """A figure of a table; nothing where there is none."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def metrics_table(metrics: dict[str, Any]) -> str:
    """The figures as text: a row per class, the mean, and COCO's twelve."""
    rows = class_rows(metrics)
    width = max(5, *(len(name) for name, _ in rows))
    lines = ["  ".join([f"{'class':{width}}", *CLASS_COLUMNS.values()])]
    for name, values in rows:
        cells = [f"{show(values.get(column)):>{len(title)}}" for column, title in CLASS_COLUMNS.items()]
        lines.append("  ".join([f"{name:{width}}", *cells]).rstrip())
    figures = [f"{name} {metrics['coco'][name]:.4f}" for name in COCO_NAMES]
    lines += ["", "COCO  " + "  ".join(figures[:6]), "      " + "  ".join(figures[6:])]
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """A split, what a detector found on it, and how good that is: everything that a report shows."""

    weights: Path  # the checkpoint
    source: str  # the devkit, or the folder of COCO's images
    sets: Sequence[str]
    detector: Detector
    cache: ImageCache
    detections: Sequence[sv.Detections]
    evaluation: Evaluation

    def write(self, folder: Path) -> None:
        """Tables, plots and the page."""
        spec, curves, samples = self.detector.spec, self.evaluation.curves, self.cache.samples
        names, boxes = spec.class_names, self.cache.boxes[self.cache.labels >= 0]
        sides, anchors = boxes[:, 2:] - boxes[:, :2], torch.cat([level.anchors for level in head_levels(spec)])
        fit = anchor_fit(sides, anchors)
        recall = fit and fit.recall
        counts = confusion_matrix(samples, self.detections, self.evaluation.thresholds)
        confusion = {"classes": [*names, "background"], "counts": counts.tolist()}
        limits = self.detector.thresholds
        precision = str(self.detector.network.dtype).removeprefix("torch.")
        metrics = {"weights": str(self.weights), "source": self.source, "sets": list(self.sets), "images": len(samples)}
        metrics |= {"input_size": list(spec.input_size), "letterbox": spec.letterbox, "precision": precision}
        metrics |= {"confidence": limits.confidence, "nms_iou": limits.nms_iou} | self.evaluation.metrics
        metrics |= {"best_possible_recall": recall, "confusion": confusion}
        suspicions = suspect_labels(samples, self.detections, curves, self.evaluation.thresholds, names)
        write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        write_text(folder / "metrics.txt", metrics_table(metrics) + "\n")
        listed = [describe(item, samples[item.image]) for item in suspicions]
        write_text(folder / "label_errors.json", json.dumps(listed, indent=2, ensure_ascii=False) + "\n")
        draw_precision_recall(curves, names, folder / "precision_recall.png")
        draw_confidence(curves, names, folder / "confidence.png")
        draw_confusion(counts, names, folder / "confusion.png")
        draw_shapes(sides.numpy(), anchors.numpy(), recall, folder / "shapes.png")
        self.write_page(folder, metrics, suspicions)

    def write_page(self, folder: Path, metrics: dict[str, Any], suspicions: Sequence[Suspicion]) -> None:
        """`report.html`, with all its pictures inside."""
        write_page(
            folder / PAGE,
            TEMPLATE,
            metrics=metrics,
            columns=CLASS_COLUMNS,
            rows=[(name, [show(values.get(key)) for key in CLASS_COLUMNS]) for name, values in class_rows(metrics)],
            coco={name: show(metrics["coco"][name]) for name in COCO_NAMES},
            plots=[(title, data_uri((folder / name).read_bytes(), "png")) for name, title in PLOTS.items()],
            worst=self.worst_images(),
            suspicions=[self.shown(item) for item in suspicions[:SUSPICIONS]],
            num_suspicions=len(suspicions),
            kinds=Counter(item.kind for item in suspicions),
            recall=show(metrics["best_possible_recall"]),
            anchor_iou=MIN_ANCHOR_IOU,
        )

    def worst_images(self) -> list[dict[str, Any]]:
        """The images that cost the most AP, with frames around what was missed and what is false."""
        costs = influence(self.evaluation.coco.matches, len(self.cache))
        worst = []
        for i in np.argsort(-costs, kind="stable")[:WORST].tolist():
            if costs[i] <= 0:
                break
            sample, found = self.cache.samples[i], confident(self.detections[i], self.evaluation.thresholds)
            missed, false = ~sample.difficult, ~on_difficult(sample, found)
            for row, column in pair(sample, found):
                right = sample.labels[column] == found.class_id[row]
                missed[column] &= not right
                false[row] &= not (right or sample.difficult[column])
            caption = (
                f"costs {100 * costs[i]:.2f} points of AP: {missed.sum()} of {(~sample.difficult).sum()} objects "
                f"missed, {false.sum()} false"
            )
            pictures = self.pictures(i, sample.boxes[missed], found.xyxy[false])
            worst.append({"image": sample.name, "file": str(sample.image), "caption": caption} | pictures)
        return worst

    def shown(self, item: Suspicion) -> dict[str, Any]:
        """A suspicion with its pictures, cut out around it."""
        sample = self.cache.samples[item.image]
        part = around(item.box, self.cache.sizes[item.image])
        return describe(item, sample) | self.pictures(item.image, item.box[None], item.box[None], part)

    def pictures(
        self, i: int, marks: np.ndarray, found_marks: np.ndarray, part: tuple[int, int, int, int] | None = None
    ) -> dict[str, str]:
        """An image, or a part of it, with its labels and with what was found, and frames in both."""
        sample, names = self.cache.samples[i], self.detector.spec.class_names
        image, _ = read_sample(sample)
        found = confident(self.detections[i], self.evaluation.thresholds)
        views = {
            "labelled": draw_view(image, sv.Detections(sample.boxes, class_id=sample.labels), names, marks, part),
            "found": draw_view(image, found, names, found_marks, part),
        }
        return {name: data_uri(encode_image(view, ".jpg"), "jpeg") for name, view in views.items()}


def describe(item: Suspicion, sample: Sample) -> dict[str, Any]:
    """A suspicion as JSON has it, its box in pixels counted from 0."""
    return {
        "image": sample.name,
        "file": str(sample.image),
        "kind": item.kind,
        "score": round(float(item.score), 4),
        "box": [round(float(edge), 1) for edge in item.box],
        "reason": item.reason,
    }


def compare(paths: Sequence[str], evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Of each checkpoint AP and AP50, and how much more AP than the first it has, with its bootstrap interval."""
    draws = bootstrap([evaluation.coco.matches for evaluation in evaluations])
    first = evaluations[0].metrics["coco"]["AP"]
    rows = []
    for path, evaluation, own in zip(paths, evaluations, draws, strict=True):
        coco = evaluation.metrics["coco"]
        row = {"weights": path, "AP": coco["AP"], "AP50": coco["AP50"], "AP_interval": interval(own)}
        if rows:
            row |= {"difference": coco["AP"] - first, "difference_interval": interval(own - draws[0])}
        rows.append(row)
    return rows


def write_comparison(folder: Path, rows: Sequence[dict[str, Any]], images: int) -> str:
    """`comparison.json` and `comparison.txt` in `folder`, of checkpoints measured on `images`; returns the table."""
    width, title = max(len(row["weights"]) for row in rows), f"{INTERVAL:.0%} interval"
    lines = [f"{'':{width}}  COCO AP  {title:14}  difference  {title:16}   AP50"]
    for row in rows:
        line = f"{row['weights']:{width}}   {row['AP']:.4f}  {show_interval(row['AP_interval']):14}"
        difference = f"{row['difference']:+.4f}" if "difference" in row else ""
        between = show_interval(row["difference_interval"], "+") if "difference" in row else ""
        lines.append(f"{line}  {difference:>10}  {between:16}  {row['AP50']:.4f}")
    lines.append(f"intervals by the paired bootstrap over {images} images, {DRAWS} draws; differences are to the first")
    lines.append("they hold for these checkpoints: another seed of the training changes AP too")
    write_text(folder / "comparison.json", json.dumps(rows, indent=2) + "\n")
    write_text(folder / "comparison.txt", "\n".join(lines) + "\n")
    return "\n".join(lines)


def show_interval(limits: tuple[float, float], sign: str = "") -> str:
    low, high = (f"{limit:{sign}.4f}" for limit in limits)
    return f"{low}..{high}"
