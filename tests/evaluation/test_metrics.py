"""VOC metrics, compared with an independent devkit and with values worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import supervision as sv

from tests.conftest import REFERENCE, needs_shared
from utils.data.voc import Sample
from utils.evaluation.metrics import Curve, compute_curves, confusion_matrix, evaluate


def sample(boxes, labels, difficult=None) -> Sample:
    difficult = [False] * len(labels) if difficult is None else difficult
    return Sample(
        "a",
        Path("a.jpg"),
        None,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(difficult, bool),
    )


def found(boxes, labels, scores) -> sv.Detections:
    return sv.Detections(
        np.array(boxes, np.float64).reshape(-1, 4),
        class_id=np.array(labels, np.int64),
        confidence=np.array(scores, np.float64),
    )


@needs_shared
def test_voc_ap_matches_the_devkit():
    compared = 0
    for data in json.loads((REFERENCE / "voc_ap.json").read_text()):
        names = sorted({item["name"] for image in data["images"] for item in image["objects"]})
        names += sorted({item["name"] for item in data["detections"]} - set(names))
        to_inside = np.array([-1, -1, 0, 0])
        samples, detections = [], []
        for image in data["images"]:
            objects = image["objects"]
            boxes = [np.array(item["bbox"]) + to_inside for item in objects]
            labels = [names.index(item["name"]) for item in objects]
            samples.append(sample(boxes, labels, [bool(item["difficult"]) for item in objects]))
            mine = [item for item in data["detections"] if item["image"] == image["id"]]
            boxes = [np.array(item["bbox"]) + to_inside for item in mine]
            detections.append(
                found(boxes, [names.index(item["name"]) for item in mine], [item["score"] for item in mine])
            )
        for key, per_class in data["expected_ap"].items():
            iou, kind = key.removeprefix("iou").split("_")
            for name, expected in per_class.items():
                curve = compute_curves(samples, detections, len(names), float(iou))[names.index(name)]
                ap = curve.ap_11point() if kind == "11point" else curve.ap_area()
                assert ap == pytest.approx(expected, abs=1e-9), (data["seed"], key, name)
                compared += 1
    assert compared > 48


def test_difficult_objects_are_ignored():
    samples = [sample([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 0], [True, False])]
    detections = [found([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]], [0, 0, 0], [0.9, 0.8, 0.7])]
    measured = evaluate(samples, detections, [(40, 40)], ["a"])
    metrics, (curve,) = measured.metrics, measured.curves
    assert curve.num_objects == 1
    assert curve.precision.tolist() == [1.0]
    assert metrics["voc"]["mAP_area"] == metrics["voc"]["mAP_11point"] == 1.0
    assert metrics["coco"]["AP"] == pytest.approx(1.0)


def test_second_detection_of_an_object_is_false_positive():
    samples = [sample([[0, 0, 10, 10]], [0])]
    detections = [found([[0, 0, 10, 10], [0, 0, 10, 9]], [0, 0], [0.9, 0.8])]
    (curve,) = compute_curves(samples, detections, 1)
    assert curve.precision.tolist() == [1.0, 0.5]
    assert curve.recall.tolist() == [1.0, 1.0]


def test_ap_equals_hand_computed_values():
    # two objects; hit, miss, hit: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
    samples = [sample([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 0])]
    boxes = [[0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]]
    (curve,) = compute_curves(samples, [found(boxes, [0, 0, 0], [0.9, 0.8, 0.7])], 1)
    assert curve.ap_area() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert curve.ap_11point() == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_coco_ap_equals_hand_computed_value():
    # an IoU of 0.81 is a match at seven of the ten thresholds, 0.5 to 0.8
    samples, detections = [sample([[0, 0, 100, 100]], [0])], [found([[0, 0, 90, 90]], [0], [0.5])]
    metrics = evaluate(samples, detections, [(200, 200)], ["a"]).metrics["coco"]
    assert metrics["AP"] == pytest.approx(0.7)
    assert metrics["AP50"] == metrics["AP75"] == pytest.approx(1.0)
    assert metrics["per_class"] == {"a": pytest.approx(0.7)}


def test_metrics_without_detections_or_objects():
    metrics = evaluate([sample([[0, 0, 9, 9]], [1])], [sv.Detections.empty()], [(10, 10)], ["a", "b"]).metrics
    assert metrics["coco"]["AP"] == metrics["voc"]["mAP_area"] == 0
    assert metrics["coco"]["per_class"] == {"a": -1, "b": 0}
    metrics = evaluate([sample([], [])], [found([[0, 0, 5, 5]], [0], [0.9])], [(10, 10)], ["a", "b"]).metrics
    assert metrics["voc"]["mAP_area"] == metrics["coco"]["AP"] == metrics["best"]["a"]["F1"] == -1
    assert json.dumps(metrics)


def test_best_threshold_lies_between_two_scores():
    # hit, miss, hit, miss: F1 is 2/3 at 0.9 and 4/5 at 0.5
    curve = Curve(np.array([1, 1 / 2, 2 / 3, 1 / 2]), np.array([0.5, 0.5, 1, 1]), np.array([0.9, 0.8, 0.5, 0.3]), 2)
    best = curve.find_best_threshold()
    assert best["threshold"] == pytest.approx(0.4)
    assert best["precision"] == pytest.approx(2 / 3)
    assert best["recall"] == 1
    assert best["F1"] == pytest.approx(0.8)
    # equal scores cannot be separated by a threshold
    tied = Curve(curve.precision, curve.recall, np.array([0.9, 0.5, 0.5, 0.5]), 2).find_best_threshold()
    assert (tied["threshold"], tied["precision"], tied["recall"]) == pytest.approx((0.7, 1, 0.5))
    assert Curve(np.empty(0), np.empty(0), np.empty(0), 3).find_best_threshold()["threshold"] == 0.3
    assert (
        Curve(curve.precision, curve.recall, curve.scores / 10, 2).find_best_threshold()["threshold"] == 0.3
    )  # all scores are too low


def test_confusion_matrix_equals_hand_computed_counts():
    samples = [
        sample([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], [0, 0, 1, 1], [0, 0, 0, 1]),
        sample([], []),
    ]
    detections = [
        # correct, a wrong class on the same object, a wrong class, too low a score, on a difficult object
        found(
            [[0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]],
            [0, 1, 1, 1, 0],
            [0.5, 0.9, 0.9, 0.2, 0.9],
        ),
        found([[0, 0, 10, 10]], [0], [0.4]),
    ]
    counts = confusion_matrix(samples, detections, [0.3, 0.3])
    assert counts.tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]
