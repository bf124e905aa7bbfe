"""COCO's side: matching as pycocotools', AP of weighted images, ground truth and results in COCO's files."""

import codecs
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.data.coco_json import load_coco_samples
from utils.data.voc import Sample
from utils.evaluation import coco
from utils.evaluation.coco import coco_score, dataset_of, write_results
from utils.evaluation.significance import average_precision, bootstrap, influence, interval
from utils.system.errors import UserError

NAMES = ["a", "b", "c"]
IMAGES = 20


def random_split(seed: int, digits: int = 9) -> tuple[list[Sample], list[sv.Detections]]:
    """Objects of all sizes, some difficult; detections near them with equal overlaps, and scores of so many digits."""
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


def score(samples, detections):
    return coco_score(dataset_of(samples, [(480, 640)] * len(samples), NAMES), detections, NAMES)


@pytest.mark.parametrize("seed", range(10))
def test_matching_is_that_of_pycocotools(seed, monkeypatch):
    samples, detections = random_split(seed, digits=1)
    ours = score(samples, detections)
    monkeypatch.setattr(coco, "Scorer", COCOeval)
    assert ours.metrics == score(samples, detections).metrics
    assert 0 < ours.metrics["AP"] < 1
    assert average_precision(ours.matches, torch.ones(1, IMAGES).double()).item() == pytest.approx(
        ours.metrics["AP"], abs=1e-12
    )


def test_a_weight_of_two_is_an_image_twice():
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


def test_influence_ranks_images_as_leaving_them_out_does():
    samples, detections = random_split(2)
    matches = score(samples, detections).matches
    gained = average_precision(matches, 1 - torch.eye(IMAGES, dtype=torch.float64)).numpy()
    gained -= average_precision(matches, torch.ones(1, IMAGES, dtype=torch.float64)).item()
    assert np.corrcoef(influence(matches, IMAGES), gained)[0, 1] > 0.9


def test_bootstrap_sees_a_difference_and_none():
    samples, detections = random_split(3)
    worse = [
        sv.Detections(found.xyxy + 9, confidence=found.confidence, class_id=found.class_id) if len(found) else found
        for found in detections
    ]
    draws = bootstrap([score(samples, found).matches for found in (detections, detections, worse)])
    assert (draws[0] == draws[1]).all()
    low, high = interval(draws[2] - draws[0])
    assert low < high < 0
    low, high = interval(draws[0])
    assert low < score(samples, detections).metrics["AP"] < high


def test_without_detections_or_objects():
    samples, detections = random_split(4)
    nothing = score(samples, [sv.Detections.empty()] * IMAGES)
    assert nothing.metrics["AP"] == average_precision(nothing.matches, torch.ones(1, IMAGES).double()).item() == 0
    assert not influence(nothing.matches, IMAGES).any()
    empty = [Sample(s.name, s.image, None, s.boxes[:0], s.labels[:0], s.difficult[:0]) for s in samples]
    assert score(empty, detections).matches == []
    assert not influence([], IMAGES).any()


