"""Measure training and prediction on a GPU, in three parts of at most 8 minutes each:

python tests/benchmarks/benchmark_gpu.py loop
python tests/benchmarks/benchmark_gpu.py accuracy --devkit DATA/bccd
python tests/benchmarks/benchmark_gpu.py inference

loop: the training loop relative to the bare step, then trials of other settings
accuracy: AP after training on bccd, compared with that of a CPU
inference: latency and throughput of the network, from pixels to boxes and scores, and of NMS

Each measurement runs in a process of its own, since cuDNN keeps the algorithms that it has chosen. The figures are
written to OUT/PART.json after each, and the messages of the programs to OUT/PART.log. What does not fit into the time
is left out; calling the same command again measures it, also after an interruption.
"""

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nets.spec import ModelSpec
from nets.yolo import build_model
from utils.detection.anchors import load_anchors
from utils.system.cli import INPUT_SIZE, run_script
from utils.system.device import choose_device
from utils.system.errors import UserError, check_range
from utils.system.files import make_folder, read_text, write_text
from utils.system.signals import StopSignals
from utils.system.text import format_table
from utils.weights.checkpoint import LAST, Checkpoint, is_resumable, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20  # seconds that a program has to stop
MIN_STEPS, MIN_IMAGES = 60, 2000  # loop: in an epoch
ROUNDS = 20  # inference: calls whose median is reported
BATCH_SIZES = {"loop": (8, 64, 128), "inference": (1, 8, 32)}
TRIALS = {  # arguments of benchmark_training.py
    "reduce-overhead": ("--trial", "reduce-overhead"),
    "eager": ("--compile", "off"),
    "cudnn.benchmark": ("--trial", "cudnn-benchmark"),
    "RAM": ("--cache", "ram"),
    "RAM, one thread": ("--cache", "ram", "--trial", "one-thread"),
}
CPU_ACCURACY = {"AP": (0.615, 0.614, 0.613), "AP50": (0.904, 0.906, 0.903)}  # of three seeds, from docs/results.md
ERROR = re.compile(r"^[\w.]*[Ee]rror: .+", re.MULTILINE)  # last line of a traceback, or of `run_script`
Figures = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Measure training and prediction on a GPU."""

    part: tyro.conf.Positional[Literal["loop", "accuracy", "inference"]]  # what to measure
    out: str = "gpu"  # folder for the figures, one for each machine
    seconds: float = 480  # time limit
    device: str = "cuda"  # cuda, cuda:N (the GPU with index N), auto or cpu
    phis: tuple[int, ...] = (0, 2)  # loop: attention blocks; trials are made with the first
    batch_sizes: tuple[int, ...] = ()  # loop and inference; empty: 8 64 128 and 1 8 32; trials with the first two
    input_size: Annotated[tuple[int, int], INPUT_SIZE] = (416, 416)  # loop and inference: height and width
    devkit: str = ""  # accuracy: folder of the dataset bccd
    seeds: tuple[int, ...] = (0, 1, 2)  # accuracy: one run each
    epochs: int = 30  # accuracy: length of a run

    def __post_init__(self) -> None:
        check_range(self, 1, inf, "seconds", "epochs")
        if self.part == "accuracy" and not self.devkit:
            raise UserError("accuracy is measured on bccd; give the folder of the dataset with --devkit")


class Measurements:
    """The figures of a part by name, in a file that is written after each measurement; those already there are kept."""

    def __init__(self, folder: Path, part: str, seconds: float) -> None:
        self.folder, self.path, self.log = folder, folder / f"{part}.json", folder / f"{part}.log"
        self.deadline = time.monotonic() + seconds
        self.figures: dict[str, Figures] = json.loads(read_text(self.path))["figures"] if self.path.exists() else {}
        self.left_out: dict[str, str] = {}  # the reason by name
        self.durations: list[float] = []

    def remaining(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def measure(self, name: str, function: Callable[..., Figures], *arguments: object) -> None:
        """Store what the function returns, unless there is too little time for another average measurement."""
        if name in self.figures:
            return
        started, expected = time.monotonic(), statistics.mean(self.durations or [0.0])
        if self.remaining() <= expected:
            self.left_out[name] = f"not enough time: {self.remaining():.0f} of about {expected:.0f} s"
        else:
            try:
                self.figures[name] = function(self, *arguments)
            except subprocess.TimeoutExpired:
                self.left_out[name] = "stopped at the end of the time"
            except RuntimeError as error:
                self.left_out[name] = f"failed: {error}"
            self.durations.append(time.monotonic() - started)
        print(f"{name}: {self.left_out.get(name, 'measured')}", file=sys.stderr)
        self.save()

    def save(self) -> None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        content = {"gpu": gpu, **versions, "figures": self.figures, "left_out": self.left_out}
        write_text(self.path, json.dumps(content, indent=2) + "\n")

    def run(self, program: str, *arguments: object) -> str:
        """Run a program of the project; returns what it prints. Raises RuntimeError with its last error if it fails.

        At the end of the time, and if this program is stopped, the other one gets SIGTERM, so that it cleans up.
        """
        command = [sys.executable, str(ROOT / program), *map(str, arguments)]
        with (
            open(self.log, "a", encoding="utf-8") as log,
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
        ):
            start = log.tell()
            try:
                printed, _ = process.communicate(timeout=self.remaining())
            except BaseException:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                process.kill()  # does nothing if it has ended
                raise
        if process.returncode:
            logged = self.log.read_bytes()[start:].decode(errors="replace")
            messages = ERROR.findall(logged) or [f"see {self.log}"]
            raise RuntimeError(f"exit code {process.returncode}, {messages[-1]}")
        return printed


def time_loop(measurements: Measurements, config: Config, phi: int, batch_size: int, *arguments: str) -> Figures:
    """The figures that benchmark_training.py measures."""
    steps = max(MIN_STEPS, MIN_IMAGES // batch_size)
    settings = ["--phi", phi, "--batch-size", batch_size, "--steps", steps, "--input-size", *config.input_size]
    program = "tests/benchmarks/benchmark_training.py"
    return json.loads(measurements.run(program, "train", *settings, "--device", config.device, *arguments))


def measure_loop(measurements: Measurements, config: Config) -> dict[str, dict[str, float]]:
    batch_sizes = config.batch_sizes or BATCH_SIZES["loop"]
    for phi, batch_size in product(config.phis, batch_sizes):
        measurements.measure(f"phi {phi}, batch {batch_size}", time_loop, config, phi, batch_size)
    for batch_size, (trial, arguments) in product(batch_sizes[:2], TRIALS.items()):
        phi = config.phis[0]
        measurements.measure(f"phi {phi}, batch {batch_size}, {trial}", time_loop, config, phi, batch_size, *arguments)
    return {name: summarize_loop(figures) for name, figures in measurements.figures.items()}


def summarize_loop(figures: Figures) -> dict[str, float]:
    speeds = {"images/s": figures["images_per_second"], "bare": figures["bare_step_images_per_second"]}
    return speeds | {"ratio": figures["ratio"], "GB": figures["peak_memory_gb"], **figures["shares"]}


def train_and_evaluate(measurements: Measurements, config: Config, seed: int) -> Figures:
    """Train on trainval, and evaluate the last checkpoint on test, as for docs/results.md."""
    run_dir, devkit = measurements.folder / f"bccd{seed}", Path(config.devkit).resolve()
    settings = ["--devkit", devkit, "--train-sets", "VOC2007/trainval", "--val-sets", "--classes"]
    settings += [devkit / "classes.txt", "--epochs", config.epochs, "--seed", seed, "--run-dir", run_dir]
    resume = ["--resume"] if is_resumable(run_dir) else []
    started = time.monotonic()
    measurements.run("train.py", *settings, "--device", config.device, *resume)
    seconds, test = time.monotonic() - started, ["--devkit", devkit, "--sets", "VOC2007/test"]
    out = run_dir / "test"
    measurements.run("eval.py", "--weights", run_dir / LAST, *test, "--out", out, "--device", config.device)
    coco = json.loads(read_text(out / "metrics.json"))["coco"]
    return {"AP": coco["AP"], "AP50": coco["AP50"], "seconds": seconds}


def measure_accuracy(measurements: Measurements, config: Config) -> dict[str, dict[str, float]]:
    for seed in config.seeds:
        measurements.measure(f"seed {seed}", train_and_evaluate, config, seed)
    return measurements.figures | (compare_with_cpu(measurements.figures) if measurements.figures else {})


def compare_with_cpu(runs: Mapping[str, Figures]) -> dict[str, dict[str, float]]:
    """Means of the runs and of the CPU's, their difference, and the larger range of both, which it must not exceed."""
    values = {metric: [run[metric] for run in runs.values()] for metric in CPU_ACCURACY}
    ranges = {
        metric: max(max(own) - min(own), max(CPU_ACCURACY[metric]) - min(CPU_ACCURACY[metric]))
        for metric, own in values.items()
    }
    means = {metric: statistics.mean(own) for metric, own in values.items()}
    cpu = {metric: statistics.mean(own) for metric, own in CPU_ACCURACY.items()}
    differences = {metric: means[metric] - cpu[metric] for metric in means}
    return {"mean": means, "CPU": cpu, "difference": differences, "seed spread": ranges}


