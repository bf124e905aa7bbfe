"""Statistics of a dataset: counts and sizes of images and objects, and how well anchors fit the objects."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.duplicates import ImageHash, hash_image
from utils.data.image_checks import clip_objects, read_sample
from utils.data.image_io import read_header
from utils.data.voc import Sample
from utils.data.voc_xml import count_truncated
from utils.detection.anchors import MIN_ANCHOR_IOU
from utils.detection.boxes import shape_iou
from utils.detection.letterbox import clip_boxes, fit_to_input
from utils.system.diagnostics import Diagnostic, Diagnostics

MAX_LISTED = 10  # maximum number of classes in the one-line description


class AnchorFit(NamedTuple):
    recall: float  # best possible recall: the fraction of objects whose best IoU exceeds MIN_ANCHOR_IOU
    mean_iou: float  # mean of each object's best IoU

    def __str__(self) -> str:
        return f"best possible recall {self.recall:.4f}, mean IoU {self.mean_iou:.4f}"


def anchor_fit(sides: Tensor, anchors: Tensor) -> AnchorFit | None:
    """How well anchors (A, 2) fit objects (N, 2), given as width, height in input pixels; None without objects."""
    if not len(sides):
        return None
    overlap = shape_iou(sides, anchors).amax(dim=1).double()
    return AnchorFit((overlap > MIN_ANCHOR_IOU).double().mean().item(), overlap.mean().item())


def input_sides(samples: Sequence[Sample], input_size: tuple[int, int], letterbox: bool) -> Tensor:
    """Width and height (N, 2) in input pixels of all objects except difficult ones."""
    sides = [np.zeros((0, 2), np.float32)]
    for sample in samples:
        boxes = sample.boxes[~sample.difficult]
        if len(boxes):
            size = sample.size if sample.size and min(sample.size) else read_header(sample.image)[0]
            fit, _ = fit_to_input(size, input_size, letterbox)
            boxes = fit.to_input(clip_boxes(boxes, size))
            sides.append(boxes[:, 2:] - boxes[:, :2])
    found = torch.from_numpy(np.concatenate(sides))
    return found[(found > 0).all(dim=1)]


@dataclass(frozen=True)
class InspectedSample:
    """The results of reading and checking an image and its annotation."""

    sample: Sample | None  # as used in training, with the true image size; None if unusable
    image_hash: ImageHash | None
    truncated: int  # number of objects marked as truncated
    findings: list[Diagnostic]


def inspect_sample(sample: Sample) -> InspectedSample:
    """Decode the image and run the same checks as training, collecting their findings."""
    diagnostics, checked, image_hash = Diagnostics(collect=True), None, None
    with diagnostics.capture():
        image, _ = read_sample(sample, diagnostics)
        checked = replace(clip_objects(sample, image.shape[:2], diagnostics), size=image.shape[:2])
        image_hash = hash_image(image)
    truncated = count_truncated(sample.annotation) if sample.annotation else 0
    return InspectedSample(checked, image_hash, truncated, diagnostics.found)


def inspect_samples(samples: Sequence[Sample], what: str, diagnostics: Diagnostics) -> list[InspectedSample]:
    """Inspect all samples in threads, adding the findings to `diagnostics`."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        results = pool.map(inspect_sample, samples)
        inspected = list(tqdm(results, f"images of {what}", len(samples), leave=False, disable=None))
    for item in inspected:
        diagnostics.extend(item.findings)
    return inspected


def count_classes(samples: Sequence[Sample], class_names: Sequence[str], difficult: bool = True) -> dict[str, int]:
    """The number of objects per class, with or without those marked difficult."""
    labels = [sample.labels if difficult else sample.labels[~sample.difficult] for sample in samples]
    labels = np.concatenate([np.zeros(0, np.int64), *labels])
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    return dict(zip(class_names, counts.tolist(), strict=True))


def describe_samples(samples: Sequence[Sample], class_names: Sequence[str]) -> str:
    """A line that gives the number of images, the non-difficult objects per class, and the classes without objects."""
    counts = count_classes(samples, class_names, difficult=False)
    empty = sum(sample.difficult.all() for sample in samples)
    ordered = sorted(counts, key=counts.__getitem__, reverse=True)
    listed = [f"{name} {counts[name]}" for name in ordered[:MAX_LISTED] if counts[name]]
    others = sum(counts[name] > 0 for name in ordered[MAX_LISTED:])
    listed += [f"{others} more classes"] if others else []
    absent = [name for name in class_names if not counts[name]]
    line = f"{len(samples)} images ({empty} without objects), {sum(counts.values())} objects"
    line += f": {', '.join(listed)}" if listed else ""
    return line + (f"; no objects of {', '.join(absent)}" if absent else "")


def summarize(inspected: Sequence[InspectedSample], class_names: Sequence[str]) -> dict[str, Any]:
    """The statistics of one part of a dataset."""
    samples = [item.sample for item in inspected if item.sample]
    boxes = np.concatenate([np.zeros((0, 4)), *(sample.boxes for sample in samples)])
    sizes = Counter(f"{sample.size[1]}x{sample.size[0]}" for sample in samples)
    return {
        "images": len(inspected),
        "unusable": len(inspected) - len(samples),
        "without_objects": sum(not len(sample.labels) for sample in samples),
        "objects": len(boxes),
        "difficult": sum(int(sample.difficult.sum()) for sample in samples),
        "truncated": sum(item.truncated for item in inspected),
        "classes": count_classes(samples, class_names),
        "image_sizes": dict(sizes.most_common()),
        "image_aspect": min_median_max([sample.size[1] / sample.size[0] for sample in samples]),
        "object_side": min_median_max(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))),
        "object_aspect": min_median_max((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])),
    }


def min_median_max(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """Minimum, median and maximum, rounded to three decimals; None without values."""
    return [round(float(value), 3) for value in np.percentile(values, [0, 50, 100])] if len(values) else None
