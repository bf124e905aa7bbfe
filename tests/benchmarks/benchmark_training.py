"""Measure training and evaluation: python tests/benchmarks/benchmark_training.py train|evaluation|memory

train: speed of the training loop relative to the bare step (forward, loss, backward, optimizer, EMA) on one batch in
memory, the share of each part of a step, and the peak memory
evaluation: duration of the parts of eval.py
memory: peak memory of train.py with a disk cache, for a small and a large dataset
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import closing, redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import cycle, pairwise
from pathlib import Path
from signal import SIGTERM
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from tools import make_demo_data
from utils.data import loader
from utils.data.augment import BatchPlan
from utils.data.cache import build_cache
from utils.data.voc import load_samples, read_split
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.evaluation.metrics import evaluate
from utils.inference.detector import Detector
from utils.reports.evaluation_report import EvaluationReport
from utils.system.cli import INPUT_SIZE, run_script
from utils.system.device import autocast, choose_device, keep_freed_memory, synchronize
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.system.prefetch import prefetch_map
from utils.system.signals import StopSignals
from utils.training.batch_size import peak_memory
from utils.training.engine import epoch_batches, run_epoch
from utils.training.run_folder import RunFolder
from utils.training.trainer import Trainer
from utils.training.training_state import Progress
from utils.weights.checkpoint import LAST, find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MAX_GENERATED = 320  # images; larger datasets repeat them
EPOCHS = 1000  # of the schedule, more than any benchmark trains
EPOCHS_PER_ROUND = 3
WARMUP_STEPS = 5
PARTS = ("loading", "augmentation", "forward", "backward", "optimizer")  # parts of a step


@dataclass(frozen=True)
class Config:
    """Measure training and evaluation."""

    benchmark: tyro.conf.Positional[Literal["train", "evaluation", "memory"]]  # what to measure
    batch_size: int = 8  # images per step or batch
    rounds: int = 3  # train: times that epochs are trained between measurements of the bare step; evaluation: rounds
    steps: int = 60  # train: steps per epoch and measurement of the bare step; memory: steps until a run is stopped
    device: str = "auto"  # auto, cpu, cuda or cuda:N (the GPU with index N)
    phi: int = 0  # train: attention block
    mosaic: float = 1.0  # train: probability of mosaic
    compile: str = "auto"  # train: on, off, or auto: on a GPU
    cache: str = "auto"  # train: where the images are kept: auto, device, ram or disk
    trial: Literal["", "cudnn-benchmark", "reduce-overhead", "one-thread"] = ""  # train: a change to try on a GPU
    input_size: Annotated[tuple[int, int], INPUT_SIZE] = (416, 416)  # train and memory: height and width
    images: tuple[int, int] = (2000, 20_000)  # memory: sizes of the datasets; 20,000 images take 11 GB on disk
    weights: str = ""  # evaluation: checkpoint or run folder; empty: the newest run in logs/
    devkit: str = "VOCdevkit"  # evaluation: folder of the datasets
    sets: tuple[str, ...] = ("VOC2007/test",)  # evaluation: sets to evaluate on


def generate_images(devkit: Path, images: int) -> None:
    """Generate a dataset Demo with a split `repeated` of `images` images, links to at most MAX_GENERATED files."""
    folder = devkit / "Demo"
    make_demo_data.main(make_demo_data.Config(str(folder), train=min(images, MAX_GENERATED), val=1, test=1))
    names = [f"{number:06}" for number in range(images)]  # a split cannot list the same image twice
    for name, original in zip(names, cycle(read_split(devkit, "Demo/train")), strict=False):
        for part, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
            os.link(folder / part / f"{original}{suffix}", folder / part / f"{name}{suffix}")
    (folder / "ImageSets" / "Main" / "repeated.txt").write_text("\n".join(names), encoding="utf-8")


def training_settings(config: Config, devkit: Path, run_dir: Path) -> train.Config:
    return train.Config(
        devkit=str(devkit), train_sets=("Demo/repeated",), val_sets=(), classes=str(devkit / "Demo" / "classes.txt"),
        anchors=str(ROOT / "model_data" / "yolo_anchors.txt"), phi=config.phi, input_size=config.input_size,
        run_dir=str(run_dir), epochs=EPOCHS, batch_size=config.batch_size, nominal_batch=config.batch_size,
        mosaic=config.mosaic, mosaic_until=1.0, device=config.device, compile=config.compile, cache=config.cache,
    )  # fmt: skip


def training_command(settings: train.Config) -> list[str]:
    changed = {name: value for name, value in asdict(settings).items() if value != getattr(train.Config(), name)}
    command = [sys.executable, str(ROOT / "train.py")]
    for name, value in changed.items():
        command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return command


class TrainingRun:
    """A training run whose epochs are measured, and its bare step on one batch in memory."""

    def __init__(self, settings: train.Config, run: RunFolder) -> None:
        self.settings, self.run, self.stop = settings, run, StopSignals()
        self.trainer, self.data = train.prepare(settings, None, Progress(end=settings.epochs), run, ProcessGroup())
        self.trainer.set_mode(frozen=False)
        self.batches = epoch_batches(self.trainer, settings, self.data)
        with closing(self.batches.load([0], self.trainer.device)) as loaded:
            self.batch = next(loaded)

    def now(self) -> float:
        """The time at which the device has finished its work."""
        synchronize(self.trainer.device)
        return time.perf_counter()

    def time_bare_steps(self, steps: int) -> float:
        """Images per second of the bare step."""
        started = self.now()
        for _ in range(steps):
            self.trainer.backward(*self.batch)
            self.trainer.state.step()
        return steps * len(self.batch[0]) / (self.now() - started)

    def time_epochs(self, epochs: int) -> list[float]:
        """Images per second of complete epochs, with everything that train.py does in them."""
        times = [self.now()]
        for _ in range(epochs):
            run_epoch(self.trainer, self.settings, self.data, self.run, self.stop)
            times.append(self.now())
        self.run.finish_saving()  # in parallel with the next epoch, but not with the bare step
        images = len(self.batches) * len(self.batch[0])
        return [images / (after - before) for before, after in pairwise(times)]

    def shares(self, steps: int) -> dict[str, float]:
        """The share of each of PARTS in a step, synchronized after each; loading is the wait for a planned batch."""
        trainer, seconds = self.trainer, defaultdict(float)
        numbers = [step % len(self.batches) for step in range(WARMUP_STEPS + steps)]
        times: list[float] = []

        def render(plan: BatchPlan) -> Tensor:
            times.append(self.now())
            return trainer.render(plan)

        with closing(self.batches.load(numbers, trainer.device, render)) as loaded:
            for step in range(len(numbers)):
                times[:] = [self.now()]
                images, boxes, labels = next(loaded)
                times.append(self.now())
                with autocast(trainer.device, trainer.dtype):
                    heads = trainer.network(images)
                times.append(self.now())
                trainer.state.scaler.scale(trainer.loss(heads, boxes, labels)["loss"]).backward()
                times.append(self.now())
                trainer.state.step()
                times.append(self.now())
                for part, (before, after) in zip(PARTS, pairwise(times), strict=True):
                    seconds[part] += (after - before) * (step >= WARMUP_STEPS)
        return {part: value / sum(seconds.values()) for part, value in seconds.items()}


def start_trial(name: str, trainer: Trainer) -> None:
    """Change the GPU path for the rest of the process: cuDNN's search, CUDA graphs, or one thread that gathers."""
    if name == "cudnn-benchmark":
        torch.backends.cudnn.benchmark = True
    elif name == "reduce-overhead":
        trainer.state.model.compile(dynamic=False, mode="reduce-overhead")
    elif name == "one-thread":
        loader.prefetch_map = lambda function, items, _: prefetch_map(function, items, 1)


