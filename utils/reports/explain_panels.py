"""The output of `predict.py --explain`: a picture of the maps of each image, and the maps as arrays."""

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
from utils.reports.explain import HEADS, MAX_EXPLAINED, AttentionMaps, Explainer, Explanation
from utils.reports.plots import escape_label, save_figure
from utils.system.errors import UserError
from utils.system.files import atomic_write

VIEW_SIDE = 480  # longer side of the image, in pixels
WIDTH, TITLE_HEIGHT, BAR_HEIGHT = 12.0, 0.6, 1.8  # inches, of the figure, a title and a row of bars
MIN_RANGE = 0.01  # minimum range of a color scale for factors, so that negligible differences look negligible
MAX_CHANNELS = 2  # maximum number of channels shown for each attention block
COLORMAP, OPACITY = "viridis", 0.55  # perceptually uniform, also in grayscale
BLACK_LEVEL = 0.4  # gray level of black pixels under a map


class Panels(Sink):
    """Writes NAME_explained.png, a panel of maps, and NAME_explained.npz, the maps as arrays."""

    def __init__(self, folder: Path, detector: Detector) -> None:
        super().__init__(folder, detector.spec.class_names)
        self.explainer = Explainer(detector)

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        if frame.video is not None:
            raise UserError(
                f"--explain supports images only, but {frame.video.name} is a video; pass single frames of it"
            )
        explanation = self.explainer.explain(frame.image, detections)
        path = self.new_path(f"{frame.path.stem}_explained.png")
        draw_panel(View(frame.image, explanation), detections, explanation, self.class_names, path)
        with atomic_write(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **explanation.to_arrays())


class View:
    """A downscaled image (H, W, 3) onto which maps are drawn."""

    def __init__(self, image: np.ndarray, explanation: Explanation) -> None:
        height, width = image.shape[:2]
        zoom = min(1.0, VIEW_SIDE / max(height, width))
        self.size = max(1, round(height * zoom)), max(1, round(width * zoom))
        self.picture = cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_AREA)
        self.gray = BLACK_LEVEL + (1 - BLACK_LEVEL) * cv2.cvtColor(self.picture, cv2.COLOR_RGB2GRAY) / 255
        fit, self.shrink = explanation.fit, np.float32([width / self.size[1], height / self.size[0]] * 2)
        self.fit = Fit(fit.scale_x * self.shrink[0], fit.scale_y * self.shrink[1], fit.offset_x, fit.offset_y)
        self.input_size = explanation.input_size

    def draw_map(self, axes: Axes, cells: Tensor, title: str, limits: tuple[float, float] | None = None) -> None:
        """Overlay a map (H, W), with a color bar that spans `limits`, or by default the range of its values."""
        axes.imshow(self.gray, cmap="gray", vmin=0, vmax=1)
        values = project_to_image(cells[None], self.fit, self.input_size, self.size)[0]
        low, high = limits or (None, None)
        drawn = axes.imshow(values, cmap=COLORMAP, alpha=OPACITY, vmin=low, vmax=high)
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.85, pad=0.02)
        bar.ax.tick_params(labelsize="x-small")
        bar.solids.set_alpha(1)
        axes.set_title(title, fontsize="small")
        axes.set(xticks=[], yticks=[])

    def draw_box(self, axes: Axes, box: np.ndarray) -> None:
        """Draw a box (4,) in image pixels, visible on any map."""
        x1, y1, x2, y2 = box / self.shrink
        for color, thickness in (("black", 3), ("white", 1.2)):
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=thickness))


