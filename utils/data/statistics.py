"""What a data set holds: images and objects, counted; their sizes; and how well anchors fit them."""

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.duplicates import Look, look_of
from utils.data.image_checks import clip_objects, read_sample
from utils.data.image_io import file_size
from utils.data.voc import Sample
from utils.data.voc_xml import MAX_BYTES
from utils.detection.anchors import MIN_ANCHOR_IOU
from utils.detection.boxes import shape_iou
from utils.detection.letterbox import clip_boxes, fit_to_input
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.files import read_file

TRUNCATED = re.compile(rb"<truncated>\s*1\s*</truncated>")
TOLD = 10  # classes in a line


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
    return AnchorFit((overlap > MIN_ANCHOR_IOU).double().mean().item(), overlap.mean().item())


def image_size(sample: Sample) -> tuple[int, int]:
    """Height and width of an image: as its annotation states them, else from the head of its file."""
    if sample.size and min(sample.size):
        return sample.size
    return file_size(sample.image)


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


@dataclass(frozen=True)
class Inspected:
    """An image file and its objects, as they would be used."""

    sample: Sample | None  # with the true size of its image; None: it cannot be used
    look: Look | None
    truncated: int  # objects marked so
    diagnostics: list[Diagnostic]


def inspect(sample: Sample) -> Inspected:
    """Decode the image and check everything that training does; whoever asked decides about the diagnostics."""
    diagnostics, fitted, look = Diagnostics(collect=True), None, None
    with diagnostics.capture():
        image, _ = read_sample(sample, diagnostics)
        fitted = replace(clip_objects(sample, image.shape[:2], diagnostics), size=image.shape[:2])
        look = look_of(image)
    xml = read_file(sample.annotation, MAX_BYTES) if sample.annotation else b""
    return Inspected(fitted, look, len(TRUNCATED.findall(xml)), diagnostics.found)


def inspect_all(samples: Sequence[Sample], what: str, diagnostics: Diagnostics) -> list[Inspected]:
    """All samples, in threads; adds what is wrong to `diagnostics`."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        found = list(tqdm(pool.map(inspect, samples), f"images of {what}", len(samples), leave=False, disable=None))
    for item in found:
        diagnostics.extend(item.diagnostics)
    return found


def count_classes(samples: Sequence[Sample], class_names: Sequence[str], difficult: bool = True) -> dict[str, int]:
    """Objects of each class, with or without those marked difficult."""
    labels = [sample.labels if difficult else sample.labels[~sample.difficult] for sample in samples]
    labels = np.concatenate([np.zeros(0, np.int64), *labels])
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    return dict(zip(class_names, counts.tolist(), strict=True))


def describe_samples(samples: Sequence[Sample], class_names: Sequence[str]) -> str:
    """One line before a training: images, objects to train on by class, and the classes that have none."""
    counts = count_classes(samples, class_names, difficult=False)
    empty = sum(sample.difficult.all() for sample in samples)
    most = sorted(counts, key=counts.__getitem__, reverse=True)
    shown = ", ".join(f"{name} {counts[name]}" for name in most[:TOLD] if counts[name])
    others = sum(counts[name] > 0 for name in most[TOLD:])
    more = f" and {others} more classes" if others else ""
    line = f"{len(samples)} images, {empty} without objects; {sum(counts.values())} objects: {shown or 'none'}{more}"
    absent = [name for name in class_names if not counts[name]]
    return line + (f"; none of {', '.join(absent)}" if absent else "")


def summarize(found: Sequence[Inspected], class_names: Sequence[str]) -> dict[str, Any]:
    """The figures of one part of a data set."""
    samples = [item.sample for item in found if item.sample]
    boxes = np.concatenate([np.zeros((0, 4)), *(sample.boxes for sample in samples)])
    sizes = Counter(f"{sample.size[1]}x{sample.size[0]}" for sample in samples)
    return {
        "images": len(found),
        "unusable": len(found) - len(samples),
        "without_objects": sum(not len(sample.labels) for sample in samples),
        "objects": len(boxes),
        "difficult": sum(int(sample.difficult.sum()) for sample in samples),
        "truncated": sum(item.truncated for item in found),
        "classes": count_classes(samples, class_names),
        "image_sizes": dict(sizes.most_common()),
        "image_aspect": spread([sample.size[1] / sample.size[0] for sample in samples]),
        "object_side": spread(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))),
        "object_aspect": spread((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])),
    }


def spread(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """Least, median and greatest value; None without any."""
    return [round(float(value), 3) for value in np.percentile(values, [0, 50, 100])] if len(values) else None
