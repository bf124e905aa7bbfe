"""A panel of each image that shows what the network looked at, and its arrays: `predict.py --explain`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import supervision as sv
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor

from utils.detection.boxes import project_to_image
from utils.detection.letterbox import Fit
from utils.inference.detector import Detector
from utils.inference.drawing import draw_detections
from utils.inference.sinks import Sink
from utils.inference.video import Frame
from utils.reports.explain import HEADS, MAX_CAUSES, Attended, Explainer, Explanation
from utils.reports.plots import plain, save
from utils.system.errors import UserError
from utils.system.files import atomic_write

VIEW_SIDE = 480  # pixels of the longer side of the image in a panel
WIDTH, TITLES = 12.0, 0.6  # inches: of a panel, and of the titles of a row
BARS = 1.8  # inches: the height of a row of bars
MIN_RANGE = 0.01  # of a scale of factors; smaller differences should look like none
BOOSTED = 2  # channels shown of each place
COLOURS, OPACITY = "viridis", 0.55  # lighter all the way up, so that it can be read in print without colour
PALE = 0.4  # how light the black of the image is under a map


class Panels(Sink):
    """NAME_explained.png: the panel of an image; NAME_explained.npz: its arrays."""

    def __init__(self, folder: Path, detector: Detector) -> None:
        super().__init__(folder, detector.spec.class_names)
        self.explainer = Explainer(detector)

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        if frame.video is not None:
            raise UserError(f"explain draws images, and {frame.video.name} is a video; give single frames of it")
        explanation = self.explainer(frame.image, detections)
        path = self.place(f"{frame.path.stem}_explained.png")
        draw_panel(View(frame.image, explanation), detections, explanation, self.class_names, path)
        with atomic_write(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **explanation.arrays())


class View:
    """An image (H, W, 3), made small for a panel, with the maps of the network over it."""

    def __init__(self, image: np.ndarray, explanation: Explanation) -> None:
        height, width = image.shape[:2]
        zoom = min(1.0, VIEW_SIDE / max(height, width))
        self.size = max(1, round(height * zoom)), max(1, round(width * zoom))
        self.picture = cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_AREA)
        self.gray = PALE + (1 - PALE) * cv2.cvtColor(self.picture, cv2.COLOR_RGB2GRAY) / 255
        fit, self.shrink = explanation.fit, np.float32([width / self.size[1], height / self.size[0]] * 2)
        self.fit = Fit(fit.scale_x * self.shrink[0], fit.scale_y * self.shrink[1], fit.offset_x, fit.offset_y)
        self.input_size = explanation.input_size

    def draw(self, axes: Axes, cells: Tensor, title: str, limits: tuple[float | None, float | None]) -> None:
        """A map (H, W) over the image, with its scale, whose ends are `limits` or the map's own."""
        axes.imshow(self.gray, cmap="gray", vmin=0, vmax=1)
        values = project_to_image(cells[None], self.fit, self.input_size, self.size)[0]
        drawn = axes.imshow(values, cmap=COLOURS, alpha=OPACITY, vmin=limits[0], vmax=limits[1])
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.85, pad=0.02)
        bar.ax.tick_params(labelsize="x-small")
        bar.solids.set_alpha(1)
        label(axes, title)

    def frame(self, axes: Axes, box: np.ndarray) -> None:
        """A frame around a box (4,) of the image, seen on any map."""
        x1, y1, x2, y2 = box / self.shrink
        for colour, thickness in (("black", 3), ("white", 1.2)):
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=thickness))


def label(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize="small")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_panel(
    view: View, detections: sv.Detections, explanation: Explanation, class_names: Sequence[str], path: Path
) -> None:
    """What was found, then a row for each kind of map that the network has."""
    shape, attention = view.size[0] / view.size[1], explanation.attention
    spatial = {place: attended for place, attended in attention.items() if attended.has_spatial}
    channels = {place: attended for place, attended in attention.items() if attended.has_channel}
    third = WIDTH / 3 * shape * 0.85  # the scale beside a map takes the rest
    rows = [(third, partial(draw_found, view, detections, explanation, class_names))]
    if spatial:
        rows.append((third, partial(draw_places, view, spatial)))
    if channels:
        rows.append((BARS, partial(draw_bars, channels)))
        rows.append((third / 2, partial(draw_boosted, view, channels)))
    if explanation.causes:
        rows.append((2 * WIDTH / 4 * shape * 0.85 + TITLES, partial(draw_causes, view, detections, explanation)))
    heights = [height + TITLES for height, _ in rows]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=heights))
    for part, (_, draw) in zip(parts, rows, strict=True):
        draw(part)
    save(figure, path)


