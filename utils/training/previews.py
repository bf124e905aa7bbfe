"""Pictures of what the network sees: augmented training batches, and validation images with its detections."""

from collections.abc import Sequence

import numpy as np
import supervision as sv

from utils.data.augment import draw
from utils.data.cache import ImageCache
from utils.data.loader import Batches
from utils.evaluation.metrics import confident
from utils.inference.drawing import draw_sheet, draw_targets

MAX_IMAGES = 8  # per picture


def draw_batch(batches: Batches, number: int, class_names: Sequence[str]) -> np.ndarray:
    """The first images of a training batch with their boxes, as one RGB picture."""
    batch = batches.prepare(number, MAX_IMAGES)
    images = draw(batch._replace(images=batch.images.cpu()))
    return draw_targets(images, batch.boxes, batch.labels, class_names)


def draw_examples(
    detections: Sequence[sv.Detections], thresholds: Sequence[float], cache: ImageCache, class_names: Sequence[str]
) -> np.ndarray:
    """The first validation images with the detections that prediction would show, as one RGB picture."""
    shown = []
    for detected, fit in zip(detections[:MAX_IMAGES], cache.fits, strict=False):
        kept = confident(detected, thresholds)
        boxes = fit.to_input(kept.xyxy)
        shown.append(sv.Detections(boxes, confidence=kept.confidence, class_id=kept.class_id))
    return draw_sheet(cache.images[:MAX_IMAGES], shown, class_names)
