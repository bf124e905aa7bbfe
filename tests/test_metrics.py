"""VOC AP against an independent devkit, COCO's figures against pycocotools' own path."""

import json
from pathlib import Path

import numpy as np
import pytest
import supervision as sv

from tests.conftest import REFERENCE, needs_shared
from utils.metrics import coco_metrics, evaluate, voc_curve
from utils.voc import Sample


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
                curve = voc_curve(samples, detections, names.index(name), float(iou))
                ap = curve.ap_11point() if kind == "11point" else curve.ap_area()
                assert ap == pytest.approx(expected, abs=1e-9), (data["seed"], key, name)
                compared += 1
    assert compared > 48


def test_difficult_objects_count_neither_way():
    samples = [sample([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 0], [True, False])]
    detections = [found([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]], [0, 0, 0], [0.9, 0.8, 0.7])]
    metrics, (curve,) = evaluate(samples, detections, [(40, 40)], ["a"])
    assert curve.positives == 1
    assert curve.precision.tolist() == [1.0]
    assert metrics["voc"]["mAP_area"] == metrics["voc"]["mAP_11point"] == 1.0
    assert metrics["coco"]["AP"] == pytest.approx(1.0)


def test_a_second_detection_of_an_object_is_false():
    samples = [sample([[0, 0, 10, 10]], [0])]
    detections = [found([[0, 0, 10, 10], [0, 0, 10, 9]], [0, 0], [0.9, 0.8])]
    curve = voc_curve(samples, detections, 0)
    assert curve.precision.tolist() == [1.0, 0.5]
    assert curve.recall.tolist() == [1.0, 1.0]


def test_ap_by_hand():
    # two objects; hit, miss, hit: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
    samples = [sample([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 0])]
    boxes = [[0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]]
    curve = voc_curve(samples, [found(boxes, [0, 0, 0], [0.9, 0.8, 0.7])], 0)
    assert curve.ap_area() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert curve.ap_11point() == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_coco_ap_by_hand():
    # one box at IoU 0.81 is right at the seven thresholds 0.5 ... 0.8 of ten
    metrics = coco_metrics(
        [sample([[0, 0, 100, 100]], [0])], [found([[0, 0, 90, 90]], [0], [0.5])], [(200, 200)], ["a"]
    )
    assert metrics["AP"] == pytest.approx(0.7)
    assert metrics["AP50"] == metrics["AP75"] == pytest.approx(1.0)
    assert metrics["per_class"] == {"a": pytest.approx(0.7)}


def test_nothing_found_and_nothing_to_find():
    metrics, _ = evaluate([sample([[0, 0, 9, 9]], [1])], [sv.Detections.empty()], [(10, 10)], ["a", "b"])
    assert metrics["coco"]["AP"] == metrics["voc"]["mAP_area"] == 0
    metrics, _ = evaluate([sample([], [])], [found([[0, 0, 5, 5]], [0], [0.9])], [(10, 10)], ["a", "b"])
    assert metrics["voc"]["mAP_area"] == 0
    assert json.dumps(metrics)
