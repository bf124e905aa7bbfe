"""Decode each image once: a data set as one uint8 array at the network's input size, with its padded targets."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.boxes import Fit, clip_boxes
from utils.errors import UserError
from utils.images import fit_image, read_image
from utils.voc import Sample

DEVICE_MEMORY_SHARE = 0.4  # of a GPU's free memory that cached images may take


@dataclass(frozen=True)
class ImageCache:
    """A data set in memory. Padding in `labels` is -1; `boxes` are xyxy in pixels of the input."""

    samples: Sequence[Sample]
    images: Tensor  # (N, 3, H, W) uint8, RGB
    boxes: Tensor  # (N, M, 4) float32
    labels: Tensor  # (N, M) int64
    fits: list[Fit]  # how each image lies in the input
    sizes: list[tuple[int, int]]  # height, width of each image file

    def __len__(self) -> int:
        return len(self.images)


def build_cache(
    samples: Sequence[Sample],
    input_size: tuple[int, int],
    letterbox: bool,
    device: torch.device,
    keep_difficult: bool = False,
) -> ImageCache:
    """Read and fit every image, in threads; on a GPU the arrays live there when they fit.

    Objects marked difficult are left out unless `keep_difficult`.
    """
    images = torch.empty(len(samples), 3, *input_size, dtype=torch.uint8)
    array = images.numpy()

    def load(index: int) -> tuple[Fit, tuple[int, int]]:
        image = read_sample(samples[index])
        fitted, fit = fit_image(image, input_size, letterbox)
        array[index] = fitted.transpose(2, 0, 1)
        return fit, image.shape[:2]

    with ThreadPoolExecutor(cpu_count()) as pool:
        loaded = list(tqdm(pool.map(load, range(len(samples))), "reading images", len(samples), disable=None))
    fits, sizes = [fit for fit, _ in loaded], [size for _, size in loaded]
    boxes, labels = padded_targets(samples, fits, sizes, keep_difficult)
    if device.type == "cuda" and images.nbytes < DEVICE_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        images = images.to(device)
    return ImageCache(samples, images, boxes, labels, fits, sizes)


def read_sample(sample: Sample) -> np.ndarray:
    """The image as its annotation saw it: as stored, or turned upright by EXIF if the stated size says so."""
    image = read_image(sample.image, upright=False)
    if sample.size is None or image.shape[:2] == sample.size:
        return image
    upright = read_image(sample.image)
    return upright if upright.shape[:2] == sample.size else image


def padded_targets(
    samples: Sequence[Sample], fits: Sequence[Fit], sizes: Sequence[tuple[int, int]], keep_difficult: bool
) -> tuple[Tensor, Tensor]:
    """Boxes (N, M, 4) in input pixels and labels (N, M), with -1 beyond an image's objects."""
    kept = [np.ones_like(sample.difficult) if keep_difficult else ~sample.difficult for sample in samples]
    most = max([1, *(int(keep.sum()) for keep in kept)])
    boxes = np.zeros((len(samples), most, 4), dtype=np.float32)
    labels = np.full((len(samples), most), -1, dtype=np.int64)
    for i, (sample, keep, fit, size) in enumerate(zip(samples, kept, fits, sizes, strict=True)):
        inside = clip_boxes(sample.boxes, size)
        if ((inside[:, 2:] - inside[:, :2]) <= 0).any():
            raise UserError(
                f"{sample.image}: a box of its annotation lies outside the image, which is {size[1]}x{size[0]} pixels; "
                "the annotation may belong to another image"
            )
        boxes[i, : keep.sum()] = fit.to_input(inside[keep])
        labels[i, : keep.sum()] = sample.labels[keep]
    return torch.from_numpy(boxes), torch.from_numpy(labels)
