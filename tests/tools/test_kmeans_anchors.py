"""Anchors found by k-means fit known shapes, and can be used for training."""

import re
import time

import pytest
import torch

from tools import kmeans_anchors
from utils.data.statistics import anchor_fit
from utils.detection.anchors import load_anchors
from utils.system.errors import UserError


def test_finds_centers_of_known_shapes():
    """Five groups of shapes, whose centers the anchors must be."""
    middles = torch.tensor([[12.0, 20.0], [40.0, 30.0], [60.0, 90.0], [160.0, 120.0], [300.0, 350.0]])
    noise = torch.rand(5, 200, 2, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.9
    sides = (middles[:, None] * noise).flatten(0, 1)
    found = kmeans_anchors.find_anchors(sides, 5, starts=5, seed=0)
    torch.testing.assert_close(found, middles, rtol=0.02, atol=0)
    assert anchor_fit(sides, found).mean_iou > 0.88
    with pytest.raises(UserError, match="5 anchors need 5 different object sizes, but found 1"):
        kmeans_anchors.find_anchors(torch.ones(9, 2), 5, starts=1, seed=0)


def test_clusters_100_000_objects_within_10_seconds():
    sides = (torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0)) + 4).exp()
    started = time.process_time()
    kmeans_anchors.find_anchors(sides, 5, kmeans_anchors.Config.starts, seed=0)
    assert time.process_time() - started < 10


def test_writes_anchors_for_training(devkit, expect_failure, call_script, tmp_path):
    out, classes = tmp_path / "anchors.txt", devkit / "Demo" / "classes.txt"
    flags = ["--devkit", devkit, "--sets", "Demo/train", "--classes", classes, "--out", out, "--input-size", 320, 320]
    outcome = call_script(kmeans_anchors.main, kmeans_anchors.Config, *flags)
    assert outcome.code == 0, outcome.errors
    before, after = re.findall(r"recall [\d.]+, mean IoU ([\d.]+)", outcome.output)
    assert float(after) > float(before) + 0.02
    anchors = load_anchors(out)
    assert anchors[0] == anchors[1]  # no head has the first one
    areas = [width * height for width, height in anchors]
    assert areas == sorted(areas)
    assert out.with_suffix(".png").stat().st_size > 10_000
    expect_failure(kmeans_anchors, flags, f"{out} already exists", "--out")
    expect_failure(kmeans_anchors, ["--input-size", 100, 96], "must be multiples of 32")
