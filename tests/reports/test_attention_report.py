"""Comparing attention blocks: what a few seeds say, and the tool that trains and measures them."""

import json
import os
import signal
import subprocess
import sys
from math import sqrt

import pytest
import torch
import tyro

import eval as eval_script
import train
from tests.conftest import ROOT
from tools import compare_attention
from utils.data.image_io import read_image
from utils.evaluation.significance import judge, mean_of, seeds_needed
from utils.reports.attention_report import Cost, Result, compare_phis, conclude, write_comparison
from utils.weights.checkpoint import load_checkpoint

T_2, T_1 = 4.302653, 12.706205  # Student's t at 97.5 % with 2 and 1 degrees of freedom, from tables


def test_a_mean_and_its_interval():
    value, margin = mean_of([0.1, 0.2, 0.3])  # standard deviation 0.1
    assert value == pytest.approx(0.2)
    assert margin == pytest.approx(T_2 * 0.1 / sqrt(3), rel=1e-6)
    assert mean_of([1.0, 3.0]).margin == pytest.approx(T_1 * sqrt(2) / sqrt(2), rel=1e-6)
    assert mean_of([0.4]) == (0.4, None)


def test_a_difference_counts_where_its_interval_leaves_out_0():
    """Three differences with standard deviation 0.01: the margin is 0.0248; at 99.5 %, t 14.089, it is 0.0813."""
    assert judge([0.02, 0.03, 0.04]) == "better"  # 0.03
    assert judge([-0.02, -0.03, -0.04]) == "worse"
    assert judge([0.01, 0.02, 0.03]) == "not distinguishable"  # 0.02
    assert judge([0.02, 0.03, 0.04], comparisons=10) == "perhaps better"
    assert judge([0.08, 0.09, 0.1], comparisons=10) == "better"
    assert judge([0.07, 0.08, 0.09], comparisons=10) == "perhaps better"
    assert judge([0.5]) == "unknown"


def test_the_seeds_that_a_difference_needs():
    """t(n - 1) / sqrt(n) falls: 2.484 at 3, 1.591 at 4, 1.242 at 5, 1.049 at 6, 0.925 at 7."""
    assert seeds_needed([0.0, 0.01, 0.02]) == 7  # a deviation of 0.01 for a mean of 0.01
    assert seeds_needed([0.01, 0.02, 0.03]) == 4  # 0.02 is twice the deviation, but 2.484 times at 3 would be more
    assert seeds_needed([-0.005, 0.0, 0.005]) == 7  # no difference: for 0.005, which would be worth knowing
    assert seeds_needed([-10.0, 10.0]) == 1000
    assert seeds_needed([0.0, 0.01, 0.02], comparisons=9) > 7


def results_of(*values):
    return {seed: Result(AP, AP + 0.3, 60 + seed) for seed, AP in enumerate(values)}


def test_differences_are_paired_by_seed(tmp_path):
    """Seeds scatter by 0.1, but each gains: only pairing sees it."""
    results = {0: results_of(0.3, 0.4, 0.5), 3: results_of(0.32, 0.43, 0.54), 9: results_of(0.31, 0.38, 0.5)}
    rows = compare_phis(results, {phi: Cost(5_918_006 + phi, 6.9, 20.0) for phi in results})
    plain, eca, triplet = rows
    assert plain.difference is None
    assert eca.differences == pytest.approx((0.02, 0.03, 0.04))
    assert eca.difference == pytest.approx((0.03, T_2 * 0.01 / sqrt(3)))
    assert eca.verdict == "perhaps better"  # one of two
    assert triplet.verdict == "not distinguishable"
    assert (plain.seconds, plain.AP50.value) == (61, pytest.approx(0.7))
    said = conclude(rows)
    assert len(said) == 2
    assert "phi 3 (eca_block) is perhaps better than phi 0" in said[0]
    assert "More seeds are needed" in said[1]
    text = write_comparison(tmp_path, rows, ["On drawn numbers."])
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


def test_blocks_that_are_alike_are_said_to_be():
    """Differences of 0.001 at most over five seeds: 0.005 would have shown."""
    results = {0: results_of(*[0.4] * 5), 5: results_of(0.401, 0.4, 0.399, 0.4, 0.4)}
    (sentence,) = conclude(compare_phis(results, dict.fromkeys(results, Cost(1, 1.0))))
    assert "phi 5 (SimAM) is not distinguishable from phi 0" in sentence
    assert "A difference of 0.0050 would have shown" in sentence


def test_no_difference_at_all_is_none_that_would_have_shown():
    rows = compare_phis(
        {0: results_of(0.1, 0.2, 0.3), 3: results_of(0.1, 0.2, 0.3)}, dict.fromkeys((0, 3), Cost(1, 1.0))
    )
    assert conclude(rows) == [
        "phi 3 (eca_block) gives exactly what phi 0 gives: these trainings were too short for its gain to grow."
    ]


