"""A sample's image and its boxes together: which way round the image is, its true size, and what lies outside it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import numpy as np

from utils.data.image_io import decode_stored, read_encoded, turn_upright
from utils.data.voc import Sample
from utils.detection.letterbox import clip_boxes
from utils.system.diagnostics import Diagnostic, Diagnostics, FileError, SkippableError

OUTSIDE = "the box lies outside the image"
BEYOND = "the box reaches beyond the image; its part inside counts"
ZERO = "the box begins at 0, but the first pixel is 1; its part inside counts"


def look_at(sample: Sample, diagnostics: Diagnostics) -> Sample | None:
    """Everything that training checks of a sample's image and objects: the sample as it is used, None if it is not."""
    with diagnostics.capture():
        image, _ = read_sample(sample, diagnostics)
        return fit_objects(sample, image.shape[:2], diagnostics)
    return None


def read_sample(sample: Sample, diagnostics: Diagnostics | None = None) -> tuple[np.ndarray, int]:
    """The image (H, W, 3) that the annotation saw, and the CRC-32 of its file."""
    diagnostics = diagnostics or Diagnostics(skips=False)
    encoded = read_encoded(sample.image)
    image, orientation = decode_stored(encoded, sample.image, diagnostics)
    return orient(sample, image, orientation, diagnostics), crc32(encoded)


def orient(sample: Sample, image: np.ndarray, orientation: int, diagnostics: Diagnostics) -> np.ndarray:
    """The image as it is stored, or turned by EXIF: whichever has the size that the annotation states."""
    height, width = image.shape[:2]
    if orientation == 1:
        return image
    if orientation <= 4 or height == width:  # both have the same size
        diagnostics.record_repair(
            sample.image, "is turned by EXIF, which the annotation may not know; the stored pixels count"
        )
        return image
    if sample.size == (height, width):
        return image
    if sample.size == (width, height):
        return turn_upright(image, orientation)
    raise FileError(
        sample.source,
        f"states a <size> that is neither that of {sample.image.name} as it is stored, {width}x{height}, nor as EXIF "
        f"turns it, {height}x{width}; write the one that the boxes were drawn on",
    )


def fit_objects(sample: Sample, size: tuple[int, int], diagnostics: Diagnostics) -> Sample:
    """The sample with its boxes cut to its image of (height, width), and without those that lie outside."""
    inside = clip_boxes(sample.boxes, size)
    cut = (inside != sample.boxes).any(axis=1)
    check_size(sample, size, bool(cut.any()), diagnostics)
    empty = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    if not (cut | empty).any():
        return sample
    kept = []
    for i in range(len(inside)):
        with diagnostics.capture():
            if empty[i]:
                raise SkippableError(sample.source, OUTSIDE, sample.place(i))
            if cut[i]:
                diagnostics.record_repair(
                    sample.source, ZERO if sample.boxes[i].min() == -1 else BEYOND, sample.place(i)
                )
            kept.append(i)
    return replace(
        sample,
        boxes=inside[kept],
        labels=sample.labels[kept],
        difficult=sample.difficult[kept],
        numbers=tuple(int(sample.place(i).split()[1]) for i in kept),
    )


def check_size(sample: Sample, size: tuple[int, int], reaches_out: bool, diagnostics: Diagnostics) -> None:
    """Compare the size that the annotation states with the image's."""
    if sample.size == size:
        return
    if sample.size is None:
        diagnostics.record_repair(sample.source, "states no <size>; the image's own counts")
    elif min(sample.size) == 0:
        diagnostics.record_repair(sample.source, "states a <size> that no image has; the image's own counts")
    elif reaches_out:
        (height, width), (true_height, true_width) = sample.size, size
        raise FileError(
            sample.source,
            f"states the <size> {width}x{height}, but {sample.image.name} has {true_width}x{true_height}, and a box "
            "reaches beyond it; the annotation may belong to another image",
        )
    else:
        diagnostics.record_repair(sample.source, "states another size than the image has; the image's own counts")


def check_once(samples: Sequence[Sample], sets: Sequence[str], diagnostics: Diagnostics) -> None:
    """Add the error of images that `sets` name several times, and that a measurement would count as often."""
    times = Counter(sample.image.resolve() for sample in samples)
    twice = [path for path, count in times.items() if count > 1]
    if twice:
        reason = f"name {len(twice)} images twice, which would count twice, such as {twice[0]}"
        diagnostics.add(Diagnostic("error", ", ".join(sets), "", reason))


def check_overlap(train: Sequence[Sample], val: Sequence[Sample], diagnostics: Diagnostics) -> None:
    """Add the error of images in the training and in the validation sets, which would make the validation worthless."""
    known = {sample.image for sample in train}
    shared = [sample for sample in val if sample.image in known]
    if shared:
        more = f", and so are {len(shared) - 1} others" if len(shared) > 1 else ""
        reason = f"is in the training and in the validation sets{more}; tools/make_splits.py can make sets apart"
        diagnostics.add(Diagnostic("error", str(shared[0].image), "", reason))
