"""Plots of a training and of an evaluation, and sheets of the pictures that a network sees."""

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

from utils.evaluation.metrics import Curve
from utils.evaluation.significance import Mean
from utils.system.files import atomic_write

DPI = 110
WIDE_FONTS = (  # that have Chinese, and usually Japanese and Korean, of Linux, Windows and macOS
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Arial Unicode MS",
)
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a Chinese font in one weight is no warning
installed = set(font_manager.get_font_names())
matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]
MAX_NUMBERS = 25  # classes up to which a confusion matrix shows its numbers
BINS = 40
MAX_NAMES = 20  # classes up to which all lines are named
COLOURS = 10  # that matplotlib gives lines in turn; a second round of them is dashed
LONGEST_NAME = 25  # letters of a class in a plot
Lines = list[tuple[np.ndarray, np.ndarray]]  # x and y, of a line for each panel


def save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
    plt.close(figure)


def plain(name: str) -> str:
    """A class name as text: $ would begin a formula, a label that begins with _ is not shown, a long one hides all."""
    name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def draw_training(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses, and beside them the accuracy where it was measured, against the epoch."""
    measured = any("val/AP" in record for record in records)
    panels = [("loss", ("train/loss", "val/loss"))]
    panels += [("accuracy on the validation split", ("val/AP", "val/AP50"))] * measured
    size = 5.5 * len(panels), 4
    figure, plots = plt.subplots(1, len(panels), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axes, (title, names) in zip(plots[0], panels, strict=True):
        for name in names:
            points = [(record["epoch"], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
                axes.legend()
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if measured:
        plots[0, 1].set_ylim(0, 1)
    save(figure, path)


def draw_precision_recall(curves: Sequence[Curve], class_names: Sequence[str], path: Path) -> None:
    """A line per class that has objects, named with its AP."""
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    axes.set(xlabel="recall", ylabel="precision", title="precision and recall at IoU 0.5 (AP by area)")
    labels = [f"{plain(name)} {curve.ap_area():.3f}" for curve, name in zip(curves, class_names, strict=True)]
    draw_lines(figure, [axes], curves, labels, lambda curve: [(curve.recall, curve.precision)])
    save(figure, path)


def draw_confidence(curves: Sequence[Curve], class_names: Sequence[str], path: Path) -> None:
    """Precision, recall and F1 of each class against the confidence from which on a detection counts.

    A dot is at the best F1, whose confidence is the threshold.
    """
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for axes, title in zip(panels, ("precision", "recall", "F1 (dot: threshold)"), strict=True):
        axes.set(xlabel="confidence", title=title)

    def lines(curve: Curve) -> Lines:
        scores = np.append(curve.scores, 0 * curve.scores[-1:])  # as after the lowest, down to 0
        return [(scores, np.append(y, y[-1:])) for y in (curve.precision, curve.recall, curve.f1())]

    drawn = draw_lines(figure, panels, curves, [*map(plain, class_names)], lines)
    for line in (line for axes in panels for line in axes.lines):
        line.set_drawstyle("steps-post")  # a value holds down to the next lower score
    for line, i in drawn:
        best = curves[i].best()
        panels[2].plot(best["threshold"], best["F1"], "o", color=line.get_color())
    save(figure, path)


def draw_lines(
    figure: Figure,
    panels: Sequence[Axes],
    curves: Sequence[Curve],
    labels: Sequence[str],
    lines: Callable[[Curve], Lines],
) -> list[tuple[Line2D, int]]:
    """A line of each class that has objects in each panel; of many classes only those with the least AP are named.

    Returns of the named ones the line in the first panel, and which class it is.
    """
    present = sorted((curve.ap_area(), i) for i, curve in enumerate(curves) if curve.positives)
    named = {i for _, i in present[: len(present) if len(present) <= MAX_NAMES else MAX_NAMES // 2]}
    drawn = []
    for _, i in sorted(present, key=lambda item: (item[1] in named, item[1])):
        dashes = "-" if len(drawn) < COLOURS else "--"
        style = {"linestyle": dashes} if i in named else {"color": "0.8", "linewidth": 0.8}
        first, *_ = [axes.plot(x, y, **style)[0] for axes, (x, y) in zip(panels, lines(curves[i]), strict=True)]
        if i in named:
            drawn.append((first, i))
    for axes in panels:
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    if drawn:
        title = None if len(named) == len(present) else "classes with the least AP"
        handles, texts = [line for line, _ in drawn], [labels[i] for _, i in drawn]
        figure.legend(handles, texts, loc="outside right upper", fontsize="small", title=title)
    return drawn


def draw_confusion(counts: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Counts (C + 1, C + 1), the background last, as shares of their row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [*map(plain, class_names), "background"]
    side = min(14, 3.5 + 0.55 * len(names))
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), shrink=0.8)
    size = "small" if len(names) <= MAX_NUMBERS else "xx-small"
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel="found as", ylabel="object", title="share of a row, and count")
    if len(names) <= MAX_NUMBERS + 1:
        for row, column in np.argwhere(counts):
            dark = shares[row, column] > 0.6
            text = f"{shares[row, column]:.2f}\n{counts[row, column]}"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
    save(figure, path)


def draw_shapes(sides: np.ndarray, anchors: np.ndarray, recall: float | None, path: Path) -> None:
    """Sizes and shapes of objects (N, 2), width and height in input pixels, with the anchors (A, 2) as lines.

    `recall` is the share of the objects that are shaped like some anchor.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    size, shape = np.sqrt(sides.prod(axis=1)), sides[:, 0] / sides[:, 1]
    for axes, values, own, title in (
        (panels[0], size, np.sqrt(anchors.prod(axis=1)), "size: root of the area in input pixels"),
        (panels[1], shape, anchors[:, 0] / anchors[:, 1], "shape: width / height"),
    ):
        both = np.concatenate([values, own])
        edges = np.geomspace(both.min() * 0.9, both.max() * 1.1, BINS)
        axes.hist(values, edges, color="tab:blue", alpha=0.7)
        for value in own:
            axes.axvline(value, color="tab:red", linewidth=1)
        axes.set(xscale="log", xlabel=title, ylabel="objects")
        ticks = np.unique(np.round(np.geomspace(edges[0], edges[-1], 7), 1 if axes is panels[0] else 2))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
    title = "objects (blue) and anchors (red)" + ("" if recall is None else f"; best possible recall {recall:.3f}")
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def draw_counts(counts: dict[str, dict[str, int]], path: Path) -> None:
    """Objects of each class in each part of a data set, as bars; of each part a dict by class."""
    names = list(next(iter(counts.values())))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(names)), layout="constrained")
    height = 0.8 / len(counts)
    for i, (part, values) in enumerate(counts.items()):
        places = np.arange(len(names)) + (i - (len(counts) - 1) / 2) * height
        axes.barh(places, [values[name] for name in names], height, label=part)
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.set(xlabel="objects", xscale="symlog", ylim=(len(names) - 0.4, -0.6))
    axes.legend()
    save(figure, path)


def draw_means(panels: Mapping[str, Sequence[tuple[str, Sequence[float], Mean]]], path: Path) -> None:
    """In a panel for each title, side by side by name: the values of all seeds, their mean and its interval."""
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
    figure.suptitle("bar: mean and its interval; dots: seeds", fontsize="small")
    save(figure, path)
