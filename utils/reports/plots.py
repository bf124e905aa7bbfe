"""Plots of training runs, evaluations and datasets."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.evaluation.metrics import MATCH_IOU, Curve
from utils.evaluation.significance import CONFIDENCE, MeanEstimate
from utils.system.files import atomic_write

DPI = 110
CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback",  # Linux
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",  # Windows, macOS
)  # fmt: skip
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # warns about CJK fonts that have a single weight
installed = set(font_manager.get_font_names())
matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
MAX_CELL_TEXTS = 25  # maximum number of classes for which a confusion matrix shows numbers
BINS = 40
MAX_NAMED = 20  # maximum number of classes for a complete legend
NUM_COLORS = 10  # number of colors in matplotlib's color cycle; further lines are dashed
MAX_NAME_LENGTH = 25  # maximum number of characters of a class name in a plot


def save_figure(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
    plt.close(figure)


def escape_label(name: str) -> str:
    """Shorten a class name for a plot, and escape a leading _, which hides a label, and $, which starts a formula."""
    name = name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def draw_training(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss per epoch, and validation AP if there is any."""
    panels = [("Loss", {"train/loss": "training", "val/loss": "validation"})]
    if any("val/AP" in record for record in records):
        panels.append(("Accuracy on the validation split", {"val/AP": "AP", "val/AP50": "AP50"}))
    size = 5.5 * len(panels), 4
    figure, plots = plt.subplots(1, len(panels), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axes, (title, names) in zip(plots[0], panels, strict=True):
        for name, label in names.items():
            points = [(record["epoch"], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
                axes.legend()
        axes.set(title=title, xlabel="Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if len(panels) > 1:
        plots[0, 1].set_ylim(0, 1)
    save_figure(figure, path)


def draw_precision_recall(curves: Sequence[Curve], class_names: Sequence[str], path: Path) -> None:
    """Draw the precision-recall curves of the classes with objects, with AP in the legend."""
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    title = f"Precision-recall curves at IoU {MATCH_IOU}, with VOC AP (area)"
    axes.set(xlabel="Recall", ylabel="Precision", title=title)
    labels = [f"{escape_label(name)} {curve.ap_area():.3f}" for curve, name in zip(curves, class_names, strict=True)]
    draw_curves(figure, [axes], curves, labels, lambda curve: [(curve.recall, curve.precision)])
    save_figure(figure, path)


def draw_confidence(curves: Sequence[Curve], class_names: Sequence[str], path: Path) -> None:
    """Draw precision, recall and F1 of each class by confidence threshold; a dot marks the best F1."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for axes, title in zip(panels, ("Precision", "Recall", "F1 (dots: best threshold)"), strict=True):
        axes.set(xlabel="Confidence threshold", title=title)

    def lines(curve: Curve) -> list[tuple[np.ndarray, np.ndarray]]:
        scores = np.append(curve.scores, 0 * curve.scores[-1:])  # extend the curve from the lowest score to 0
        return [(scores, np.append(y, y[-1:])) for y in (curve.precision, curve.recall, curve.f1())]

    drawn = draw_curves(figure, panels, curves, [*map(escape_label, class_names)], lines)
    for line in (line for axes in panels for line in axes.lines):
        line.set_drawstyle("steps-post")  # a value holds down to the next lower score
    for line, i in drawn:
        best = curves[i].find_best_threshold()
        panels[2].plot(best["threshold"], best["F1"], "o", color=line.get_color())
    save_figure(figure, path)


def draw_curves(
    figure: Figure,
    panels: Sequence[Axes],
    curves: Sequence[Curve],
    labels: Sequence[str],
    lines: Callable[[Curve], list[tuple[np.ndarray, np.ndarray]]],
) -> list[tuple[Line2D, int]]:
    """Draw the `lines` (x, y) of each class with objects, one per panel.

    With more than MAX_NAMED classes, the legend lists only those with the lowest AP; the others are gray. Returns the
    lines of the listed classes in the first panel, each with the index of its class.
    """
    present = sorted((curve.ap_area(), i) for i, curve in enumerate(curves) if curve.num_objects)
    named = {i for _, i in present[: len(present) if len(present) <= MAX_NAMED else MAX_NAMED // 2]}
    drawn = []
    for _, i in sorted(present, key=lambda item: (item[1] in named, item[1])):
        dashes = "-" if len(drawn) < NUM_COLORS else "--"
        style = {"linestyle": dashes} if i in named else {"color": "0.8", "linewidth": 0.8}
        first, *_ = [axes.plot(x, y, **style)[0] for axes, (x, y) in zip(panels, lines(curves[i]), strict=True)]
        if i in named:
            drawn.append((first, i))
    for axes in panels:
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    if drawn:
        title = None if len(named) == len(present) else "Classes with the lowest AP"
        handles, texts = [line for line, _ in drawn], [labels[i] for _, i in drawn]
        figure.legend(handles, texts, loc="outside right upper", fontsize="small", title=title)
    return drawn


def draw_confusion(counts: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix of counts (C + 1, C + 1), background last, colored by row-normalized values."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [*map(escape_label, class_names), "background"]
    side = min(14, 3.5 + 0.55 * len(names))
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), shrink=0.8)
    size = "small" if len(names) <= MAX_CELL_TEXTS else "xx-small"
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel="Predicted", ylabel="True", title="Confusion matrix (row-normalized, with counts)")
    if len(names) <= MAX_CELL_TEXTS + 1:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.6 else "black"
            text = f"{shares[row, column]:.2f}\n{counts[row, column]}"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    save_figure(figure, path)


def draw_shapes(sides: np.ndarray, anchors: np.ndarray, recall: float | None, path: Path) -> None:
    """Draw histograms of object sizes and aspect ratios (N, 2), with anchors (A, 2) as lines, all in input pixels."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    titles = "Size: square root of the area (input pixels)", "Aspect ratio (width / height)"
    shapes = ((np.sqrt(values.prod(axis=1)), values[:, 0] / values[:, 1]) for values in (sides, anchors))
    for axes, values, of_anchors, title in zip(panels, *shapes, titles, strict=True):
        both = np.concatenate([values, of_anchors])
        edges = np.geomspace(both.min() * 0.9, both.max() * 1.1, BINS)
        axes.hist(values, edges, color="tab:blue", alpha=0.7)
        for value in of_anchors:
            axes.axvline(value, color="tab:red", linewidth=1)
        axes.set(xscale="log", xlabel=title, ylabel="Objects")
        ticks = np.unique(np.round(np.geomspace(edges[0], edges[-1], 7), 1 if axes is panels[0] else 2))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
    title = "Objects (blue) and anchors (red)" + ("" if recall is None else f"; best possible recall {recall:.3f}")
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)


def draw_counts(counts: dict[str, dict[str, int]], path: Path) -> None:
    """Draw a bar chart of the objects per class in each part of a dataset; `counts` are by part and class name."""
    names = list(next(iter(counts.values())))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(names)), layout="constrained")
    height = 0.8 / len(counts)
    for i, (part, values) in enumerate(counts.items()):
        places = np.arange(len(names)) + (i - (len(counts) - 1) / 2) * height
        axes.barh(places, [values[name] for name in names], height, label=part)
    axes.set_yticks(range(len(names)), [escape_label(name) for name in names])
    axes.set(title="Objects per class", xlabel="Objects (log scale)", xscale="symlog", ylim=(len(names) - 0.4, -0.6))
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


def draw_means(panels: Mapping[str, Sequence[tuple[str, Sequence[float], MeanEstimate]]], path: Path) -> None:
    """Draw one panel per title: for each name, the values of all seeds and their mean with its confidence interval."""
    figure, plots = plt.subplots(1, len(panels), figsize=(11, 4), layout="constrained")
    for axes, (title, entries) in zip(plots, panels.items(), strict=True):
        for place, (_, values, mean) in enumerate(entries):
            axes.plot([place] * len(values), values, "o", color="tab:gray", alpha=0.6, markersize=4)
            axes.errorbar(place, mean.value, mean.margin, marker="_", markersize=14, color="tab:blue", capsize=5)
        axes.set_xticks(range(len(entries)), [name for name, *_ in entries], rotation=30, ha="right", fontsize="small")
        axes.set(title=title)
        axes.grid(alpha=0.3, axis="y")
        if axes.get_ylim()[0] < 0:
            axes.axhline(0, color="black", linewidth=0.8)  # no difference
    figure.suptitle(f"Blue: mean and {CONFIDENCE:.0%} confidence interval; gray: individual seeds", fontsize="small")
    save_figure(figure, path)