def test_too_few_seeds_are_said_plainly(tmp_path):
    costs = dict.fromkeys((0, 1), Cost(1, 1.0))
    single = compare_phis({0: results_of(0.3), 1: results_of(0.4)}, costs)
    assert single[1].verdict == "unknown"
    assert conclude(single)[0].startswith("A single seed cannot tell attention from chance")
    double = compare_phis({0: results_of(0.3, 0.3), 1: results_of(0.4, 0.35)}, costs)
    assert conclude(double)[0].startswith("2 seeds give very wide intervals: more seeds are needed")
    without_plain = compare_phis({1: results_of(0.4)}, costs)
    assert without_plain[0].verdict == "unknown"
    assert "unknown" in write_comparison(tmp_path, without_plain, [])


@pytest.fixture(scope="module")
def flags(devkit):
    """Of a comparison of four tiny trainings."""
    settings = ["--devkit", devkit, "--train-sets", "Demo/val", "--test-sets", "Demo/test", "--epochs", 1]
    settings += ["--classes", devkit / "Demo" / "classes.txt", "--phis", 0, 3, "--seeds", 0, 1, "--device", "cpu"]
    return [*map(str, settings)]


TINY = ["--", "--input-size", "64", "64", "--batch-size", "6", "--precision", "fp32"]


def test_runs_are_shared_and_taken_over(flags, tmp_path, monkeypatch, capsys, expect_failure, request):
    """Another process has the first run; this one does the others, waits, and goes on when that one is stopped."""
    arguments = [*flags, "--out", str(tmp_path / "c"), *TINY]
    command = [sys.executable, str(ROOT / "tools" / "compare_attention.py"), *arguments]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    request.addfinalizer(other.terminate)
    assert "phi 0, seed 0: training" in other.stdout.readline()
    trained = []

    def call(self: compare_attention.Run, script: str, *words: object) -> None:
        """In this process, which saves the seconds that Python and torch take to start."""
        if script == "train.py":
            trained.append((self.phi, self.seed))
            if len(trained) == 2:
                other.send_signal(signal.SIGTERM)
                assert other.wait(timeout=100) == 128 + signal.SIGTERM
        module = {"train.py": train, "eval.py": eval_script}[script]
        module.main(tyro.cli(module.Config, args=[*map(str, words)]))

    monkeypatch.setattr(compare_attention.Run, "call", call)
    monkeypatch.setattr(compare_attention, "WAIT", 0.2)
    monkeypatch.setattr(compare_attention, "TIMED", 2)
    compare_attention.main(tyro.cli(compare_attention.Config, args=arguments))
    assert trained == [(3, 0), (0, 1), (3, 1), (0, 0)]
    printed = capsys.readouterr().out
    assert "4 of 4 trainings are done" in printed
    assert "2 seeds give very wide intervals" in printed
    figures = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [row["phi"] for row in figures["rows"]] == [0, 3]
    for row in figures["rows"]:
        assert row["seeds"] == [0, 1]
        assert row["cost"]["ms"] > 0
        assert row["seconds"] > 0
    assert figures["rows"][1]["cost"]["parameters"] - figures["rows"][0]["cost"]["parameters"] == 15 + 3  # with gains
    first, second = (load_checkpoint(tmp_path / "c" / f"phi0_seed{seed}" / "last.safetensors") for seed in (0, 1))
    assert not torch.equal(first.weights["conv_for_P5.conv.weight"], second.weights["conv_for_P5.conv.weight"])
    compare_attention.main(compare_attention.Config(out=str(tmp_path / "c")))  # nothing is left to do
    assert len(trained) == 4
    expect_failure(
        compare_attention, [*flags, "--out", tmp_path / "c", "--epochs", 2, *TINY], "epochs is 1 there, not 2"
    )


def test_a_run_is_a_process_of_its_own_on_its_own_gpu(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    own = compare_attention.own_environment()
    assert own["CUDA_VISIBLE_DEVICES"] == "1"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & own.keys()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert compare_attention.own_environment()["CUDA_VISIBLE_DEVICES"] == "7"
    assert own["PATH"] == os.environ["PATH"]


def test_mistakes_are_explained(flags, expect_failure, tmp_path):
    out = ["--out", tmp_path / "c"]
    expect_failure(compare_attention, ["--phis", 1, 2], "phis must have 0")
    expect_failure(compare_attention, ["--phis", 0, 77], "phis has 77", "1 (se)")
    expect_failure(compare_attention, ["--seeds"], "seeds is empty")
    words = ("train.py failed for phi 0 and seed 0", "phi0_seed0.log", "lr is 0.0, but must be")
    expect_failure(compare_attention, [*flags, *out, "--", "--lr", 0], *words)
    expect_failure(compare_attention, [*flags, *out, "--", "--lr", -1], "lr is -1.0, but must be")  # nothing has begun
    expect_failure(compare_attention, [*flags, *out, "--test-sets", "Demo/tset"], "there is no data set Demo/tset")
    expect_failure(compare_attention, [*flags, *out, "--test-sets", "Demo/val"], "6 images are in the training and in")