def draw_found(
    view: View, detections: sv.Detections, explanation: Explanation, class_names: Sequence[str], part: SubFigure
) -> None:
    """The image with its boxes, and the objectness of each head."""
    part.suptitle("What was found, and where each head sees an object", fontsize="medium")
    first, *others = part.subplots(1, 1 + len(HEADS))
    first.imshow(draw_detections(view.picture, replace(detections, xyxy=detections.xyxy / view.shrink), class_names))
    label(first, f"found: {len(detections)}")
    for axes, (head, cells) in zip(others, explanation.objectness.items(), strict=True):
        view.draw(axes, cells, f"objectness at {head}, {cells.shape[0]}x{cells.shape[1]} cells", (0, 1))


def draw_places(view: View, attention: dict[str, Attended], part: SubFigure) -> None:
    """What each block multiplies the features by, at each position."""
    part.suptitle("Attention over the image: the factor of the features, mean over the channels", fontsize="medium")
    for axes, (place, attended) in zip(
        part.subplots(1, len(attention), squeeze=False)[0], attention.items(), strict=True
    ):
        factors = attended.factor[0].mean(dim=0)
        view.draw(axes, factors, f"{place}, {describe_gain(attended)}", scale_of(factors))


def scale_of(factors: Tensor) -> tuple[float, float]:
    """From the least factor to the greatest, and at least MIN_RANGE around them."""
    low, high = float(factors.min()), float(factors.max())
    more = max(0.0, MIN_RANGE - (high - low)) / 2
    return low - more, high + more


def describe_gain(attended: Attended) -> str:
    return "plain gate" if attended.gain is None else f"gain {attended.gain:.3f}"


def draw_bars(attention: dict[str, Attended], part: SubFigure) -> None:
    """What each block multiplies each channel by, the greatest first."""
    part.suptitle("Attention over the channels: the factor of each, sorted", fontsize="medium")
    for axes, (place, attended) in zip(
        part.subplots(1, len(attention), squeeze=False)[0], attention.items(), strict=True
    ):
        factors = channel_factors(attended).sort(descending=True).values.cpu()
        values = factors.numpy()
        axes.set_ylim(*scale_of(torch.cat([factors, torch.ones(1)])))
        axes.fill_between(np.arange(len(values)), 1, values, step="mid")  # as bars, of which there are many
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"{place}, {describe_gain(attended)}; 1 leaves a channel as it is", fontsize="small")
        axes.tick_params(labelsize="x-small")


def channel_factors(attended: Attended) -> Tensor:
    """(C,) means over the positions."""
    return attended.factor[0].mean(dim=(1, 2))


def draw_boosted(view: View, attention: dict[str, Attended], part: SubFigure) -> None:
    """The features of the channels with the greatest factors, as they came to the block."""
    part.suptitle("Features of the most boosted channels", fontsize="medium")
    panels = iter(part.subplots(1, BOOSTED * len(attention), squeeze=False)[0])
    for place, attended in attention.items():
        factors = channel_factors(attended)
        for channel in factors.topk(BOOSTED).indices.tolist():
            title = f"{place} {channel}: x {factors[channel]:.2f}"
            view.draw(next(panels), attended.features[0, channel], title, (None, None))


def draw_causes(view: View, detections: sv.Detections, explanation: Explanation, part: SubFigure) -> None:
    """Of the best detections, where what speaks for them lies: above for all such objects, below for this one."""
    part.suptitle(
        "Why: above Grad-CAM at the head that found it, below what spoke for this one alone", fontsize="medium"
    )
    panels = part.subplots(2, MAX_CAUSES)
    for axes in panels.flat:
        axes.set_axis_off()
    for column, cause in zip(panels.T, explanation.causes, strict=False):
        name, score = detections.data["class_name"][cause.detection], detections.confidence[cause.detection]
        for axes, cells, what in zip(column, (cause.grad_cam, cause.evidence), (cause.head, "evidence"), strict=True):
            view.draw(axes, cells, f"{plain(name)} {score:.2f}, {what}", (0, 1))
            view.frame(axes, detections.xyxy[cause.detection])
