"""Placement of an image in the network's input, stretched or letterboxed, and the same transform of boxes."""

from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """Transform from image to network input, per axis: input = original * scale + offset."""

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    def to_input(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) xyxy in the original image -> (N, 4) xyxy in the network's input."""
        return boxes * np.float32([self.scale_x, self.scale_y] * 2) + np.float32([self.offset_x, self.offset_y] * 2)

    def to_original(self, boxes: np.ndarray) -> np.ndarray:
        """The inverse of `to_input`."""
        return (boxes - np.float32([self.offset_x, self.offset_y] * 2)) / np.float32([self.scale_x, self.scale_y] * 2)


def fit_to_input(size: tuple[int, int], input_size: tuple[int, int], letterbox: bool) -> tuple[Fit, tuple[int, int]]:
    """The transform of an image of `size` to an input of `input_size` (both height, width), and the resized size."""
    (height, width), (input_height, input_width) = size, input_size
    if not letterbox:
        return Fit(input_width / width, input_height / height, 0.0, 0.0), input_size
    scale = min(input_width / width, input_height / height)
    inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    left, top = (input_width - inner_width) // 2, (input_height - inner_height) // 2
    return Fit(inner_width / width, inner_height / height, float(left), float(top)), (inner_height, inner_width)


def clip_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) xyxy clipped to an image of (height, width)."""
    height, width = size
    return np.clip(boxes, 0, np.float32([width, height, width, height]))
