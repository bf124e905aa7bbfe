"""Likely label errors: planted ones are found, correct labels and crowds are not reported."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import supervision as sv

from utils.data.voc import Sample, load_classes, load_samples
from utils.evaluation.coco import build_dataset
from utils.evaluation.label_errors import find_label_errors
from utils.evaluation.metrics import compute_curves, confusion_matrix, evaluate


def simulate_detections(samples: list[Sample], random: np.random.Generator) -> list[sv.Detections]:
    """The output of a good detector: every object, close to its box and with a high score."""
    return [
        sv.Detections(
            sample.boxes + random.uniform(-1, 1, sample.boxes.shape).astype(np.float32),
            confidence=random.uniform(0.5, 0.9, len(sample.labels)),
            class_id=sample.labels.copy(),
        )
        for sample in samples
    ]


def make_split(devkit: Path) -> tuple[tuple[str, ...], list[Sample], list[sv.Detections]]:
    """Class names, samples and good detections."""
    names = load_classes(devkit / "Demo" / "classes.txt")
    samples = load_samples(devkit, ["Demo/train"], names)
    return names, samples, simulate_detections(samples, np.random.default_rng(0))


@pytest.fixture(scope="module")
def split(devkit):
    return make_split(devkit)


def relabel(sample: Sample, **changed: np.ndarray) -> Sample:
    return Sample(**vars(sample) | changed)


def test_ranks_planted_label_errors_first(split):
    names, right, detections = split
    kinds = ["not labeled", "wrong class", "inaccurate box", "not detected"]
    samples = list(right)
    planted = [i for i, sample in enumerate(right) if len(sample.labels) > 1][:4]
    without, swapped, moved, invented = (right[i] for i in planted)
    samples[planted[0]] = relabel(
        without, boxes=without.boxes[1:], labels=without.labels[1:], difficult=without.difficult[1:]
    )
    samples[planted[1]] = relabel(swapped, labels=np.append((swapped.labels[0] + 1) % 6, swapped.labels[1:]))
    box = moved.boxes[0]
    shift = np.array([(box[2] - box[0]) * 0.4, 0, (box[2] - box[0]) * 0.4, 0], np.float32)  # IoU 0.43
    samples[planted[2]] = relabel(moved, boxes=np.vstack([box + shift, moved.boxes[1:]]))
    samples[planted[3]] = relabel(
        invented,
        boxes=np.vstack([invented.boxes, [[1, 1, 4, 4]]]).astype(np.float32),
        labels=np.append(invented.labels, 0),
        difficult=np.append(invented.difficult, False),
    )
    sizes = [sample.size for sample in samples]
    measured = evaluate(samples, detections, sizes, names)
    found = find_label_errors(samples, detections, measured.curves, [0.3] * len(names), names)
    assert {(item.image, item.kind) for item in found[:4]} == set(zip(planted, kinds, strict=True))
    assert all(a.score >= b.score for a, b in pairwise(found))
    reasons = {item.kind: item.reason for item in found[:4]}
    assert names[swapped.labels[0]] in reasons["wrong class"]
    assert names[without.labels[0]] in reasons["not labeled"]
    missing = next(item for item in found if item.kind == "not labeled")
    np.testing.assert_allclose(missing.box, without.boxes[0], atol=1.1)


def test_ignores_detections_inside_crowds():
    """They are not false positives either, since a crowd stands for any number of objects."""
    crowd = Sample("a", Path("a.jpg"), None, np.float32([[0, 0, 400, 400]]), np.array([0]), np.array([True]))
    corners = np.float32([[x, y] for x in range(20, 300, 70) for y in range(20, 300, 70)])
    people = sv.Detections(
        np.hstack([corners, corners + 50]), confidence=np.full(len(corners), 0.9), class_id=np.zeros(len(corners), int)
    )
    dog = Sample("b", Path("b.jpg"), None, np.float32([[0, 0, 9, 9]] * 2), np.array([0, 1]), np.array([False, False]))
    pair = sv.Detections(dog.boxes, confidence=np.array([0.9, 0.9]), class_id=dog.labels)
    names, thresholds = ["person", "dog", "ox"], [0.3, 0.3, 0.3]
    curves = compute_curves([crowd, dog], [people, pair], 3)
    assert find_label_errors([crowd, dog], [people, pair], curves, thresholds, names) == []
    assert confusion_matrix([crowd], [people], thresholds).sum() == 0
    assert len(compute_curves([crowd], [people], 3)[0].scores) == len(corners)  # false positives by VOC's rules
    assert len(compute_curves([crowd], [people], 3, crowds=True)[0].scores) == 0
    measured = evaluate([crowd], [people], [(400, 400)], names, build_dataset([crowd], [(400, 400)], names))
    assert measured.metrics["best"]["person"]["precision"] == -1  # no objects and no false positives
    dogs, oxen = (
        sv.Detections(people.xyxy, confidence=people.confidence, class_id=people.class_id + i) for i in (1, 2)
    )
    assert len(find_label_errors([crowd], [dogs], curves, thresholds, names)) == len(corners)
    assert find_label_errors([crowd], [oxen], curves, thresholds, names) == []  # a class that the labels do not contain


def test_reports_no_errors_in_correct_labels(split):
    names, samples, detections = split
    measured = evaluate(samples, detections, [sample.size for sample in samples], names)
    assert find_label_errors(samples, detections, measured.curves, [0.3] * len(names), names) == []