def benchmark_train(config: Config) -> dict[str, object]:
    """Median speeds of training and of the bare step, their ratio, the share of each part of a step, and the memory."""
    epochs, bare = [], []
    with tempfile.TemporaryDirectory() as name:
        devkit = Path(name) / "devkit"
        generate_images(devkit, config.steps * config.batch_size)
        settings = training_settings(config, devkit, Path(name) / "run")
        with closing(RunFolder(Path(settings.run_dir))) as folder:
            run = TrainingRun(settings, folder)
            start_trial(config.trial, run.trainer)
            run.time_bare_steps(WARMUP_STEPS)
            run.time_epochs(1)
            for _ in range(config.rounds):
                bare.append(run.time_bare_steps(config.steps))
                epochs += run.time_epochs(EPOCHS_PER_ROUND)
                bare.append(run.time_bare_steps(config.steps))
            memory = peak_memory(run.trainer.device) / 1e9
            shares = run.shares(config.steps)
    speed, bare_speed = statistics.median(epochs), statistics.median(bare)
    figures = {"images_per_second": speed, "bare_step_images_per_second": bare_speed, "ratio": speed / bare_speed}
    figures |= {"epochs": epochs, "shares": shares, "peak_memory_gb": memory}
    return figures | {"compiled": run.trainer.compiled, "precision": str(run.trainer.dtype)}