@pytest.fixture
def truth(tmp_path):
    """COCO's JSON with category ids that are no indices, a crowd, and an area that is not the box's."""
    for name in ("1.jpg", "ä b.jpg"):
        (tmp_path / name).write_bytes(cv2.imencode(".jpg", np.zeros((80, 120, 3), np.uint8))[1].tobytes())
    content = {
        "images": [
            {"id": 70, "file_name": "ä b.jpg", "height": 80, "width": 120},
            {"id": 9, "file_name": "1.jpg", "height": 80, "width": 120},
        ],
        "categories": [{"id": 90, "name": "b"}, {"id": 18, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 70, "category_id": 18, "bbox": [10, 10, 40, 40], "area": 900, "iscrowd": 0},
            {"id": 2, "image_id": 70, "category_id": 90, "bbox": [60, 10, 40.5, 40], "area": 1500, "iscrowd": 0},
            {"id": 3, "image_id": 9, "category_id": 18, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 1},
        ],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_truth_and_results(truth, tmp_path):
    samples, dataset = load_coco_samples(truth, tmp_path, NAMES)
    assert [sample.name for sample in samples] == ["ä b", "1"]
    assert samples[0].boxes.tolist() == [[10, 10, 50, 50], [60, 10, 100.5, 50]]
    assert samples[0].labels.tolist() == [0, 1]
    assert samples[1].difficult.tolist() == [True]
    detections = [
        sv.Detections(
            np.array([[10.0, 10, 50, 50], [60, 10, 100, 50], [0, 0, 9, 9]]),
            confidence=np.array([0.9, 0.8, 0.7]),
            class_id=np.array([0, 1, 2]),
        ),
        sv.Detections(np.array([[0.0, 0, 20, 20]]), confidence=np.array([0.95]), class_id=np.array([0])),
    ]
    ours = coco_score(dataset, detections, NAMES)
    write_results(tmp_path, dataset, detections)
    results = json.loads((tmp_path / "coco_results.json").read_text())
    assert [(item["image_id"], item["category_id"]) for item in results] == [(70, 18), (70, 90), (9, 18)]
    assert results[1]["bbox"] == [60, 10, 40, 40]
    server = COCO(str(truth))
    scorer = COCOeval(server, server.loadRes(str(tmp_path / "coco_results.json")), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert ours.metrics["AP"] == scorer.stats[0] == pytest.approx(1)
    assert ours.metrics["APs"] == scorer.stats[3] == pytest.approx(1)  # by the area of the JSON
    assert ours.metrics["per_class"]["c"] == -1
    write_results(tmp_path, None, detections)
    assert not (tmp_path / "coco_results.json").exists()


def test_ids_and_optional_fields_do_not_matter(truth, tmp_path):
    """Numbering from 0, no iscrowd, no area, no id: as many exporters write it."""
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
        assert coco_score(dataset, perfect, NAMES).metrics["AP"] == pytest.approx(1)


def test_a_test_set_without_annotations_gives_results(truth, tmp_path):
    content = json.loads(truth.read_text())
    del content["annotations"]
    truth.write_text(json.dumps(content))
    samples, dataset = load_coco_samples(truth, tmp_path, NAMES)
    found = sv.Detections(np.array([[0.0, 0, 9, 9]]), confidence=np.array([0.5]), class_id=np.array([1]))
    write_results(tmp_path, dataset, [found] * len(samples))
    assert len(json.loads((tmp_path / "coco_results.json").read_text())) == 2
    assert coco_score(dataset, [found] * 2, NAMES).metrics["AP"] == -1


def test_an_object_without_width_is_cocos_alone(truth, tmp_path):
    content = json.loads(truth.read_text())
    content["annotations"][0]["bbox"][2] = 0
    truth.write_text(json.dumps(content))
    samples, dataset = load_coco_samples(truth, tmp_path, NAMES)
    assert samples[0].labels.tolist() == [1]
    assert len(dataset.truth["annotations"]) == 3


def test_mistakes_in_coco_truth(truth, tmp_path):
    with pytest.raises(UserError, match=r"does not know: b; it knows a, c"):
        load_coco_samples(truth, tmp_path, ["a", "c"])
    with pytest.raises(UserError, match=r"ä b\.jpg, but it is not in .*--images"):
        load_coco_samples(truth, tmp_path / "elsewhere", NAMES)
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        load_coco_samples(tmp_path / "none.json", tmp_path, NAMES)
    content = json.loads(truth.read_text())
    first, second = content["images"]
    for name in ("../ä b.jpg", str(tmp_path / "ä b.jpg")):  # not even where there is one
        truth.write_text(json.dumps(content | {"images": [first | {"file_name": name}, second]}))
        with pytest.raises(UserError, match="not within a folder of images"):
            load_coco_samples(truth, tmp_path / "elsewhere", NAMES)
    image, category, annotation = (content[part][0] for part in ("images", "categories", "annotations"))
    broken = [
        {},
        content | {"images": []},
        content | {"images": [image, image]},
        content | {"categories": [category, category | {"id": 3}]},
        content | {"images": [image | {"id": 4}]},
        content | {"annotations": [annotation | {"bbox": [1, 2, float("nan"), 4]}]},
        content | {"annotations": [annotation | {"bbox": [1, 2, 10**400, 4]}]},
        content | {"annotations": [annotation | {"bbox": [1, 2]}]},
        content | {"annotations": [annotation | {"area": -1}]},
        content | {"annotations": [annotation | {"category_id": 5}]},
        content | {"annotations": [annotation | {"image_id": "70"}]},
        content | {"images": [image, second | {"id": "70"}], "annotations": []},
        content | {"categories": [category, category | {"id": "3", "name": "c"}], "annotations": []},
        *(content | {"images": [image | {"height": side}, second]} for side in (None, "30", 0, 0.5, 10**400)),
    ]
    for changed, words in (
        ([], "must be an object with images"),
        (content | {"categories": [category, category | {"id": 3}]}, "two items of category with one name"),
        (content | {"images": [first]}, "image or a category that it does not list"),
        (content | {"images": [], "annotations": None}, "lists no image"),
    ):
        truth.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            load_coco_samples(truth, tmp_path, NAMES)
    for text in ("", "[]", "null", "[" * 100_000, *map(json.dumps, broken)):
        truth.write_text(text)
        with pytest.raises(UserError, match=r"truth\.json is not COCO ground truth"):
            load_coco_samples(truth, tmp_path, NAMES)
    truth.write_text(json.dumps(content | {"images": [first | {"file_name": "a" * 5000}, second]}))
    with pytest.raises(UserError, match="names the image aaa"):
        load_coco_samples(truth, tmp_path, NAMES)
    os.truncate(truth, coco.MAX_BYTES + 1)
    with pytest.raises(UserError, match="too large"):
        load_coco_samples(truth, tmp_path, NAMES)
    truth.unlink()
    os.mkfifo(truth)
    with pytest.raises(UserError, match="pipe or device"):
        load_coco_samples(truth, tmp_path, NAMES)


def test_a_byte_order_mark_does_not_matter(truth, tmp_path):
    before = load_coco_samples(truth, tmp_path, NAMES)[1].truth
    truth.write_bytes(codecs.BOM_UTF8 + truth.read_bytes())
    assert load_coco_samples(truth, tmp_path, NAMES)[1].truth == before
