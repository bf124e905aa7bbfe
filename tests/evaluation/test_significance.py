"""Confidence intervals over seeds, with values from tables of Student's t, and over images."""

from math import sqrt

import pytest
import supervision as sv

from tests.evaluation.test_coco import random_split, score
from utils.evaluation.significance import (
    bootstrap_ap,
    estimate_mean,
    estimate_seeds_needed,
    judge_differences,
    percentile_interval,
)

T_2, T_1 = 4.302653, 12.706205  # Student's t at 97.5 % with 2 and 1 degrees of freedom


def test_mean_has_students_t_interval():
    value, margin = estimate_mean([0.1, 0.2, 0.3])  # standard deviation 0.1
    assert value == pytest.approx(0.2)
    assert margin == pytest.approx(T_2 * 0.1 / sqrt(3), rel=1e-6)
    assert estimate_mean([1.0, 3.0]).margin == pytest.approx(T_1 * sqrt(2) / sqrt(2), rel=1e-6)
    assert estimate_mean([0.4]) == (0.4, None)


def test_judges_differences_by_their_interval():
    """Three differences with a standard deviation of 0.01 have a margin of 0.0248, or 0.0813 at 99.5 % (t = 14.089)."""
    assert judge_differences([0.02, 0.03, 0.04]) == "better"  # 0.03
    assert judge_differences([-0.02, -0.03, -0.04]) == "worse"
    assert judge_differences([0.01, 0.02, 0.03]) == "not distinguishable"  # 0.02
    assert judge_differences([0.02, 0.03, 0.04], comparisons=10) == "perhaps better"
    assert judge_differences([0.08, 0.09, 0.1], comparisons=10) == "better"
    assert judge_differences([0.07, 0.08, 0.09], comparisons=10) == "perhaps better"
    assert judge_differences([0.5]) == "unknown"


def test_estimates_number_of_seeds():
    """t(n - 1) / sqrt(n) is 2.484 for n = 3, 1.591 for 4, 1.242 for 5, 1.049 for 6 and 0.925 for 7."""
    assert estimate_seeds_needed([0.0, 0.01, 0.02]) == 7  # mean and standard deviation are 0.01
    assert estimate_seeds_needed([0.01, 0.02, 0.03]) == 4  # the mean is twice the standard deviation: 1.591 < 2 < 2.484
    assert estimate_seeds_needed([-0.005, 0.0, 0.005]) == 7  # no difference, so the resolution of 0.005 counts
    assert estimate_seeds_needed([-10.0, 10.0]) == 1000
    assert estimate_seeds_needed([0.0, 0.01, 0.02], comparisons=9) > 7


def test_bootstrap_separates_better_from_equal_detectors():
    samples, detections = random_split(3)
    worse = [
        sv.Detections(found.xyxy + 9, confidence=found.confidence, class_id=found.class_id) if len(found) else found
        for found in detections
    ]
    draws = bootstrap_ap([score(samples, found).matches for found in (detections, detections, worse)])
    assert (draws[0] == draws[1]).all()
    low, high = percentile_interval(draws[2] - draws[0])
    assert low < high < 0
    low, high = percentile_interval(draws[0])
    assert low < score(samples, detections).metrics["AP"] < high
