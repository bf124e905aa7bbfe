"""The report of an evaluation: which labels it suspects, what it draws and writes, how its page looks in a browser."""

import html
import json
import re
import shutil
import subprocess
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch
from matplotlib import font_manager

from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS
from utils.data.cache import build_cache
from utils.data.image_io import read_image
from utils.data.voc import Sample, load_classes, load_samples
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.evaluation.coco import dataset_of
from utils.evaluation.label_errors import suspect_labels
from utils.evaluation.metrics import Curve, confusion_matrix, evaluate, voc_curves
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.reports.evaluation_report import Report, compare, metrics_table
from utils.reports.plots import WIDE_FONTS, draw_confidence, draw_confusion, draw_precision_recall

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = """<iframe width="{width}" height="900" style="border: 0" srcdoc="{page}" onload="
  const page = this.contentDocument, broken = [...page.images].filter(image => !image.naturalWidth).length;
  document.title = page.documentElement.scrollWidth + ' wide, ' + broken + ' broken'"></iframe>"""


def detections_of(samples: list[Sample], random: np.random.Generator) -> list[sv.Detections]:
    """What a good detector would find: every object nearly where it is, with a high score."""
    return [
        sv.Detections(
            sample.boxes + random.uniform(-1, 1, sample.boxes.shape).astype(np.float32),
            confidence=random.uniform(0.5, 0.9, len(sample.labels)),
            class_id=sample.labels.copy(),
        )
        for sample in samples
    ]


@pytest.fixture(scope="module")
def split(devkit):
    names = load_classes(devkit / "Demo" / "classes.txt")
    samples = load_samples(devkit, ["Demo/train"], names)
    return names, samples, detections_of(samples, np.random.default_rng(0))


def relabelled(sample: Sample, **changed: np.ndarray) -> Sample:
    return Sample(**vars(sample) | changed)


def test_planted_label_errors_are_ranked_first(split):
    names, right, detections = split
    kinds = ["not labelled", "another class", "badly placed", "never found"]
    samples = list(right)
    planted = [i for i, sample in enumerate(right) if len(sample.labels) > 1][:4]
    without, swapped, moved, invented = (right[i] for i in planted)
    samples[planted[0]] = relabelled(
        without, boxes=without.boxes[1:], labels=without.labels[1:], difficult=without.difficult[1:]
    )
    samples[planted[1]] = relabelled(swapped, labels=np.append((swapped.labels[0] + 1) % 6, swapped.labels[1:]))
    box = moved.boxes[0]
    shift = np.array([(box[2] - box[0]) * 0.4, 0, (box[2] - box[0]) * 0.4, 0], np.float32)  # IoU 0.43
    samples[planted[2]] = relabelled(moved, boxes=np.vstack([box + shift, moved.boxes[1:]]))
    samples[planted[3]] = relabelled(
        invented,
        boxes=np.vstack([invented.boxes, [[1, 1, 4, 4]]]).astype(np.float32),
        labels=np.append(invented.labels, 0),
        difficult=np.append(invented.difficult, False),
    )
    sizes = [sample.size for sample in samples]
    measured = evaluate(samples, detections, sizes, names)
    found = suspect_labels(samples, detections, measured.curves, [0.3] * len(names), names)
    assert {(item.image, item.kind) for item in found[:4]} == set(zip(planted, kinds, strict=True))
    assert all(a.score >= b.score for a, b in pairwise(found))
    reasons = {item.kind: item.reason for item in found[:4]}
    assert names[swapped.labels[0]] in reasons["another class"]
    assert names[without.labels[0]] in reasons["not labelled"]
    missing = next(item for item in found if item.kind == "not labelled")
    np.testing.assert_allclose(missing.box, without.boxes[0], atol=1.1)


def test_what_lies_in_a_crowd_is_not_suspected():
    """Nor counted as false: a crowd stands for any number of objects."""
    crowd = Sample("a", Path("a.jpg"), None, np.float32([[0, 0, 400, 400]]), np.array([0]), np.array([True]))
    corners = np.float32([[x, y] for x in range(20, 300, 70) for y in range(20, 300, 70)])
    people = sv.Detections(
        np.hstack([corners, corners + 50]), confidence=np.full(len(corners), 0.9), class_id=np.zeros(len(corners), int)
    )
    dog = Sample("b", Path("b.jpg"), None, np.float32([[0, 0, 9, 9]] * 2), np.array([0, 1]), np.array([False, False]))
    pair = sv.Detections(dog.boxes, confidence=np.array([0.9, 0.9]), class_id=dog.labels)
    names, thresholds = ["person", "dog", "ox"], [0.3, 0.3, 0.3]
    curves = voc_curves([crowd, dog], [people, pair], 3)
    assert suspect_labels([crowd, dog], [people, pair], curves, thresholds, names) == []
    assert confusion_matrix([crowd], [people], thresholds).sum() == 0
    assert len(voc_curves([crowd], [people], 3)[0].scores) == len(corners)  # false, by VOC's rule
    assert len(voc_curves([crowd], [people], 3, crowds=True)[0].scores) == 0
    measured = evaluate([crowd], [people], [(400, 400)], names, dataset_of([crowd], [(400, 400)], names))
    assert measured.metrics["best"]["person"]["precision"] == -1  # nothing to find, and nothing false
    dogs, oxen = (
        sv.Detections(people.xyxy, confidence=people.confidence, class_id=people.class_id + i) for i in (1, 2)
    )
    assert len(suspect_labels([crowd], [dogs], curves, thresholds, names)) == len(corners)
    assert suspect_labels([crowd], [oxen], curves, thresholds, names) == []  # which the labels do not know


