"""The benchmark programs run and print their figures."""

import json
import sys

import pytest

from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.benchmarks import benchmark_inference, benchmark_training
from tests.conftest import ANCHORS
from tests.narrow_network import use_narrow_network
from utils.data.voc import load_classes
from utils.system.cli import run_script
from utils.weights.checkpoint import Checkpoint, save_checkpoint

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch):
    use_narrow_network(monkeypatch)


@pytest.fixture
def weights(narrow_network, devkit, tmp_path):
    """An untrained network for the generated set."""
    spec = ModelSpec(load_classes(devkit / "Demo" / "classes.txt"), ANCHORS, input_size=(32, 32))
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, Checkpoint(spec, build_model(spec).state_dict(), {}, {}))
    return path


@pytest.fixture
def measure(monkeypatch, capsys):
    """Run a benchmark program on the CPU and return its figures."""

    def call(program, *arguments):
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments), "--device", "cpu"])
        run_script(program.main, program.Config)
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["network", "--rounds", 1, "--no-compile"], {"torch fp32"}),
        (["folder", "--rounds", 1], {"ratio", "decoding", "network", "whole", "images"}),
        (["video", "--frames", 3], {"share", "frames", "seconds"}),
        pytest.param(["memory", "--frames", 70], {"mb_per_10000_frames", "mb"}, marks=needs_proc),
    ],
)
def test_inference_benchmark_prints_figures(arguments, expected, weights, devkit, measure, monkeypatch):
    monkeypatch.setattr(benchmark_inference, "SMALL_FRAMES", 30)  # three videos
    source = ["--source", devkit / "Demo" / "JPEGImages" / "test_*.jpg"] if arguments[0] == "folder" else []
    figures = measure(benchmark_inference, *arguments, *source, "--weights", weights)
    assert expected <= figures.keys()
    if arguments[0] == "video":
        assert figures["frames"] == 3 and 0 < figures["share"] < 1
    if arguments[0] == "folder":
        assert figures["images"] == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["network", "--rounds", 0], ["rounds is 0"]),
        (["network", "--batch-size", 0], ["batch_size is 0"]),
        (["network", "--no-compile", "--exported", "a.safetensors"], ["a.safetensors does not end with", "--weights"]),
        (["network", "--no-compile", "--exported", "none.onnx"], ["none.onnx does not exist"]),
        (["network", "--weights", "none.onnx"], ["none.onnx is not a checkpoint", "--exported"]),
        (["memory", "--frames", 0], ["frames is 0"]),
        (["video", "--precision", "fp16", "--device", "cpu"], ["fp16 needs a GPU"]),
    ],
)
def test_inference_benchmark_refuses_invalid_settings(arguments, words, weights, expect_failure):
    given = [] if "--weights" in arguments else ["--weights", weights]
    expect_failure(benchmark_inference, [*arguments, *given], *words)


def test_training_loop_is_compared_with_the_bare_step(measure, monkeypatch):
    monkeypatch.setattr(benchmark_training, "EPOCHS", 3)
    monkeypatch.setattr(benchmark_training, "WARMUP_STEPS", 1)
    settings = ["--batch-size", 2, "--rounds", 1, "--steps", 2, "--input-size", 32]
    figures = measure(benchmark_training, "train", *settings)
    assert figures["ratio"] == pytest.approx(figures["images_per_second"] / figures["bare_step_images_per_second"])
    assert len(figures["epochs"]) == 2
    assert set(figures["shares"]) == {"augmentation", "forward", "backward", "optimizer"}
    assert sum(figures["shares"].values()) == pytest.approx(1)


def test_evaluation_is_divided_into_parts(weights, devkit, measure):
    settings = ["--weights", weights, "--devkit", devkit, "--sets", "Demo/val", "--rounds", 1]
    figures = measure(benchmark_training, "evaluation", *settings)
    assert 0 < figures["share_without_network"] < figures["share_with_report"] < 1


@needs_proc
def test_peak_memory_of_training_is_measured_for_two_datasets(measure):
    settings = ["--batch-size", 2, "--images", 2, 4, "--input-size", 32, "--steps", 1]
    figures = measure(benchmark_training, "memory", *settings)
    small, large = figures["peaks_gb"]
    assert figures["ratio"] == pytest.approx(large / small)
    assert min(small, large) > 0.1


def test_memory_benchmark_needs_linux(expect_failure, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    expect_failure(benchmark_training, ["memory"], "darwin")
