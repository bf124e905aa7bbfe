"""Reading of COCO ground truth."""

import codecs
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.data import coco_json
from utils.data.coco_json import load_coco_samples
from utils.system.errors import UserError

NAMES = ["a", "b", "c"]


def write_truth(folder: Path) -> Path:
    """Write a COCO file with non-consecutive ids, a crowd, and an area that differs from that of the box."""
    for name in ("1.jpg", "ä b.jpg"):
        (folder / name).write_bytes(cv2.imencode(".jpg", np.zeros((80, 120, 3), np.uint8))[1].tobytes())
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
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def truth(tmp_path):
    return write_truth(tmp_path)


def test_reads_boxes_labels_and_crowds(truth, tmp_path):
    samples, _ = load_coco_samples(truth, tmp_path, NAMES)
    assert [sample.name for sample in samples] == ["ä b", "1"]
    assert samples[0].boxes.tolist() == [[10, 10, 50, 50], [60, 10, 100.5, 50]]
    assert samples[0].labels.tolist() == [0, 1]
    assert samples[1].difficult.tolist() == [True]


def test_object_without_width_is_left_out_of_samples(truth, tmp_path):
    content = json.loads(truth.read_text())
    content["annotations"][0]["bbox"][2] = 0
    truth.write_text(json.dumps(content))
    samples, dataset = load_coco_samples(truth, tmp_path, NAMES)
    assert samples[0].labels.tolist() == [1]
    assert len(dataset.truth["annotations"]) == 3


def test_rejects_invalid_ground_truth(truth, tmp_path):
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
        with pytest.raises(UserError, match="outside the image folder"):
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
        (content | {"categories": [category, category | {"id": 3}]}, "two category entries with the same name"),
        (content | {"images": [first]}, "an unlisted image or category"),
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
    with pytest.raises(UserError, match="lists the image aaa"):
        load_coco_samples(truth, tmp_path, NAMES)
    os.truncate(truth, coco_json.MAX_BYTES + 1)
    with pytest.raises(UserError, match="too large"):
        load_coco_samples(truth, tmp_path, NAMES)
    truth.unlink()
    os.mkfifo(truth)
    with pytest.raises(UserError, match="pipe or device"):
        load_coco_samples(truth, tmp_path, NAMES)


def test_ignores_byte_order_mark(truth, tmp_path):
    before = load_coco_samples(truth, tmp_path, NAMES)[1].truth
    truth.write_bytes(codecs.BOM_UTF8 + truth.read_bytes())
    assert load_coco_samples(truth, tmp_path, NAMES)[1].truth == before
