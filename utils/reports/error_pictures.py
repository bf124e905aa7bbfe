"""Pictures of errors in the evaluation report: false positives, missed objects and likely label errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import supervision as sv

from utils.data.cache import ImageCache
from utils.data.image_checks import read_sample
from utils.data.image_io import encode_image
from utils.data.voc import Sample
from utils.evaluation.coco import estimate_influence
from utils.evaluation.label_errors import LabelError
from utils.evaluation.metrics import Evaluation, filter_confident, inside_difficult, pair_boxes
from utils.inference.drawing import choose_region, draw_view
from utils.reports.html import data_uri

MAX_WORST = 12  # maximum number of images on the page


@dataclass(frozen=True)
class ErrorPictures:
    """Draws images with their labels and, for comparison, with their detections; yellow frames mark the errors."""

    cache: ImageCache
    detections: Sequence[sv.Detections]
    evaluation: Evaluation
    class_names: Sequence[str]

    def draw_worst_images(self) -> list[dict[str, Any]]:
        """The images that lower AP the most, with missed objects and false positives marked."""
        costs = estimate_influence(self.evaluation.matches, len(self.cache))
        worst = []
        for i in np.argsort(-costs, kind="stable")[:MAX_WORST].tolist():
            if costs[i] <= 0:
                break
            sample, found = self.cache.samples[i], filter_confident(self.detections[i], self.evaluation.thresholds)
            missed, false = ~sample.difficult, ~inside_difficult(sample, found)
            for row, column in pair_boxes(sample, found):
                correct = sample.labels[column] == found.class_id[row]
                missed[column] &= not correct
                false[row] &= not (correct or sample.difficult[column])
            caption = (
                f"lowers AP by {100 * costs[i]:.2f} points: {missed.sum()} of {(~sample.difficult).sum()} objects "
                f"missed, {false.sum()} false positives"
            )
            pictures = self.draw_pair(i, sample.boxes[missed], found.xyxy[false])
            worst.append({"image": sample.name, "file": str(sample.image), "caption": caption} | pictures)
        return worst

    def draw_label_error(self, error: LabelError) -> dict[str, Any]:
        part, box = choose_region(error.box, self.cache.sizes[error.image]), error.box[None]
        return describe_error(error, self.cache.samples[error.image]) | self.draw_pair(error.image, box, box, part)

    def draw_pair(
        self, i: int, marks: np.ndarray, found_marks: np.ndarray, part: tuple[int, int, int, int] | None = None
    ) -> dict[str, str]:
        """Data URIs of an image, or a part of it, with its labels and with its detections."""
        sample = self.cache.samples[i]
        image, _ = read_sample(sample)
        found = filter_confident(self.detections[i], self.evaluation.thresholds)
        objects = sv.Detections(sample.boxes, class_id=sample.labels)
        views = {
            "labels": draw_view(image, objects, self.class_names, marks, part),
            "detections": draw_view(image, found, self.class_names, found_marks, part),
        }
        return {name: data_uri(encode_image(view, ".jpg"), "jpeg") for name, view in views.items()}


def describe_error(error: LabelError, sample: Sample) -> dict[str, Any]:
    """The entry of a label error in label_errors.json; the box is in pixels, counted from 0."""
    score, box = round(float(error.score), 4), [round(float(edge), 1) for edge in error.box]
    entry = {"image": sample.name, "file": str(sample.image), "kind": error.kind}
    return entry | {"score": score, "box": box, "reason": error.reason}
