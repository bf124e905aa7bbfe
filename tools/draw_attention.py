"""Draw the attention blocks for docs/attention.md: python tools/draw_attention.py

A drawing shows the features x going through to y, and below them how each gate comes about.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.attention import ATTENTION
from utils.system.cli import run_script
from utils.system.errors import make_folder
from utils.system.files import atomic_write

DPI = 80
WIDE, HIGH, HALF = 2.35, 0.95, 0.95  # distance of boxes, and from a box's centre to its arrows, in inches
BOX = {"boxstyle": "round,pad=0.35", "facecolor": "#eef3fa", "edgecolor": "#1f5fae"}
TIMES = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": "black"}
GRAY = "#5a6577"
ARROW = {"arrowstyle": "->", "color": GRAY, "shrinkA": 4, "shrinkB": 4}

Columns = Sequence[Sequence[str]]  # of boxes, from the features to a gate

GATES: dict[str, Sequence[Columns]] = {
    "se_block": [[["mean over H, W\nC x 1 x 1"], ["linear, ReLU\nC/16"], ["linear, sigmoid\nC x 1 x 1"]]],
    "cbam_block": [
        [
            ["mean over H, W\nC x 1 x 1", "max over H, W\nC x 1 x 1"],
            ["for both: 1x1 conv,\nReLU, 1x1 conv\nC/8, then C"],
            ["add, sigmoid\nC x 1 x 1"],
        ],
        [["mean over C\n1 x H x W", "max over C\n1 x H x W"], ["7x7 conv, sigmoid\n1 x H x W"]],
    ],
    "eca_block": [[["mean over H, W\nC x 1 x 1"], ["1-D conv along\nthe channels, k = 5"], ["sigmoid\nC x 1 x 1"]]],
    "CA_Block": [
        [
            ["mean over W\nC x H x 1", "mean over H\nC x 1 x W"],
            ["joined: 1x1 conv,\nbatch norm, ReLU\nC/16 x (H + W)"],
            ["1x1 conv, sigmoid\nC x H x 1", "1x1 conv, sigmoid\nC x 1 x W"],
        ]
    ],
    "SimAM": [
        [
            ["mean over H, W\nC x 1 x 1"],
            ["distance d from it,\nsquared\nC x H x W"],
            ["d / (4 variance) + 1/2,\nsigmoid\nC x H x W"],
        ]
    ],
    "EMAAttention": [
        [
            ["32 groups\nC/32 x H x W"],
            ["a: x times gates of rows\nand columns, group norm", "c: 3x3 conv"],
            ["channels of a, weighed\nby softmax(mean c)", "channels of c, weighed\nby softmax(mean a)"],
            ["add, sigmoid\n1 x H x W a group"],
        ]
    ],
    "ELA": [
        [
            ["mean over W\nC x H", "mean over H\nC x W"],
            ["1-D conv of each\nchannel, k = 7", "the same conv"],
            ["group norm, sigmoid\nC x H x 1", "the same norm, sigmoid\nC x 1 x W"],
        ]
    ],
    "MLCA": [
        [
            ["mean of 5x5 parts\nC x 5 x 5"],
            ["1-D conv along channels\nof all parts, sigmoid\nC x 5 x 5", "mean, then as ECA\nC x 1 x 1"],
            ["half of each, spread\nC x H x W"],
        ]
    ],
    "TripletAttention": [
        [
            ["max, mean over H\n2 x C x W", "max, mean over W\n2 x C x H", "max, mean over C\n2 x H x W"],
            ["7x7 conv,\nbatch norm, sigmoid"] * 3,
            ["mean of the three\nC x H x W"],
        ]
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Draw the attention blocks for docs/attention.md."""

    folder: str = "docs/images"  # where the pictures go


def draw_box(axes: Axes, text: str, place: tuple[float, float], box: dict) -> None:
    axes.text(*place, text, ha="center", va="center", fontsize=9, bbox=box, linespacing=1.3)


def connect(axes: Axes, before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]) -> None:
    """Arrows from the boxes of a column to those of the next: one to one, or from or to a single one."""
    together = len(before) == len(after)
    pairs = zip(before, after, strict=True) if together else [(start, end) for start in before for end in after]
    for (x1, y1), (x2, y2) in pairs:
        axes.annotate("", (x2 - HALF, y2), (x1 + HALF, y1), arrowprops=ARROW)


def place_boxes(columns: Columns, left: float, tallest: int) -> list[list[tuple[float, float]]]:
    """The centre of each box, of a gate whose way begins at `left`."""
    return [
        [(left + (0.8 + i) * WIDE, HIGH * ((len(column) - tallest - 1) / 2 - row)) for row in range(len(column))]
        for i, column in enumerate(columns)
    ]


def draw_gate(
    axes: Axes, columns: Columns, places: Sequence[Sequence[tuple[float, float]]], ends: tuple[float, float]
) -> None:
    """A gate's boxes, with lines from the features at the first end, and to them at the second."""
    for column, spots in zip(columns, places, strict=True):
        for text, spot in zip(column, spots, strict=True):
            draw_box(axes, text, spot, BOX)
    for before, after in pairwise(places):
        connect(axes, before, after)
    start, end = ends
    for x, y in places[0]:
        axes.plot([start, start], [HIGH / 2, y], color=GRAY, linewidth=1)
        axes.annotate("", (x - HALF, y), (start, y), arrowprops=ARROW | {"shrinkA": 0})
    for x, y in places[-1]:
        axes.plot([x + HALF, end], [y, y], color=GRAY, linewidth=1)
        axes.annotate("", (end, HIGH / 2 - 0.15), (end, y), arrowprops=ARROW | {"shrinkA": 0})
    draw_box(axes, "\N{MULTIPLICATION SIGN}", (end, HIGH / 2), TIMES)


def draw_block(gates: Sequence[Columns], path: Path) -> None:
    """The features along the top, and each gate's way below, from where it begins to where it multiplies."""
    tallest = max(len(column) for columns in gates for column in columns)
    length = sum(len(columns) + 0.8 for columns in gates) * WIDE
    figure, axes = plt.subplots(figsize=(length + 1.6, HIGH * (tallest + 1)))
    axes.set(xlim=(-0.6, length + 1), ylim=(-HIGH * tallest - 0.1, HIGH - 0.1))
    axes.set_axis_off()
    axes.annotate("", (length, HIGH / 2), (0, HIGH / 2), arrowprops=ARROW)
    draw_box(axes, "x\nC x H x W", (0, HIGH / 2), BOX)
    draw_box(axes, "y\nC x H x W", (length + 0.3, HIGH / 2), BOX)
    left = 0.0
    for columns in gates:
        right = left + (len(columns) + 0.8) * WIDE
        ends = left + 0.25 * WIDE, right - 0.3 * WIDE
        draw_gate(axes, columns, place_boxes(columns, left, tallest), ends)
        left = right
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def main(config: Config) -> None:
    make_folder(Path(config.folder))
    for name in (block.__name__ for block in ATTENTION.values() if block):
        draw_block(GATES[name], Path(config.folder) / f"attention_{name}.png")
    print(f"drew {len(GATES)} blocks into {config.folder}")


if __name__ == "__main__":
    run_script(main, Config)
