"""The benchmark programs run and print their figures."""

import json
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import tyro

import eval as eval_script
import train
from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.benchmarks import benchmark_gpu, benchmark_inference, benchmark_training
from tests.conftest import ANCHORS
from tests.narrow_network import use_narrow_network
from utils.data import loader
from utils.data.voc import load_classes, load_samples
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
        (["network", "--rounds", 1, "--no-compile"], {"torch fp32", "NMS", "NMS of an evaluation"}),
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


def test_repeated_images_are_all_used(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_training, "MAX_GENERATED", 2)
    benchmark_training.generate_images(tmp_path, 5)
    samples = load_samples(tmp_path, ["Demo/repeated"], load_classes(tmp_path / "Demo" / "classes.txt"))
    assert len(samples) == 5
    assert [len(sample.boxes) for sample in samples[:2]] == [len(sample.boxes) for sample in samples[2:4]]


def test_training_loop_is_compared_with_the_bare_step(measure, monkeypatch):
    monkeypatch.setattr(benchmark_training, "EPOCHS_PER_ROUND", 2)
    monkeypatch.setattr(benchmark_training, "WARMUP_STEPS", 1)
    settings = ["--batch-size", 2, "--rounds", 1, "--steps", 2, "--input-size", 32]
    figures = measure(benchmark_training, "train", *settings)
    assert figures["ratio"] == pytest.approx(figures["images_per_second"] / figures["bare_step_images_per_second"])
    assert len(figures["epochs"]) == 2
    assert set(figures["shares"]) == {"loading", "augmentation", "forward", "backward", "optimizer"}
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


@pytest.fixture
def gpu_benchmark(monkeypatch, tmp_path, capsys):
    """Run a part of the GPU benchmark on the CPU, all in this process; returns its file and its table."""
    programs = {"training": benchmark_training, "inference": benchmark_inference}
    monkeypatch.setattr(benchmark_gpu, "TRIALS", {"eager": ("--compile", "off")})
    for name in ("MIN_STEPS", "MIN_IMAGES", "ROUNDS"):
        monkeypatch.setattr(benchmark_gpu, name, 1)
    for name in ("EPOCHS_PER_ROUND", "WARMUP_STEPS"):
        monkeypatch.setattr(benchmark_training, name, 1)

    def run_here(_, path, *arguments):
        name = Path(path).stem.removeprefix("benchmark_")
        eager = ["--no-compile"] if name == "inference" else []
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments), *eager])
        with redirect_stdout(StringIO()) as printed:
            run_script(programs[name].main, programs[name].Config)
        return printed.getvalue()

    monkeypatch.setattr(benchmark_gpu.Measurements, "run", run_here)

    def call(part, *arguments):
        own = [part, "--out", tmp_path / "gpu", "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", *map(str, own)])
        run_script(benchmark_gpu.main, benchmark_gpu.Config)
        return json.loads((tmp_path / "gpu" / f"{part}.json").read_text()), capsys.readouterr().out

    return call


def test_gpu_benchmark_compares_loops_and_trials(gpu_benchmark):
    found, table = gpu_benchmark("loop", "--phis", 2, "--batch-sizes", 2, "--input-size", 32)
    assert list(found["figures"]) == ["phi 2, batch 2", "phi 2, batch 2, eager"]
    assert not found["left_out"]
    figures = found["figures"]["phi 2, batch 2"]
    row = next(line for line in table.splitlines() if line.startswith("phi 2, batch 2 "))
    assert f"{figures['ratio']:.4g}" in row and f"{figures['peak_memory_gb']:.4g}" in row


def test_gpu_benchmark_compares_accuracy_with_the_cpu(gpu_benchmark, monkeypatch, tmp_path):
    devkit, commands = tmp_path / "data", []

    def run(measurements, program, *arguments):
        words = list(map(str, arguments))
        commands.append(tyro.cli({"train.py": train, "eval.py": eval_script}[program].Config, args=words))
        if program == "train.py":
            Path(commands[-1].run_dir).mkdir(parents=True, exist_ok=True)
            (Path(commands[-1].run_dir) / "last.safetensors").touch()
        else:
            Path(commands[-1].out).mkdir(exist_ok=True)
            (Path(commands[-1].out) / "metrics.json").write_text('{"coco": {"AP": 0.61, "AP50": 0.91}}')

    monkeypatch.setattr(benchmark_gpu.Measurements, "run", run)
    found, table = gpu_benchmark("accuracy", "--devkit", devkit, "--seeds", 0, 4)
    assert {name: figures["AP50"] for name, figures in found["figures"].items()} == {"seed 0": 0.91, "seed 4": 0.91}
    rows = [line.split("  ")[0] for line in table.splitlines()[1:]]
    assert rows == ["seed 0", "seed 4", "mean", "CPU", "difference", "seed spread"]
    first, _, second, evaluation = commands
    assert (first.seed, second.seed, first.epochs, first.device) == (0, 4, 30, "cpu")
    assert (first.train_sets, first.val_sets, first.resume) == (("VOC2007/trainval",), (), False)
    assert evaluation.weights == (str(Path(second.run_dir) / "last.safetensors"),)
    assert evaluation.sets == ("VOC2007/test",) and evaluation.devkit == first.devkit == str(devkit)
    (tmp_path / "gpu" / "accuracy.json").unlink()  # as if the first run had been interrupted
    gpu_benchmark("accuracy", "--devkit", devkit, "--seeds", 0)
    assert commands[-2].run_dir == first.run_dir and commands[-2].resume


