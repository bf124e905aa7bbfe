"""Measure training and evaluation: python tests/benchmarks/benchmark_training.py train|evaluation|memory

train: speed of train.py relative to the bare step (forward, loss, backward, optimizer, EMA) on one batch in memory
evaluation: duration of the parts of eval.py
memory: peak memory of train.py with a disk cache, for a small and a large dataset
"""

import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import closing, redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from signal import SIGTERM
from typing import Annotated, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from tools import make_demo_data
from utils.data.cache import build_cache
from utils.data.voc import load_samples
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.evaluation.metrics import evaluate
from utils.inference.detector import Detector
from utils.reports.evaluation_report import EvaluationReport
from utils.system.cli import INPUT_SIZE, run_script
from utils.system.device import autocast, choose_device, keep_freed_memory, synchronize
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.system.signals import StopSignals
from utils.training.engine import epoch_batches
from utils.training.run_folder import RunFolder
from utils.training.training_state import Progress
from utils.weights.checkpoint import LAST, find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MAX_GENERATED = 320  # images; larger datasets repeat them
EPOCHS = 4  # per run of train.py; the first one is a warm-up and is not measured
WARMUP_STEPS = 5
PARTS = ("augmentation", "forward", "backward", "optimizer")  # parts of a step


@dataclass(frozen=True)
class Config:
    """Measure training and evaluation."""

    benchmark: tyro.conf.Positional[Literal["train", "evaluation", "memory"]]  # what to measure
    batch_size: int = 8  # images per step or batch
    rounds: int = 3  # train: runs between measurements of the bare step; evaluation: rounds whose medians are reported
    steps: int = 60  # train: steps per epoch and measurement of the bare step; memory: steps until a run is stopped
    device: str = "auto"  # auto, cpu, cuda or cuda:N, the GPU with index N
    phi: int = 0  # train: attention block
    mosaic: float = 1.0  # train: probability of mosaic
    compile: str = "auto"  # train: on, off, or auto: on a GPU
    input_size: Annotated[tuple[int, int], INPUT_SIZE] = (416, 416)  # train and memory: height and width
    images: tuple[int, int] = (2000, 20_000)  # memory: sizes of the datasets; 20,000 images take 11 GB on disk
    weights: str = ""  # evaluation: checkpoint or run folder; empty: the newest run in logs/
    devkit: str = "VOCdevkit"  # evaluation: folder of the datasets
    sets: tuple[str, ...] = ("VOC2007/test",)  # evaluation: sets to evaluate on


def generate_images(devkit: Path, images: int) -> None:
    """Generate a dataset Demo with a split `repeated` of `images` images, of which at most MAX_GENERATED differ."""
    make_demo_data.main(make_demo_data.Config(str(devkit / "Demo"), train=min(images, MAX_GENERATED), val=1, test=1))
    splits = devkit / "Demo" / "ImageSets" / "Main"
    names = (splits / "train.txt").read_text(encoding="utf-8").split()
    (splits / "repeated.txt").write_text("\n".join(islice(cycle(names), images)), encoding="utf-8")


def training_settings(config: Config, devkit: Path, run_dir: Path) -> train.Config:
    return train.Config(
        devkit=str(devkit), train_sets=("Demo/repeated",), val_sets=(), classes=str(devkit / "Demo" / "classes.txt"),
        anchors=str(ROOT / "model_data" / "yolo_anchors.txt"), phi=config.phi, input_size=config.input_size,
        run_dir=str(run_dir), epochs=EPOCHS, batch_size=config.batch_size, nominal_batch=config.batch_size,
        mosaic=config.mosaic, mosaic_until=1.0, device=config.device, compile=config.compile,
    )  # fmt: skip


def training_command(settings: train.Config) -> list[str]:
    changed = {name: value for name, value in asdict(settings).items() if value != getattr(train.Config(), name)}
    command = [sys.executable, str(ROOT / "train.py")]
    for name, value in changed.items():
        command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return command


class BareStep:
    """The step of a training run on one batch in memory."""

    def __init__(self, settings: train.Config) -> None:
        with closing(RunFolder(Path(settings.run_dir))) as run:
            self.trainer, data = train.prepare(settings, None, Progress(end=settings.epochs), run, ProcessGroup())
        self.trainer.set_mode(frozen=False)
        self.batches = epoch_batches(self.trainer, settings, data)
        with closing(self.batches.load([0], self.trainer.device)) as loaded:
            self.batch = next(loaded)

    def now(self) -> float:
        """The time at which the device has finished its work."""
        synchronize(self.trainer.device)
        return time.perf_counter()

    def images_per_second(self, steps: int) -> float:
        started = self.now()
        for _ in range(steps):
            self.trainer.backward(*self.batch)
            self.trainer.state.step()
        return steps * len(self.batch[0]) / (self.now() - started)

    def shares(self, steps: int) -> dict[str, float]:
        """The share of each of PARTS in a step, synchronized after each; augmentation includes waiting for a batch."""
        trainer, seconds = self.trainer, defaultdict(float)
        numbers = [step % len(self.batches) for step in range(WARMUP_STEPS + steps)]
        with closing(self.batches.load(numbers, trainer.device)) as loaded:
            for step in range(len(numbers)):
                times = [self.now()]
                images, boxes, labels = next(loaded)
                times.append(self.now())
                with autocast(trainer.device, trainer.dtype):
                    heads = trainer.network(images)
                loss = trainer.loss(heads, boxes, labels)["loss"]
                times.append(self.now())
                trainer.state.scaler.scale(loss).backward()
                times.append(self.now())
                trainer.state.step()
                times.append(self.now())
                for part, (before, after) in zip(PARTS, pairwise(times), strict=True):
                    seconds[part] += (after - before) * (step >= WARMUP_STEPS)
        return {part: value / sum(seconds.values()) for part, value in seconds.items()}


def measure_epochs(settings: train.Config, images: int) -> list[float]:
    """Images per second of complete epochs of train.py, without the first."""
    subprocess.run(training_command(settings), stdout=subprocess.DEVNULL, check=True)
    lines = (Path(settings.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ends = [json.loads(line)["seconds"] for line in lines]  # since the start
    return [images / (after - before) for before, after in pairwise(ends)]


def benchmark_train(config: Config) -> dict[str, object]:
    """Median speeds of training and of the bare step, their ratio, and the share of each part of a step."""
    images, epochs, bare = config.steps * config.batch_size, [], []
    with tempfile.TemporaryDirectory() as name:
        devkit = Path(name) / "devkit"
        generate_images(devkit, images)
        step = BareStep(training_settings(config, devkit, Path(name) / "bare"))
        step.images_per_second(WARMUP_STEPS)
        for number in range(config.rounds):
            bare.append(step.images_per_second(config.steps))
            epochs += measure_epochs(training_settings(config, devkit, Path(name) / f"run{number}"), images)
            bare.append(step.images_per_second(config.steps))
        shares = step.shares(config.steps)
    speed, bare_speed = statistics.median(epochs), statistics.median(bare)
    figures = {"images_per_second": speed, "bare_step_images_per_second": bare_speed, "ratio": speed / bare_speed}
    return figures | {"epochs": epochs, "shares": shares}


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
    settings = replace(settings, cache="disk", checkpoint_every=config.steps, epochs=100)
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
