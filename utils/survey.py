"""What a data set holds: the shapes of its objects in the network's input, and how well anchors fit them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from utils.boxes import clip_boxes, fit_to_input, shape_iou
from utils.loss import LossSettings
from utils.problems import Mistake
from utils.voc import Sample


@dataclass(frozen=True)
class AnchorFit:
    """How well anchors fit the shapes of objects."""

    recall: float  # best possible: the share of objects that overlap some anchor by more than training asks for
    mean_iou: float  # with the best anchor of each object

    def __str__(self) -> str:
        return f"best possible recall {self.recall:.4f}, mean IoU {self.mean_iou:.4f}"


def anchor_fit(sides: Tensor, anchors: Tensor) -> AnchorFit | None:
    """Of objects (N, 2) and anchors (A, 2), width and height in pixels of the input; None without objects.

    Objects beyond the best possible recall are answered for too, but by an anchor that has to stretch far.
    """
    if not len(sides):
        return None
    overlap = shape_iou(sides, anchors).amax(dim=1).double()
    return AnchorFit((overlap > LossSettings.anchor_iou).double().mean().item(), overlap.mean().item())


def image_size(sample: Sample) -> tuple[int, int]:
    """Height and width of an image: as its annotation states them, else from the head of its file."""
    if sample.size and min(sample.size):
        return sample.size
    try:
        with Image.open(sample.image) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise Mistake(sample.image, "is not an image that can be read, and its annotation has no size") from None


def input_sides(samples: Sequence[Sample], input_size: tuple[int, int], letterbox: bool) -> Tensor:
    """Width and height (N, 2) in pixels of the input of all objects to train on, which difficult ones are not."""
    sides = [np.zeros((0, 2), np.float32)]
    for sample in samples:
        boxes, size = sample.boxes[~sample.difficult], image_size(sample)
        if len(boxes):
            fit, _ = fit_to_input(size, input_size, letterbox)
            boxes = fit.to_input(clip_boxes(boxes, size))
            sides.append(boxes[:, 2:] - boxes[:, :2])
    found = torch.from_numpy(np.concatenate(sides))
    return found[(found > 0).all(dim=1)]
