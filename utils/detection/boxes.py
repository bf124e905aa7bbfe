"""Box arithmetic. Boxes are float xyxy in pixels of the image they belong to, unless a name says otherwise."""

from math import pi

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.ops import box_iou

from utils.detection.letterbox import Fit

EPSILON = 1e-7  # avoids division by zero; same value as in torchvision


def project_to_image(cells: Tensor, fit: Fit, input_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Resample feature maps (K, H, W) of the network's input to the original image of (height, width): (K, *size)."""
    (height, width), (input_height, input_width) = size, input_size
    y = ((torch.arange(height) + 0.5) * fit.scale_y + fit.offset_y) / input_height  # centers of the pixels, in 0..1
    x = ((torch.arange(width) + 0.5) * fit.scale_x + fit.offset_x) / input_width
    grid = torch.stack(torch.meshgrid(2 * x - 1, 2 * y - 1, indexing="xy"), dim=-1)  # (height, width, 2)
    cells = cells.detach().float().cpu()
    return grid_sample(cells[None], grid[None], padding_mode="border", align_corners=False)[0].numpy()


def ciou(boxes: Tensor, others: Tensor) -> Tensor:
    """Complete IoU (arXiv 1911.08287) of pairs: (..., 4) and (..., 4) xyxy -> (...), at most 1.

    Unlike torchvision's version, it does not synchronize with the GPU.
    """
    sides, other_sides = boxes[..., 2:] - boxes[..., :2], others[..., 2:] - others[..., :2]
    corners = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = area((corners[1] - corners[0]).clamp(min=0))
    iou = overlap / (area(sides) + area(other_sides) - overlap + EPSILON)
    around = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    apart = (boxes[..., :2] + boxes[..., 2:] - others[..., :2] - others[..., 2:]) / 2
    distance = apart.square().sum(dim=-1) / (around.square().sum(dim=-1) + EPSILON)
    angle = torch.atan(sides[..., 0] / sides[..., 1]) - torch.atan(other_sides[..., 0] / other_sides[..., 1])
    shape = 4 / pi**2 * angle.square()
    weight = (shape / (1 - iou + shape + EPSILON)).detach()
    return iou - distance - weight * shape


def area(sides: Tensor) -> Tensor:
    """Widths and heights (..., 2) -> areas (...); the backward pass of `prod` would synchronize with the GPU."""
    return sides[..., 0] * sides[..., 1]


def box_area(boxes: Tensor) -> Tensor:
    return area(boxes[..., 2:] - boxes[..., :2])


def batched_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of all pairs within each image: (B, N, 4) and (B, M, 4) xyxy -> (B, N, M); 0 for empty boxes."""
    left_top = torch.maximum(boxes[:, :, None, :2], others[:, None, :, :2])
    right_bottom = torch.minimum(boxes[:, :, None, 2:], others[:, None, :, 2:])
    overlap = area((right_bottom - left_top).clamp_(min=0))  # (B, N, M)
    union = box_area(boxes)[:, :, None] + box_area(others)[:, None, :] - overlap
    return overlap / union.clamp(min=1e-9)


def iou_matrix(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of all pairs: (N, 4) and (M, 4) xyxy -> (N, M) float64."""
    return box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(others).double()).numpy()


def shape_iou(sides: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes aligned at one corner: widths and heights (..., 2) and (N, 2) -> (..., N)."""
    overlap = area(torch.minimum(sides[..., None, :], others))
    return overlap / (area(sides)[..., None] + area(others) - overlap)
