"""COCO metrics and AP of reweighted images, compared with pycocotools; the results file."""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.data.test_coco_json import NAMES, write_truth
from utils.data.coco_json import load_coco_samples
from utils.data.voc import Sample
from utils.evaluation import coco
from utils.evaluation.coco import average_precision, build_dataset, estimate_influence, evaluate_coco, write_results

IMAGES = 20


def random_split(seed: int, digits: int = 9) -> tuple[list[Sample], list[sv.Detections]]:
    """Objects of all sizes, some difficult, and detections near them, with ties in IoU and, at few digits, in score."""
    random = np.random.default_rng(seed)
    samples, detections = [], []
    for i in range(IMAGES):
        count = random.integers(0, 9)
        corners = random.uniform(0, 300, (count, 2)).astype(np.float32)
        sides = random.choice([8, 20, 60, 150], (count, 1)) * random.uniform(0.5, 1.5, (count, 2)).astype(np.float32)
        boxes, labels = np.hstack([corners, corners + sides]).astype(np.float32), random.integers(0, 3, count)
        samples.append(Sample(f"{i}", Path(f"{i}.jpg"), None, boxes, labels, random.random(count) < 0.2))
        found = random.integers(0, 30) if count else 0
        if not found:
            detections.append(sv.Detections.empty())
            continue
        of = random.integers(0, count, found)
        near = np.round(boxes[of] + random.normal(0, 5, (found, 4)))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        classes = np.where(random.random(found) < 0.8, labels[of], random.integers(0, 3, found))
        scores = np.round(random.random(found), digits)
        detections.append(sv.Detections(near, confidence=scores, class_id=classes))
    return samples, detections


Scores = namedtuple("Scores", ["metrics", "matches"])


def score(samples, detections):
    dataset = build_dataset(samples, [(480, 640)] * len(samples), NAMES)
    return Scores(*evaluate_coco(dataset, detections, NAMES))


@pytest.mark.parametrize("seed", range(10))
def test_metrics_equal_pycocotools(seed, monkeypatch):
    samples, detections = random_split(seed, digits=1)
    ours = score(samples, detections)
    monkeypatch.setattr(coco, "FastCOCOeval", COCOeval)
    assert ours.metrics == score(samples, detections).metrics
    assert 0 < ours.metrics["AP"] < 1
    assert average_precision(ours.matches, torch.ones(1, IMAGES).double()).item() == pytest.approx(
        ours.metrics["AP"], abs=1e-12
    )


def test_weight_of_two_equals_duplicate_image():
    samples, detections = random_split(1)
    weights = torch.ones(2, IMAGES, dtype=torch.float64)
    weights[0, [2, 5]] = 2
    weights[1, [0, 3]] = 0
    twice, without = average_precision(score(samples, detections).matches, weights).tolist()
    again = score([*samples, samples[2], samples[5]], [*detections, detections[2], detections[5]])
    assert twice == pytest.approx(again.metrics["AP"], abs=1e-12)
    kept = [i for i in range(IMAGES) if i not in (0, 3)]
    fewer = score([samples[i] for i in kept], [detections[i] for i in kept])
    assert without == pytest.approx(fewer.metrics["AP"], abs=1e-12)


def test_influence_correlates_with_leaving_images_out():
    samples, detections = random_split(2)
    matches = score(samples, detections).matches
    gained = average_precision(matches, 1 - torch.eye(IMAGES, dtype=torch.float64)).numpy()
    gained -= average_precision(matches, torch.ones(1, IMAGES, dtype=torch.float64)).item()
    assert np.corrcoef(estimate_influence(matches, IMAGES), gained)[0, 1] > 0.9


def test_ap_without_detections_or_objects():
    samples, detections = random_split(4)
    nothing = score(samples, [sv.Detections.empty()] * IMAGES)
    assert nothing.metrics["AP"] == average_precision(nothing.matches, torch.ones(1, IMAGES).double()).item() == 0
    assert not estimate_influence(nothing.matches, IMAGES).any()
    empty = [Sample(s.name, s.image, None, s.boxes[:0], s.labels[:0], s.difficult[:0]) for s in samples]
    assert score(empty, detections).matches == []
    assert not estimate_influence([], IMAGES).any()


@pytest.fixture
def truth(tmp_path):
    return write_truth(tmp_path)


def test_results_file_gives_same_metrics_in_pycocotools(truth, tmp_path):
    _, dataset = load_coco_samples(truth, tmp_path, NAMES)
    detections = [
        sv.Detections(
            np.array([[10.0, 10, 50, 50], [60, 10, 100, 50], [0, 0, 9, 9]]),
            confidence=np.array([0.9, 0.8, 0.7]),
            class_id=np.array([0, 1, 2]),
        ),
        sv.Detections(np.array([[0.0, 0, 20, 20]]), confidence=np.array([0.95]), class_id=np.array([0])),
    ]
    ours, _ = evaluate_coco(dataset, detections, NAMES)
    write_results(tmp_path, dataset, detections)
    results = json.loads((tmp_path / "coco_results.json").read_text())
    assert [(item["image_id"], item["category_id"]) for item in results] == [(70, 18), (70, 90), (9, 18)]
    assert results[1]["bbox"] == [60, 10, 40, 40]
    server = COCO(str(truth))
    scorer = COCOeval(server, server.loadRes(str(tmp_path / "coco_results.json")), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert ours["AP"] == scorer.stats[0] == pytest.approx(1)
    assert ours["APs"] == scorer.stats[3] == pytest.approx(1)  # uses the area in the file, not that of the box
    assert ours["per_class"]["c"] == -1
    write_results(tmp_path, None, detections)
    assert not (tmp_path / "coco_results.json").exists()


def test_ids_and_optional_entries_do_not_change_metrics(truth, tmp_path):
    """Many exporters number from 0, or leave out iscrowd, area and id."""
    content = json.loads(truth.read_text())
    annotations = content["annotations"][:2]
    bare = [{name: item[name] for name in ("image_id", "category_id", "bbox")} for item in annotations]
    samples, _ = load_coco_samples(truth, tmp_path, NAMES)
    perfect = [
        sv.Detections(sample.boxes, confidence=np.full(len(sample.labels), 0.9), class_id=sample.labels)
        if len(sample.labels)
        else sv.Detections.empty()
        for sample in samples
    ]
    perfect[1] = sv.Detections.empty()
    for changed in ([item | {"id": i} for i, item in enumerate(annotations)], bare):
        truth.write_text(json.dumps(content | {"annotations": changed}))
        _, dataset = load_coco_samples(truth, tmp_path, NAMES)
        assert evaluate_coco(dataset, perfect, NAMES)[0]["AP"] == pytest.approx(1)


def test_writes_results_without_annotations(truth, tmp_path):
    content = json.loads(truth.read_text())
    del content["annotations"]
    truth.write_text(json.dumps(content))
    samples, dataset = load_coco_samples(truth, tmp_path, NAMES)
    found = sv.Detections(np.array([[0.0, 0, 9, 9]]), confidence=np.array([0.5]), class_id=np.array([1]))
    write_results(tmp_path, dataset, [found] * len(samples))
    assert len(json.loads((tmp_path / "coco_results.json").read_text())) == 2
    assert evaluate_coco(dataset, [found] * 2, NAMES)[0]["AP"] == -1
