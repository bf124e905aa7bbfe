"""Read a sample's image and check that it agrees with the annotation: orientation, size, and boxes beyond its edges."""

from dataclasses import replace
from zlib import crc32

import numpy as np

from utils.data.image_io import decode_stored, read_encoded, turn_upright
from utils.data.voc import Sample
from utils.detection.letterbox import clip_boxes
from utils.system.diagnostics import Diagnostics
from utils.system.errors import FileError, SkippableError

OUTSIDE = "the box lies outside the image"
BEYOND = "the box reaches beyond the image and is clipped"
ZERO_BASED = "the box starts at 0, but VOC counts pixels from 1; it is clipped"


def read_sample(sample: Sample, diagnostics: Diagnostics | None = None) -> tuple[np.ndarray, int]:
    """The image (H, W, 3) that the boxes refer to, and the CRC-32 of its file."""
    diagnostics = diagnostics or Diagnostics(skips=False)
    encoded = read_encoded(sample.image)
    image, orientation = decode_stored(encoded, sample.image, diagnostics)
    return orient(sample, image, orientation, diagnostics), crc32(encoded)


def orient(sample: Sample, image: np.ndarray, orientation: int, diagnostics: Diagnostics) -> np.ndarray:
    """The image as stored or as turned by EXIF, whichever has the size that the annotation states."""
    height, width = image.shape[:2]
    if orientation == 1:
        return image
    if orientation <= 4 or height == width:  # the size is the same either way
        diagnostics.record_repair(sample.image, "has an EXIF orientation, which is ignored")
        return image
    if sample.size == (height, width):
        return image
    if sample.size == (width, height):
        return turn_upright(image, orientation)
    raise FileError(
        sample.source,
        f"states a <size> that differs from {sample.image.name}, both as stored ({width}x{height}) and as turned by "
        f"EXIF ({height}x{width}); state the one that the boxes refer to",
    )


def clip_objects(sample: Sample, size: tuple[int, int], diagnostics: Diagnostics) -> Sample:
    """The sample with its boxes clipped to its image of (height, width), without those that lie outside."""
    inside = clip_boxes(sample.boxes, size)
    clipped = (inside != sample.boxes).any(axis=1)
    check_size(sample, size, bool(clipped.any()), diagnostics)
    empty = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    if not (clipped | empty).any():
        return sample
    kept = []
    for i in range(len(inside)):
        with diagnostics.capture():
            if empty[i]:
                raise SkippableError(sample.source, OUTSIDE, sample.place(i))
            if clipped[i]:
                reason = ZERO_BASED if sample.boxes[i].min() == -1 else BEYOND
                diagnostics.record_repair(sample.source, reason, sample.place(i))
            kept.append(i)
    return replace(
        sample,
        boxes=inside[kept],
        labels=sample.labels[kept],
        difficult=sample.difficult[kept],
        numbers=tuple(map(sample.number, kept)),
    )


def check_size(sample: Sample, size: tuple[int, int], is_clipped: bool, diagnostics: Diagnostics) -> None:
    """Record a missing or wrong stated size; raises FileError for a wrong one if boxes were clipped (`is_clipped`)."""
    if sample.size == size:
        return
    stated = "no <size>" if sample.size is None else "a wrong <size>" if min(sample.size) else "an invalid <size>"
    if is_clipped and stated == "a wrong <size>":
        (height, width), (true_height, true_width) = sample.size, size
        raise FileError(
            sample.source,
            f"states the <size> {width}x{height}, but {sample.image.name} is {true_width}x{true_height}, and a box "
            "reaches beyond it; the annotation may belong to another image",
        )
    diagnostics.record_repair(sample.source, f"states {stated}; the image's own size is used")
