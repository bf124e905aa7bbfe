"""The dataset check counts correctly, and finds what training and evaluation would."""

import json
import re

import cv2
import pytest

from tests.bad_inputs import DATA, ERROR, OK, Scene
from tests.conftest import ROOT
from tools import check_data
from utils.data.image_io import decode_image, read_encoded, write_image
from utils.data.label_writers import format_voc
from utils.data.voc_xml import LabeledObject
from utils.system.errors import UserError

ANCHORS_FILE = ROOT / "model_data" / "yolo_anchors.txt"


def findings(scene):
    """The kind and message of everything that the check finds."""
    sets = {"train_sets": ("VOC/train",), "val_sets": ("VOC/val",)}
    files = {"classes": str(scene.classes), "anchors": str(scene.anchors)}
    try:
        report = check_data.check(check_data.Config(str(scene.folder), **sets | files))
    except UserError as error:
        return [(ERROR, str(error))]
    found = [(item.kind, str(item)) for part in report.diagnostics.values() for item in part]
    assert (report.stops > 0) == any(kind == ERROR for kind, _ in found)
    return found


@pytest.mark.filterwarnings("ignore")  # from Pillow
@pytest.mark.parametrize("case", DATA, ids=lambda case: case.name)
def test_finds_what_training_finds(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path / "devkit")
    case.make(scene)
    found = findings(scene)
    if case.outcome == OK:
        assert not found
        return
    assert case.outcome in {kind for kind, _ in found}
    assert any(case.words[0].split()[0].rstrip(",") in text for _, text in found)
    if case.outcome != ERROR:
        assert ERROR not in {kind for kind, _ in found}


@pytest.fixture
def messy(devkit, tmp_path):
    """A dataset with a near-duplicate in val, a misspelt class, a truncated object and a class without objects."""
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
    objects = [LabeledObject("circel", [5, 5, 50, 60], True), LabeledObject("star", [0, 0, 20, 20], False)]
    text = format_voc("copy.jpg", smaller.shape[:2], objects)
    (folder / "Annotations" / "copy.xml").write_text(
        text.replace("<difficult>1", "<truncated>1</truncated><difficult>1")
    )
    for split, ids in names.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids))
    classes = (devkit / "Demo" / "classes.txt").read_text()
    (tmp_path / "classes.txt").write_text(classes + "zeppelin\n")
    return tmp_path


def test_reports_errors_duplicates_and_unused_classes(messy, expect_failure, capsys):
    out = messy / "out"
    flags = ["--devkit", messy / "kit", "--train-sets", "Set/train", "--val-sets", "Set/val", "--test-sets", "Set/test"]
    flags += ["--classes", messy / "classes.txt", "--anchors", ANCHORS_FILE, "--out", out]
    expect_failure(check_data, flags, "training would not start (errors: 1, listed in", "check.txt")
    summary = json.loads((out / "check.json").read_text())
    assert not summary["would_start"]
    assert [part["images"] for part in summary["parts"].values()] == [6, 2, 1]
    val = summary["parts"]["val"]
    assert (val["difficult"], val["truncated"]) == (1, 1)
    assert val["objects"] == sum(val["classes"].values()) + 1  # the object of the misspelt class is not counted
    assert summary["unused_classes"] == ["zeppelin"]
    (finding,) = summary["problems"]["val"]
    assert finding["file"].endswith("copy.xml")
    assert "'circel'; did you mean 'circle'?" in finding["reason"]
    assert [[path.rpartition("/")[2] for path in pair["images"]] for pair in summary["near_duplicates"]] == [
        ["train_0003.jpg", "copy.jpg"]
    ]
    assert 0 < summary["anchors"]["mean_iou"] < 1
    text = (out / "check.txt").read_text()
    for words in ("near-duplicates across train, val and test: 1", "classes without objects: zeppelin"):
        assert words in text
    page = (out / "check.html").read_text()
    assert len(re.findall(r'src="data:image/', page)) == page.count("src=") >= 8
    assert "http" not in page
    assert "Training would not start" in page


def test_valid_dataset_would_start(devkit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"classes": str(devkit / "Demo" / "classes.txt"), "anchors": str(ANCHORS_FILE)}
    config = check_data.Config(str(devkit), train_sets=("Demo/train",), val_sets=(), **files)
    assert check_data.main(config).stops == 0
    assert "training would start" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "logs" / "check").iterdir()}
    assert written == {"check.txt", "check.json", "check.html", "classes.png", "shapes.png"}