def draw_panel(
    view: View, detections: sv.Detections, explanation: Explanation, class_names: Sequence[str], path: Path
) -> None:
    """Draw the detections, followed by a row for each kind of map that the network has."""
    shape, attention = view.size[0] / view.size[1], explanation.attention
    spatial = {place: maps for place, maps in attention.items() if maps.has_spatial}
    channels = {place: maps for place, maps in attention.items() if maps.has_channel}
    third = WIDTH / 3 * shape * 0.85  # height of a map; the color bar takes the rest of the width
    title = "Detections, and objectness predicted by each head"
    rows = [(third, title, partial(draw_found, view, detections, explanation, class_names))]
    if spatial:
        title = "Spatial attention: factor of the features, averaged over channels"
        rows.append((third, title, partial(draw_spatial, view, spatial)))
    if channels:
        title = "Channel attention: factor of each channel, in descending order (1 = unchanged)"
        rows.append((BAR_HEIGHT, title, partial(draw_channels, channels)))
        title = "Input features of the most amplified channels (place, channel and factor)"
        rows.append((third / 2, title, partial(draw_amplified, view, channels)))
    if explanation.detections:
        title = "Evidence: Grad-CAM at the head that made the detection (top), HiResCAM at stride 16 (bottom)"
        height = 2 * WIDTH / MAX_EXPLAINED * shape * 0.85 + TITLE_HEIGHT
        rows.append((height, title, partial(draw_evidence, view, detections, explanation)))
    heights = [height + TITLE_HEIGHT for height, *_ in rows]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=heights))
    for part, (_, title, draw) in zip(parts, rows, strict=True):
        part.suptitle(title, fontsize="medium")
        draw(part)
    save_figure(figure, path)


def draw_found(
    view: View, detections: sv.Detections, explanation: Explanation, class_names: Sequence[str], part: SubFigure
) -> None:
    """Draw the image with its detections, and the objectness of each head."""
    first, *others = part.subplots(1, 1 + len(HEADS))
    first.imshow(draw_detections(view.picture, replace(detections, xyxy=detections.xyxy / view.shrink), class_names))
    first.set_title(f"Detections: {len(detections)}", fontsize="small")
    first.set(xticks=[], yticks=[])
    for axes, (head, cells) in zip(others, explanation.objectness.items(), strict=True):
        view.draw_map(axes, cells, f"Objectness at {head}, {cells.shape[0]}x{cells.shape[1]} cells", (0, 1))


def draw_spatial(view: View, attention: dict[str, AttentionMaps], part: SubFigure) -> None:
    panels = part.subplots(1, len(attention), squeeze=False)[0]
    for axes, (place, maps) in zip(panels, attention.items(), strict=True):
        factors = maps.factor[0].mean(dim=0)
        view.draw_map(axes, factors, f"{place}, {describe_gain(maps)}", find_limits(factors))


def find_limits(factors: Tensor) -> tuple[float, float]:
    low, high = float(factors.min()), float(factors.max())
    more = max(0.0, MIN_RANGE - (high - low)) / 2
    return low - more, high + more


def describe_gain(maps: AttentionMaps) -> str:
    return "plain gate" if maps.gain is None else f"gain {maps.gain:.3f}"


def draw_channels(attention: dict[str, AttentionMaps], part: SubFigure) -> None:
    panels = part.subplots(1, len(attention), squeeze=False)[0]
    for axes, (place, maps) in zip(panels, attention.items(), strict=True):
        factors = maps.factor[0].mean(dim=(1, 2)).sort(descending=True).values.cpu()
        axes.set_ylim(*find_limits(torch.cat([factors, torch.ones(1)])))
        axes.fill_between(np.arange(len(factors)), 1, factors.numpy(), step="mid")  # faster than hundreds of bars
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"{place}, {describe_gain(maps)}", fontsize="small")
        axes.tick_params(labelsize="x-small")


def draw_amplified(view: View, attention: dict[str, AttentionMaps], part: SubFigure) -> None:
    panels = iter(part.subplots(1, MAX_CHANNELS * len(attention), squeeze=False)[0])
    for place, maps in attention.items():
        factors = maps.factor[0].mean(dim=(1, 2))
        for channel in factors.topk(MAX_CHANNELS).indices.tolist():
            title = f"{place} {channel}: x{factors[channel]:.2f}"
            view.draw_map(next(panels), maps.features[0, channel], title)


def draw_evidence(view: View, detections: sv.Detections, explanation: Explanation, part: SubFigure) -> None:
    """Draw the evidence for the best detections: for all similar objects (top), and for this one alone (bottom)."""
    panels = part.subplots(2, MAX_EXPLAINED)
    for axes in panels.flat:
        axes.set_axis_off()
    for column, maps in zip(panels.T, explanation.detections, strict=False):
        name, score = detections.data["class_name"][maps.detection], detections.confidence[maps.detection]
        for axes, cells, kind in zip(column, (maps.grad_cam, maps.evidence), (maps.head, "stride 16"), strict=True):
            view.draw_map(axes, cells, f"{escape_label(name)} {score:.2f}, {kind}", (0, 1))
            view.draw_box(axes, detections.xyxy[maps.detection])
