"""The benchmarks of training and evaluation run and print their figures."""

import json
import sys

import pytest

from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.benchmarks import benchmark_training
from tests.benchmarks.benchmark_training import Config, benchmark_memory
from tests.conftest import ANCHORS
from utils.data.voc import load_classes
from utils.weights.checkpoint import Checkpoint, save_checkpoint


def test_training_loop_is_compared_with_the_bare_step(capsys):
    config = Config("train", batch_size=2, rounds=1, steps=2, device="cpu", input_size=(64, 64))
    benchmark_training.main(config)
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"] == pytest.approx(figures["images_per_second"] / figures["bare_step_images_per_second"])
    assert len(figures["epochs"]) == 3
    assert set(figures["shares"]) == {"augmentation", "forward", "backward", "optimizer"}
    assert sum(figures["shares"].values()) == pytest.approx(1)


def test_evaluation_is_divided_into_parts(devkit, tmp_path, capsys):
    spec = ModelSpec(load_classes(devkit / "Demo" / "classes.txt"), ANCHORS, input_size=(64, 64))
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(spec, build_model(spec).state_dict(), {}, {}))
    settings = {"weights": str(tmp_path / "a.safetensors"), "devkit": str(devkit), "sets": ("Demo/val",)}
    benchmark_training.main(Config("evaluation", rounds=1, device="cpu", **settings))
    figures = json.loads(capsys.readouterr().out)
    assert 0 < figures["share_without_network"] < figures["share_with_report"] < 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_measured_for_two_sizes():
    figures = benchmark_memory(Config("memory", 2, images=(4, 12), input_size=(64, 64), steps=2, device="cpu"))
    small, large = figures["peaks_gb"]
    assert figures["ratio"] == pytest.approx(large / small)
    assert min(small, large) > 0.1


def test_memory_needs_linux(expect_failure, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    expect_failure(benchmark_training, ["memory"], "darwin")
