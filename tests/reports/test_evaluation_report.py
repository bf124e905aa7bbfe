"""Evaluation reports: their files, the comparison of checkpoints, and the page in a browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch

from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS
from tests.evaluation.test_label_errors import make_split
from utils.data.cache import build_cache
from utils.data.image_io import read_image
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.evaluation.metrics import evaluate
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.reports.evaluation_report import EvaluationReport, compare_checkpoints
from utils.reports.metrics_table import format_metrics

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = """<iframe width="{width}" height="900" style="border: 0" srcdoc="{page}" onload="
  const page = this.contentDocument, broken = [...page.images].filter(image => !image.naturalWidth).length;
  document.title = page.documentElement.scrollWidth + ' wide, ' + broken + ' broken'"></iframe>"""


@pytest.fixture(scope="module")
def split(devkit):
    return make_split(devkit)


@pytest.fixture(scope="module")
def report(split, tmp_path_factory) -> Path:
    """A report with all parts and class names that need escaping."""
    names, samples, detections = split
    names = ("<b>circle</b>", "$x$", *names[2:])
    detections = [found[found.class_id != 2] for found in detections]
    detections[0] = sv.Detections.empty()
    folder = tmp_path_factory.mktemp("report")
    spec = ModelSpec(names, ANCHORS, input_size=(96, 128))
    cache = build_cache(samples, spec, torch.device("cpu"))
    measured = evaluate(samples, detections, cache.sizes, names)
    detector = Detector(TorchNetwork(build_model(spec), spec, torch.device("cpu")), spec, EVALUATION_THRESHOLDS)
    EvaluationReport(Path("a&b.safetensors"), "kit", ["Demo/train"], detector, cache, detections, measured).write(
        folder
    )
    return folder


def test_writes_metrics_label_errors_and_plots(report, split):
    names, samples, _ = split
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["images"] == len(samples)
    expected = {"source": "kit", "sets": ["Demo/train"], "precision": "float32", "input_size": [96, 128]}
    assert metrics | expected == metrics
    assert len(metrics["best"]) == len(names)
    counts, labels = np.array(metrics["confusion"]["counts"]), np.concatenate([sample.labels for sample in samples])
    assert counts[:-1].sum(axis=1).tolist() == np.bincount(labels, minlength=len(names)).tolist()
    assert counts[2, -1] == (labels == 2).sum()  # class 2 was never detected
    assert counts[3, 3] == (labels[len(samples[0].labels) :] == 3).sum()  # all except in the first image
    assert 0 < metrics["best_possible_recall"] <= 1
    assert (report / "metrics.txt").read_text().strip() == format_metrics(metrics).strip()
    for item in json.loads((report / "label_errors.json").read_text()):
        assert item["kind"] == "not detected"
        assert 0 <= item["score"] <= 1
    for name in ("precision_recall.png", "confidence.png", "confusion.png", "shapes.png"):
        assert read_image(report / name).std() > 5, name


def test_compares_checkpoints_with_paired_intervals(split):
    names, samples, detections = split
    sizes = [sample.size for sample in samples]
    few = [found[found.class_id < 4] for found in detections]  # two of six classes are never detected
    good, bad = (evaluate(samples, found, sizes, names) for found in (detections, few))
    rows = compare_checkpoints([Path("good"), Path("bad")], [good, bad])
    low, high = rows[1]["difference_interval"]
    assert rows[1]["difference"] == pytest.approx(bad.metrics["coco"]["AP"] - good.metrics["coco"]["AP"])
    assert -0.5 < low < rows[1]["difference"] < high < -0.2
    unpaired = np.subtract(rows[1]["AP_interval"], rows[0]["AP_interval"])
    assert high - low < 2 * abs(unpaired).max()


def test_page_is_self_contained_and_escaped(report):
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;circle&lt;/b&gt;" in page
    assert "<b>circle" not in page
    assert "a&amp;b.safetensors" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) > 10
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "http" not in page
    assert "train_00" in page  # an image with missed objects


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])  # a phone and a desktop
def test_page_fits_the_browser_window(report, width, tmp_path):
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
    assert int(title[1]) == width  # only tables scroll horizontally
    assert int(title[2]) == 0
