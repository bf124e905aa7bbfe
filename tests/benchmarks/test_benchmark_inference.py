"""The benchmarks of inference run and print their figures."""

import json
import sys

import pytest

from tests.benchmarks import benchmark_inference
from utils.system.cli import run_script


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["network", "--rounds", 1, "--no-compile"], {"torch fp32"}),
        (["folder", "--rounds", 1], {"ratio", "decoding", "network", "whole", "images"}),
        (["video", "--frames", 3], {"share", "frames", "seconds"}),
        (["memory", "--frames", 700], {"mb_per_10000_frames", "mb"}),
    ],
)
def test_prints_figures(arguments, expected, weights, devkit, monkeypatch, capsys):
    if arguments[0] == "folder":
        arguments = [*arguments, "--source", devkit / "Demo" / "JPEGImages" / "test_*.jpg"]
    if arguments[0] == "memory" and sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    arguments = [*arguments, "--weights", weights, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark_inference.py", *map(str, arguments)])
    run_script(benchmark_inference.main, benchmark_inference.Config)
    figures = json.loads(capsys.readouterr().out)
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
def test_refuses_invalid_settings(arguments, words, weights, expect_failure):
    given = [] if "--weights" in arguments else ["--weights", weights]
    expect_failure(benchmark_inference, [*arguments, *given], *words)
