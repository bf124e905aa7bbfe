"""Numbers of objects, and the fit of anchors, worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from utils.data.statistics import anchor_fit, describe_samples, min_median_max
from utils.data.voc import Sample


def make_sample(labels: list[int], difficult: list[bool]) -> Sample:
    boxes = np.zeros((len(labels), 4), np.float32)
    return Sample("a", Path("a.jpg"), None, boxes, np.array(labels, np.int64), np.array(difficult, bool))


def test_description_counts_only_objects_that_are_not_difficult():
    labels = [([0, 0, 2], [False, True, False]), ([], []), ([1], [True]), ([2], [False])]
    samples = [make_sample(*item) for item in labels]
    text = "4 images (2 without objects), 3 objects: owl 2, cat 1; no objects of dog"
    assert describe_samples(samples, ("cat", "dog", "owl")) == text
    assert describe_samples([], ("cat",)) == "0 images (0 without objects), 0 objects; no objects of cat"


def test_description_lists_ten_classes():
    samples = [make_sample(list(range(12)), [False] * 12)]
    assert describe_samples(samples, [f"c{i}" for i in range(12)]).endswith(", c9 1, 2 more classes")


def test_anchor_fit_equals_values_by_hand():
    sides, anchors = torch.tensor([[10.0, 10.0], [20.0, 10.0], [100.0, 1.0]]), torch.tensor([[10.0, 10.0]])
    fit = anchor_fit(sides, anchors)  # IoU 1, 1/2 and 10 / 190
    assert fit.mean_iou == pytest.approx((1 + 1 / 2 + 10 / 190) / 3)
    assert fit.recall == pytest.approx(2 / 3)
    assert anchor_fit(sides[:0], anchors) is None


def test_min_median_max():
    assert min_median_max([3, 1, 2.00049]) == [1, 2, 3]
    assert min_median_max([]) is None