def time_prediction(measurements: Measurements, config: Config, weights: Path, batch_size: int) -> Figures:
    """The milliseconds that benchmark_inference.py measures."""
    settings = ["--weights", weights, "--batch-size", batch_size, "--rounds", ROUNDS, "--device", config.device]
    printed = measurements.run("tests/benchmarks/benchmark_inference.py", "network", *settings)
    return {"batch_size": batch_size, "ms": json.loads(printed)}


def measure_inference(measurements: Measurements, config: Config) -> dict[str, dict[str, float]]:
    weights = measurements.folder / "untrained.safetensors"
    anchors = load_anchors(ROOT / "model_data" / "yolo_anchors.txt")
    spec = ModelSpec(("a", "b", "c"), anchors, input_size=config.input_size)
    save_checkpoint(weights, Checkpoint(spec, build_model(spec).state_dict(), {}, {}))
    for size in config.batch_sizes or BATCH_SIZES["inference"]:
        measurements.measure(f"batch {size}", time_prediction, config, weights, size)
    return {
        f"{name}, {mode}": {"ms": ms, "images/s": 1000 * figures["batch_size"] / ms}
        for name, figures in measurements.figures.items()
        for mode, ms in figures["ms"].items()
    }


def print_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [
        [name, *(f"{row[column]:.4g}" if column in row else "" for column in columns)] for name, row in rows.items()
    ]
    print(format_table([["", *columns], *cells]))


PARTS = {"loop": measure_loop, "accuracy": measure_accuracy, "inference": measure_inference}


def main(config: Config) -> None:
    with StopSignals():
        choose_device(config.device)  # fails early if there is no GPU
        folder = Path(config.out).resolve()
        make_folder(folder)
        measurements = Measurements(folder, config.part, config.seconds)
        print_table(PARTS[config.part](measurements, config))
        for name, reason in measurements.left_out.items():
            print(f"{name}: {reason}")


if __name__ == "__main__":
    run_script(main, Config)