def time_evaluation(config: Config, detector: Detector) -> dict[str, float]:
    """Seconds of each part of an evaluation."""
    names, times = detector.spec.class_names, [time.perf_counter()]

    def record() -> None:
        synchronize(detector.network.device)
        times.append(time.perf_counter())

    samples = load_samples(config.devkit, config.sets, names)
    record()
    cache = build_cache(samples, detector.spec, detector.network.device)
    record()
    network, detections = 0.0, []
    batches = detector.run_cached(cache, config.batch_size)
    for _ in range(math.ceil(len(cache) / config.batch_size)):
        started = time.perf_counter()
        part, heads = next(batches)
        synchronize(detector.network.device)
        network += time.perf_counter() - started
        detections += detector.select(heads, cache.fits[part], cache.sizes[part])
    record()
    evaluation = evaluate(samples, detections, cache.sizes, names)
    record()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(config.weights)
        report = EvaluationReport(weights, config.devkit, config.sets, detector, cache, detections, evaluation)
        report.write(Path(folder))
        record()
    parts = ("annotations", "images", "detections", "metrics", "report")
    seconds = dict(zip(parts, np.diff(times).tolist(), strict=True))
    return seconds | {"network": network, "detections": seconds["detections"] - network}


def benchmark_evaluation(config: Config) -> dict[str, object]:
    """Median seconds of the parts, and the share of the time outside the network, without and with the report."""
    path, device = find_checkpoint(config.weights), choose_device(config.device)
    detector = Detector.load(path, device, thresholds=EVALUATION_THRESHOLDS)
    rounds = [time_evaluation(config, detector) for _ in range(config.rounds + 1)][1:]  # the first one is a warm-up
    seconds = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    total, network = sum(seconds.values()), seconds["network"]
    share = 1 - network / (total - seconds["report"])
    return {"seconds": seconds, "share_without_network": share, "share_with_report": 1 - network / total}


def measure_peak_memory(config: Config, folder: Path, images: int) -> float:
    """Peak memory in GB, without mapped files, of a run of train.py until its first checkpoint."""
    generate_images(folder / "devkit", images)
    settings = training_settings(config, folder / "devkit", folder / "run")
    settings = replace(settings, cache="disk", checkpoint_every=config.steps)
    process = subprocess.Popen(training_command(settings), cwd=folder, stdout=subprocess.DEVNULL)
    peak, stopping = 0.0, False
    try:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)  # None for a process that is exiting
            peak = max(peak, 1024 * int(found[1]) / 1e9) if found else peak
            if not stopping and (folder / "run" / LAST).exists():
                process.send_signal(SIGTERM)
                stopping = True
            time.sleep(0.2)
    finally:
        process.kill()  # does nothing if it has ended
        process.wait()
    if not stopping or process.returncode != 128 + SIGTERM:
        raise RuntimeError(f"train.py exited with {process.returncode}")
    return peak


def benchmark_memory(config: Config) -> dict[str, object]:
    """Peak memory for both datasets, and the ratio of the second to the first."""
    if sys.platform != "linux":
        raise UserError(f"memory is measured with Linux's /proc, which {sys.platform} does not have")
    with tempfile.TemporaryDirectory() as folder:
        peaks = [measure_peak_memory(config, Path(folder) / str(images), images) for images in config.images]
    return {"peaks_gb": peaks, "ratio": peaks[1] / peaks[0]}


BENCHMARKS = {"train": benchmark_train, "evaluation": benchmark_evaluation, "memory": benchmark_memory}


def main(config: Config) -> None:
    with StopSignals(), redirect_stdout(sys.stderr):  # temporary folders are deleted after a signal too
        if config.benchmark != "memory" and choose_device(config.device).type == "cpu":
            keep_freed_memory()
        figures = BENCHMARKS[config.benchmark](config)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_script(main, Config)
