"""The check of a whole data set: what it counts, what it finds, and that it stops where a training would."""

import json
import re
import time

import cv2
import numpy as np
import pytest

from tests.bad_inputs import DATA, ERROR, OK, Scene
from tests.conftest import ROOT
from tools import check_data
from utils.data.duplicates import ImageHash, hash_image, near_duplicates
from utils.data.image_io import decode_image, read_encoded, write_image
from utils.data.label_writers import format_voc
from utils.data.statistics import describe_samples
from utils.data.voc import Sample
from utils.data.voc_xml import LabeledObject
from utils.system.errors import UserError

ANCHORS_FILE = ROOT / "model_data" / "yolo_anchors.txt"


def findings(scene):
    """Kind and words of everything that a check finds."""
    sets = {"train_sets": ("VOC/train",), "val_sets": ("VOC/val",)}
    files = {"classes": str(scene.classes), "anchors": str(scene.anchors)}
    try:
        report = check_data.check(check_data.Config(str(scene.folder), **sets | files))
    except UserError as error:
        return [(ERROR, str(error))]
    found = [(item.kind, str(item)) for part in report.diagnostics.values() for item in part]
    assert (report.stops > 0) == any(kind == ERROR for kind, _ in found)
    return found


@pytest.mark.parametrize("row", DATA, ids=lambda row: f"{row.number} {row.name}")
def test_it_finds_what_a_training_finds(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path / "devkit")
    row.make(scene)
    found = findings(scene)
    if row.outcome == OK:
        assert not found
        return
    assert row.outcome in {kind for kind, _ in found}
    assert any(row.words[0].split()[0].rstrip(",") in text for _, text in found)
    if row.outcome != ERROR:
        assert ERROR not in {kind for kind, _ in found}


@pytest.fixture
def messy(devkit, tmp_path):
    """The drawn set with a near-duplicate in val, a misspelt class, a truncated object and a class without objects."""
    folder = tmp_path / "kit" / "Set"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    names = {"train": [f"train_{i:04}" for i in range(6)], "val": ["val_0000", "copy"], "test": ["test_0000"]}
    for part in ("JPEGImages", "Annotations"):
        for path in (devkit / "Demo" / part).iterdir():
            if any(path.stem in ids for ids in names.values()):
                (folder / part / path.name).write_bytes(path.read_bytes())
    picture = decode_image(read_encoded(folder / "JPEGImages" / "train_0003.jpg"), "a.jpg")
    smaller = cv2.resize(picture, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
    write_image(folder / "JPEGImages" / "copy.jpg", smaller)
    text = format_voc(
        "copy.jpg",
        smaller.shape[:2],
        [LabeledObject("circel", [5, 5, 50, 60], True), LabeledObject("star", [0, 0, 20, 20], False)],
    )
    (folder / "Annotations" / "copy.xml").write_text(
        text.replace("<difficult>1", "<truncated>1</truncated><difficult>1")
    )
    for split, ids in names.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids))
    classes = (devkit / "Demo" / "classes.txt").read_text()
    (tmp_path / "classes.txt").write_text(classes + "zeppelin\n")
    return tmp_path


def test_the_report_of_a_messy_set(messy, expect_failure, capsys):
    out = messy / "out"
    flags = ["--devkit", messy / "kit", "--train-sets", "Set/train", "--val-sets", "Set/val", "--test-sets", "Set/test"]
    flags += ["--classes", messy / "classes.txt", "--anchors", ANCHORS_FILE, "--out", out]
    expect_failure(check_data, flags, "a training would not start: 1 errors; they are in", "check.txt")
    summary = json.loads((out / "check.json").read_text())
    assert not summary["would_start"]
    assert [part["images"] for part in summary["parts"].values()] == [6, 2, 1]
    val = summary["parts"]["val"]
    assert (val["difficult"], val["truncated"]) == (1, 1)
    assert val["objects"] == sum(val["classes"].values()) + 1  # the misspelt one has no class
    assert summary["unused_classes"] == ["zeppelin"]
    (problem,) = summary["problems"]["val"]
    assert problem["file"].endswith("copy.xml")
    assert "'circel' instead of 'circle'" in problem["reason"]
    assert [[path.rpartition("/")[2] for path in pair["images"]] for pair in summary["near_duplicates"]] == [
        ["train_0003.jpg", "copy.jpg"]
    ]
    assert 0 < summary["anchors"]["mean_iou"] < 1
    text = (out / "check.txt").read_text()
    for words in ("near-duplicates across train, val and test: 1", "classes without any object: zeppelin"):
        assert words in text
    page = (out / "check.html").read_text()
    assert len(re.findall(r'src="data:image/', page)) == page.count("src=") >= 8
    assert "http" not in page
    assert "would\nnot start" in page


def test_a_good_set_would_start(devkit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"classes": str(devkit / "Demo" / "classes.txt"), "anchors": str(ANCHORS_FILE)}
    config = check_data.Config(str(devkit), train_sets=("Demo/train",), val_sets=(), **files)
    assert check_data.main(config).stops == 0
    assert "a training would start" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "logs" / "check").iterdir()}
    assert written == {"check.txt", "check.json", "check.html", "classes.png", "shapes.png"}


def test_near_duplicates_are_told_from_others():
    rng = np.random.default_rng(0)
    images = [cv2.resize(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8), (320, 240)) for _ in range(40)]
    plain = [np.full((100, 100, 3), level, np.uint8) for level in (0, 90, 180)]
    looks = [hash_image(image) for image in [*images, *plain]]
    changed = cv2.resize(images[7], (200, 160)).astype(int) + rng.integers(-4, 5, (160, 200, 3)) + 5
    others = [hash_image(changed.clip(0, 255).astype(np.uint8)), hash_image(plain[1] + 1)]
    assert [pair[:2] for pair in near_duplicates(looks, others)] == [(7, 0), (41, 1)]
    assert near_duplicates(looks, []) == []


def test_near_duplicates_of_10_000_images_are_quick():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**63, 10_000, dtype=np.uint64).tolist()
    looks = [ImageHash(code, np.zeros((8, 9), np.uint8)) for code in codes]
    started = time.process_time()
    assert len(near_duplicates(looks, looks)) == 10_000
    assert time.process_time() - started < 10


def test_the_line_before_a_training():
    def sample(labels, difficult):
        boxes = np.zeros((len(labels), 4), np.float32)
        return Sample("a", ROOT, None, boxes, np.array(labels, np.int64), np.array(difficult, bool))

    samples = [sample([0, 0, 2], [False, True, False]), sample([], []), sample([1], [True]), sample([2], [False])]
    assert describe_samples(samples, ("cat", "dog", "owl")) == (
        "4 images (2 without objects), 3 objects: owl 2, cat 1; none of dog"
    )
