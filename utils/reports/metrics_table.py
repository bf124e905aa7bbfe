"""The table of metrics: a row for each class and their mean, as text and for the HTML page."""

from typing import Any

import numpy as np

from utils.evaluation.coco import COCO_NAMES
from utils.system.text import format_table

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