def test_difference_from_the_cpu_is_compared_with_the_larger_seed_spread():
    runs = {"seed 0": {"AP": 0.60, "AP50": 0.9, "seconds": 9.0}, "seed 1": {"AP": 0.61, "AP50": 0.9, "seconds": 9.0}}
    rows = benchmark_gpu.compare_with_cpu(runs)
    assert rows["mean"] == pytest.approx({"AP": 0.605, "AP50": 0.9})
    assert rows["difference"]["AP"] == pytest.approx(0.605 - 0.614)
    assert rows["seed spread"] == pytest.approx({"AP": 0.01, "AP50": 0.003})


def test_gpu_benchmark_needs_the_dataset_for_accuracy(expect_failure):
    expect_failure(benchmark_gpu, ["accuracy"], "bccd", "--devkit")


def test_gpu_benchmark_measures_prediction(gpu_benchmark):
    found, table = gpu_benchmark("inference", "--batch-sizes", 2, "--input-size", 32)
    ms = found["figures"]["batch 2"]["ms"]["torch fp32"]
    row = next(line for line in table.splitlines() if line.startswith("batch 2, torch fp32 "))
    assert row.split()[-2:] == [f"{ms:.4g}", f"{2000 / ms:.4g}"]


@pytest.mark.parametrize("arguments", benchmark_gpu.TRIALS.values(), ids=benchmark_gpu.TRIALS)
def test_trials_are_settings_of_the_training_benchmark(arguments):
    config = tyro.cli(benchmark_training.Config, args=["train", *arguments])
    assert (config.trial, config.compile, config.cache) != ("", "auto", "auto")


def test_trials_change_the_gpu_path(monkeypatch):
    workers = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(loader, "prefetch_map", None)
    monkeypatch.setattr(benchmark_training, "prefetch_map", lambda *arguments: workers.append(arguments[-1]))
    benchmark_training.start_trial("cudnn-benchmark", None)
    benchmark_training.start_trial("one-thread", None)
    loader.prefetch_map(abs, [], 2)
    assert torch.backends.cudnn.benchmark and workers == [1]


def test_finished_measurements_are_kept_and_others_repeated(tmp_path):
    first = benchmark_gpu.Measurements(tmp_path, "loop", seconds=100)

    def fail(_):
        raise RuntimeError("no memory")

    first.measure("a", lambda _: {"ratio": 1})
    first.measure("b", fail)
    first.deadline = 0
    first.measure("c", lambda _: {"ratio": 3})
    saved = json.loads((tmp_path / "loop.json").read_text())
    assert saved["figures"] == {"a": {"ratio": 1}}
    assert saved["left_out"].keys() == {"b", "c"}
    assert "no memory" in saved["left_out"]["b"] and "not enough time" in saved["left_out"]["c"]

    second = benchmark_gpu.Measurements(tmp_path, "loop", seconds=100)
    for name in ("a", "b", "c"):
        second.measure(name, lambda _: {"ratio": 2})
    assert json.loads((tmp_path / "loop.json").read_text())["figures"] == {
        name: {"ratio": 1 + (name != "a")} for name in "abc"
    }


def test_program_that_fails_or_takes_too_long_is_reported(tmp_path):
    (tmp_path / "failing.py").write_text("raise MemoryError('no GPU: 1\\n\\nsee the manual\\n')")
    (tmp_path / "silent.py").write_text("raise SystemExit(3)")
    (tmp_path / "slow.py").write_text("import time; time.sleep(100)")
    (tmp_path / "working.py").write_text("import sys; print(sys.argv[1:])")
    measurements = benchmark_gpu.Measurements(tmp_path, "loop", seconds=100)
    assert measurements.run(tmp_path / "working.py", "--phi", 2) == "['--phi', '2']\n"
    with pytest.raises(RuntimeError, match=r"exit code 1, MemoryError: no GPU: 1$"):
        measurements.run(tmp_path / "failing.py")
    with pytest.raises(RuntimeError, match=r"exit code 3, see .*loop\.log"):
        measurements.run(tmp_path / "silent.py")
    measurements.deadline = 0
    with pytest.raises(subprocess.TimeoutExpired):
        measurements.run(tmp_path / "slow.py")
