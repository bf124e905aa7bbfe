"""The comparison of attention blocks: rows, conclusions and files."""

import json
from math import sqrt

import pytest

from tests.evaluation.test_significance import T_2
from utils.data.image_io import read_image
from utils.reports.attention_report import Cost, Result, compare_phis, conclude, write_attention_report


def make_results(*values):
    return {seed: Result(AP, AP + 0.3, 60 + seed) for seed, AP in enumerate(values)}


def test_pairs_differences_by_seed(tmp_path):
    """AP varies by 0.1 between seeds, but rises with each: only pairing shows it."""
    results = {0: make_results(0.3, 0.4, 0.5), 3: make_results(0.32, 0.43, 0.54), 9: make_results(0.31, 0.38, 0.5)}
    rows = compare_phis(results, {phi: Cost(5_918_006 + phi, 6.9, 20.0) for phi in results})
    baseline, eca, triplet = rows
    assert baseline.difference is None
    assert eca.differences == pytest.approx((0.02, 0.03, 0.04))
    assert eca.difference == pytest.approx((0.03, T_2 * 0.01 / sqrt(3)))
    assert eca.verdict == "perhaps better"  # one of two comparisons
    assert triplet.verdict == "not distinguishable"
    assert (baseline.seconds, baseline.AP50.value) == (61, pytest.approx(0.7))
    conclusions = conclude(rows)
    assert len(conclusions) == 2
    assert "phi 3 (eca_block) is perhaps better than phi 0" in conclusions[0]
    assert "would be needed to show a difference of 0.0050" in conclusions[1]
    text = write_attention_report(tmp_path, rows, ["On made-up numbers."])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"comparison.{suffix}" for suffix in ("html", "json", "png", "txt")
    ]
    assert (tmp_path / "comparison.txt").read_text().strip() == text
    lines = text.splitlines()
    assert lines[2].split()[:5] == ["3", "eca_block", "0.4300", "±", "0.2733"]
    assert "+0.0300 ± 0.0248" in lines[2]
    assert "5,918,009" in lines[2]
    figures = json.loads((tmp_path / "comparison.json").read_text())
    assert figures["rows"][1]["differences"] == pytest.approx([0.02, 0.03, 0.04])
    page = (tmp_path / "comparison.html").read_text()
    assert "+0.0300 ± 0.0248" in page
    assert "data:image/png;base64," in page
    assert read_image(tmp_path / "comparison.png").std() > 5


def test_reports_that_a_larger_difference_would_have_shown():
    """Five differences of at most 0.001: one of 0.005 would have been significant."""
    results = {0: make_results(*[0.4] * 5), 5: make_results(0.401, 0.4, 0.399, 0.4, 0.4)}
    (sentence,) = conclude(compare_phis(results, dict.fromkeys(results, Cost(1, 1.0))))
    assert "phi 5 (SimAM) is not distinguishable from phi 0" in sentence
    assert "A difference of 0.0050 would have been significant" in sentence


def test_reports_identical_results():
    rows = compare_phis(
        {0: make_results(0.1, 0.2, 0.3), 3: make_results(0.1, 0.2, 0.3)}, dict.fromkeys((0, 3), Cost(1, 1.0))
    )
    assert conclude(rows) == [
        "phi 3 (eca_block) has exactly the AP of phi 0: the training runs were too short for its gain to grow."
    ]


def test_asks_for_more_seeds(tmp_path):
    costs = dict.fromkeys((0, 1), Cost(1, 1.0))
    single = compare_phis({0: make_results(0.3), 1: make_results(0.4)}, costs)
    assert single[1].verdict == "unknown"
    assert conclude(single)[0].startswith("One seed cannot show whether a difference is due to chance")
    double = compare_phis({0: make_results(0.3, 0.3), 1: make_results(0.4, 0.35)}, costs)
    assert conclude(double)[0].startswith("2 seeds give very wide confidence intervals")
    without_baseline = compare_phis({1: make_results(0.4)}, costs)
    assert without_baseline[0].verdict == "unknown"
    assert "unknown" in write_attention_report(tmp_path, without_baseline, [])