def test_right_labels_are_not_suspected(split):
    names, samples, detections = split
    measured = evaluate(samples, detections, [sample.size for sample in samples], names)
    assert suspect_labels(samples, detections, measured.curves, [0.3] * len(names), names) == []


@pytest.fixture(scope="module")
def report(split, tmp_path_factory) -> Path:
    """A report with every part, of class names that must not become HTML."""
    names, samples, detections = split
    names = ("<b>circle</b>", "$x$", *names[2:])
    detections = [found[found.class_id != 2] for found in detections]
    detections[0] = sv.Detections.empty()
    folder = tmp_path_factory.mktemp("report")
    spec = ModelSpec(names, ANCHORS, input_size=(96, 128))
    cache = build_cache(samples, spec, torch.device("cpu"))
    measured = evaluate(samples, detections, cache.sizes, names)
    detector = Detector(TorchNetwork(build_model(spec), spec, torch.device("cpu")), spec, EVALUATION_THRESHOLDS)
    Report(Path("a&b.safetensors"), "kit", ["Demo/train"], detector, cache, detections, measured).write(folder)
    return folder


def test_a_report_has_its_files(report, split):
    names, samples, _ = split
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["images"] == len(samples)
    expected = {"source": "kit", "sets": ["Demo/train"], "precision": "float32", "input_size": [96, 128]}
    assert metrics | expected == metrics
    assert len(metrics["best"]) == len(names)
    counts, labels = np.array(metrics["confusion"]["counts"]), np.concatenate([sample.labels for sample in samples])
    assert counts[:-1].sum(axis=1).tolist() == np.bincount(labels, minlength=len(names)).tolist()
    assert counts[2, -1] == (labels == 2).sum()  # none of which was found
    assert counts[3, 3] == (labels[len(samples[0].labels) :] == 3).sum()  # all but those of the first image
    assert 0 < metrics["best_possible_recall"] <= 1
    assert (report / "metrics.txt").read_text().strip() == metrics_table(metrics).strip()
    for item in json.loads((report / "label_errors.json").read_text()):
        assert item["kind"] == "never found"
        assert 0 <= item["score"] <= 1
    for name in ("precision_recall.png", "confidence.png", "confusion.png", "shapes.png"):
        assert read_image(report / name).std() > 5, name


def test_a_comparison_says_which_is_better(split):
    names, samples, detections = split
    sizes = [sample.size for sample in samples]
    few = [found[found.class_id < 4] for found in detections]  # two of six classes are never found
    good, bad = (evaluate(samples, found, sizes, names) for found in (detections, few))
    rows = compare(["good", "bad"], [good, bad])
    low, high = rows[1]["difference_interval"]
    assert rows[1]["difference"] == pytest.approx(bad.metrics["coco"]["AP"] - good.metrics["coco"]["AP"])
    assert -0.5 < low < rows[1]["difference"] < high < -0.2
    unpaired = np.subtract(rows[1]["AP_interval"], rows[0]["AP_interval"])
    assert high - low < 2 * abs(unpaired).max()


def test_many_classes_and_odd_names_are_drawn(tmp_path):
    names = ["_hidden", "$cost", *(f"class {i}" for i in range(78))]
    curve = Curve(np.array([1.0, 0.5]), np.array([0.5, 0.5]), np.array([0.9, 0.4]), 2)
    for count in (1, 80):
        draw_precision_recall([curve] * count, names[:count], tmp_path / "a.png")
        draw_confidence([curve] * count, names[:count], tmp_path / "b.png")
        draw_confusion(np.eye(count + 1, dtype=int), names[:count], tmp_path / "c.png")
        sizes = [read_image(tmp_path / name).shape for name in ("a.png", "b.png")]
        assert sizes == [(605, 880, 3), (440, 1320, 3)]


@pytest.mark.skipif(not {*WIDE_FONTS} & {*font_manager.get_font_names()}, reason="there is no Chinese font here")
def test_chinese_names_are_drawn(tmp_path):
    with warnings.catch_warnings(action="error"):  # such as of a letter that no font has
        draw_confusion(np.eye(2, dtype=int), ["安全帽"], tmp_path / "a.png")


def test_the_page_stands_alone(report):
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;circle&lt;/b&gt;" in page
    assert "<b>circle" not in page
    assert "a&amp;b.safetensors" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) > 10
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "http" not in page
    assert "train_00" in page  # an image that lacks objects


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to open the page with")
@pytest.mark.parametrize("width", [390, 1280])  # of a phone, of a desktop
def test_the_page_in_a_browser(report, width, tmp_path):
    page = (report / "report.html").read_text(encoding="utf-8").replace(' loading="lazy"', "")
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,1000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [CHROMIUM, *options, framed.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert shown.returncode == 0, shown.stderr
    title = re.search(r"<title>(\d+) wide, (\d+) broken</title>", shown.stdout)
    assert title, shown.stdout[:300]
    assert int(title[1]) == width  # nothing but a table's own frame scrolls sideways
    assert int(title[2]) == 0
