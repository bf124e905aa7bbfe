"""Draw boxes and labels on images."""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import supervision as sv
from torch import Tensor

from utils.data.image_io import PADDING
from utils.detection.letterbox import Fit, clip_boxes

VIEW_SIDE = 480  # longer side of a view, in pixels
MIN_SIDE = 3  # minimum side of a box in a view, in pixels
LETTER_WIDTH, MIN_TEXT_SCALE = 18, 0.4  # approximate pixels per letter at text scale 1; smallest legible scale
MAX_ZOOM = 4
CONTEXT = 1.5  # distance from the center of a box to the edges of its view, relative to the longer side of the box
COLUMNS = 4  # images in a row of a sheet
MARK = (((0, 0, 0), 5), ((255, 230, 0), 2))  # colors and widths of two lines, visible on any background


def draw_detections(image: np.ndarray, detections: sv.Detections, class_names: Sequence[str]) -> np.ndarray:
    """Draw boxes and labels (class, track ID, score) on a copy of an RGB image."""
    size = image.shape[1], image.shape[0]
    thickness = sv.calculate_optimal_line_thickness(size)
    confidence, tracks = detections.confidence, detections.tracker_id
    labels = [
        class_names[label]
        + (f" #{tracks[i]}" if tracks is not None and tracks[i] >= 0 else "")
        + (f" {confidence[i]:.2f}" if confidence is not None else "")
        for i, label in enumerate(detections.class_id)
    ]
    text_scale = sv.calculate_optimal_text_scale(size)
    if labels:  # so that labels do not cover small objects
        box_width = np.median(detections.xyxy[:, 2] - detections.xyxy[:, 0])
        fitting_scale = float(box_width / (LETTER_WIDTH * max(map(len, labels))))
        text_scale = min(text_scale, max(fitting_scale, text_scale / 2))
    picture = sv.BoxAnnotator(thickness=thickness).annotate(image.copy(), detections)
    annotator = sv.LabelAnnotator(
        text_scale=max(MIN_TEXT_SCALE, text_scale),
        text_thickness=max(1, thickness // 2),
        text_padding=max(2, thickness),
        smart_position=True,
    )
    return annotator.annotate(picture, detections, labels=labels)


def choose_region(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The region (left, top, right, bottom) to show around a box (4,) in an image of (height, width)."""
    reach = max(CONTEXT * max(box[2:] - box[:2]), VIEW_SIDE / MAX_ZOOM / 2)
    center = (box[:2] + box[2:]) / 2
    corners = np.maximum(center - reach, 0), np.minimum(np.ceil(center + reach), size[::-1])
    return tuple(np.concatenate(corners).astype(int).tolist())


def draw_view(
    image: np.ndarray,
    detections: sv.Detections,
    class_names: Sequence[str],
    marks: np.ndarray,
    part: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Draw an RGB image or a part of it, scaled to VIEW_SIDE, with its boxes and with frames around `marks` (K, 4)."""
    left, top, right, bottom = part or (0, 0, image.shape[1], image.shape[0])
    zoom = min(MAX_ZOOM, VIEW_SIDE / max(right - left, bottom - top))
    size = max(1, round((right - left) * zoom)), max(1, round((bottom - top) * zoom))
    interpolation = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    view = cv2.resize(image[top:bottom, left:right], size, interpolation=interpolation)
    to_view = Fit(zoom, zoom, -left * zoom, -top * zoom)
    for x1, y1, x2, y2 in to_view.to_input(marks).round().astype(int).tolist():
        for color, thickness in MARK:
            cv2.rectangle(view, (x1 - 4, y1 - 4), (x2 + 4, y2 + 4), color, thickness)
    boxes = to_view.to_input(detections.xyxy)
    inside = (boxes[:, 2:] > 0).all(axis=1) & (boxes[:, :2] < size).all(axis=1)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + MIN_SIDE)
    boxes = clip_boxes(boxes, size[::-1])
    return draw_detections(view, replace(detections, xyxy=boxes)[inside], class_names)


def draw_sheet(images: Tensor, detections: Sequence[sv.Detections], class_names: Sequence[str]) -> np.ndarray:
    """Draw uint8 RGB images (N, 3, H, W) with their boxes side by side on a sheet (H', W', 3)."""
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    pictures = [draw_detections(im, found, class_names) for im, found in zip(pixels, detections, strict=True)]
    pictures += [np.full_like(pictures[0], PADDING)] * (-len(pictures) % COLUMNS)
    return np.vstack([np.hstack(pictures[i : i + COLUMNS]) for i in range(0, len(pictures), COLUMNS)])


def draw_targets(images: Tensor, boxes: Tensor, labels: Tensor, class_names: Sequence[str]) -> np.ndarray:
    """Draw a training batch on a sheet: images (N, 3, H, W) in 0..1, boxes (N, M, 4), labels (N, M) padded with -1."""
    objects = [
        sv.Detections(box[label >= 0], class_id=label[label >= 0])
        for box, label in zip(boxes.cpu().numpy(), labels.cpu().numpy(), strict=True)
    ]
    return draw_sheet((images * 255).round().byte(), objects, class_names)
