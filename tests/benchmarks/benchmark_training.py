"""Measure training and evaluation: python tests/benchmarks/benchmark_training.py train, or gpu, evaluation, memory, annotations

`train` runs train.py on drawn images and compares its whole loop with the full step (forward, loss, backward,
optimizer, weight average) on one fixed batch in memory, in turns, since machines drift; `gpu` does so for several
networks and batch sizes. `evaluation` times the parts of what eval.py does.
`memory` runs train.py with a disk cache on a small and on a large data set, and compares the peaks of its memory.
`annotations` times reading the annotations of a large set, at first and again from their index. All print their
figures, and write JSON with --json.
"""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from signal import SIGTERM
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nets.spec import ModelSpec
from nets.yolo import build_model
from utils.data.augment import AugmentSettings
from utils.data.cache import build_cache
from utils.data.loader import Batches
from utils.data.voc import load_classes, load_samples
from utils.detection.anchors import load_anchors
from utils.detection.loss import LossSettings, YoloLoss
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.evaluation.metrics import evaluate
from utils.inference.detector import Detector
from utils.reports.evaluation_report import Report
from utils.system.cli import run_script
from utils.system.device import (
    autocast,
    choose_compile,
    choose_device,
    choose_precision,
    keep_freed_memory,
    synchronize,
)
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.system.files import CACHE_FOLDER
from utils.system.signals import StopSignals
from utils.training.batch_size import peak_memory
from utils.training.optim import build_ema, build_optimizer, lr_factor
from utils.training.trainer import Progress, TrainingState
from utils.weights.checkpoint import LAST, find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ANCHORS = ROOT / "model_data" / "yolo_anchors.txt"
DRAWN = 320  # images drawn; a larger set repeats them, or has links to them
EPOCHS = 4  # of a run of train.py, of which the first, which also warms up, does not count
STEPS = {"cpu": 60, "cuda": 200}  # of an epoch: of about a thousand images, as in a small data set, or of seconds
WARMUP_STEPS = 5
STRENGTHS = {"scale": 0.3, "aspect": 0.1, "translate": 0.1, "flip": 0.5}  # train.py's defaults, like the next line
STRENGTHS |= {"hue": 0.015, "saturation": 0.5, "value": 0.3}
PARTS = ("augmentation", "forward", "backward", "optimizer")  # of a step, in their order
KINDS = ("RssAnon", "RssFile", "VmRSS")  # of /proc/PID/status: its own memory, that of mapped files, and all
LOOK_SECONDS = 0.2  # between two looks at a process's memory


@dataclass(frozen=True)
class Train:
    """Compare the whole training loop with the full step on a fixed batch."""

    json: str = ""  # file for the figures
    phi: int = 0  # attention block
    input_size: tuple[int, int] = (416, 416)  # height and width
    batch_size: int = 8  # images of a step
    mosaic: float = 1.0  # probability, in all epochs
    steps: int = 0  # of an epoch, and of a turn of the fixed batch; 0: 60 on the CPU, 200 on a GPU
    rounds: int = 3  # runs of train.py, with turns of the fixed batch before and after each
    cache: str = "auto"  # where the images are: auto, device, ram or disk
    compile: str = "auto"  # on, off, or auto: on a GPU
    device: str = "auto"  # auto, cpu or cuda


@dataclass(frozen=True)
class Gpu:
    """`train` on a GPU for several networks and batch sizes, with the images on the GPU; takes minutes each."""

    json: str = ""  # file for the figures, written after each
    runs: tuple[tuple[int, int], ...] = ((0, 64), (0, 128), (1, 64), (2, 64), (3, 64), (4, 64))  # phi, batch size
    mosaic: float = 1.0  # probability
    steps: int = 0  # as of `train`
    rounds: int = 1  # as of `train`


@dataclass(frozen=True)
class Evaluation:
    """Time the parts of an evaluation, from files to figures, and of its report."""

    weights: str = ""  # checkpoint of train.py; empty: best.safetensors of the newest run under logs/
    json: str = ""  # file for the figures
    devkit: str = "VOCdevkit"  # folder of the data sets
    sets: tuple[str, ...] = ("VOC2007/test",)  # sets to measure on
    batch_size: int = 16  # images at a time
    rounds: int = 3  # of which the medians count
    device: str = "auto"  # auto, cpu or cuda


@dataclass(frozen=True)
class Memory:
    """Compare the peak memory of training with a disk cache of a small and a large data set; Linux only."""

    json: str = ""  # file for the figures
    images: tuple[int, ...] = (2000, 20_000)  # sizes of the data sets; 20,000 take 11 GB of disk
    input_size: tuple[int, int] = (416, 416)  # height and width
    batch_size: int = 8  # images of a step
    steps: int = 100  # after which a run is stopped
    device: str = "auto"  # auto, cpu or cuda


@dataclass(frozen=True)
class Annotations:
    """Time reading the annotations of a large data set at first, and again from their index."""

    json: str = ""  # file for the figures
    images: int = 20_000  # annotations, of three objects each


Config = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Gpu, tyro.conf.subcommand("gpu")]
    | Annotated[Evaluation, tyro.conf.subcommand("evaluation")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Annotations, tyro.conf.subcommand("annotations")]
)


def write_json(path: str, figures: object) -> None:
    if path:
        Path(path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def run_quietly(command: Sequence[object]) -> None:
    """Run a command, and show what it printed if it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:  # a pipe would wait for what it leaves running
        code = subprocess.run(list(map(str, command)), stdout=output, stderr=output, check=False).returncode
        output.seek(0)
        if code:
            raise RuntimeError(f"{command} ended with {code}:\n{output.read()}")


def draw_images(devkit: Path, drawn: int, images: int) -> None:
    """Draw the training images of Demo, and make a split `repeated` that names them until there are `images`."""
    draw = [sys.executable, ROOT / "tools" / "make_demo_data.py", "--folder", devkit / "Demo"]
    run_quietly([*draw, "--train", drawn, "--val", 1, "--test", 1])
    splits = devkit / "Demo" / "ImageSets" / "Main"
    names = (splits / "train.txt").read_text(encoding="utf-8").split()
    (splits / "repeated.txt").write_text("\n".join(islice(cycle(names), images)), encoding="utf-8")


def make_spec(phi: int, input_size: tuple[int, int], class_names: Sequence[str]) -> ModelSpec:
    return ModelSpec(tuple(class_names), load_anchors(ANCHORS), phi=phi, input_size=input_size)


class FixedBatch:
    """The full step on one batch in memory: the network, loss and shapes of train.py's run on the same images."""

    def __init__(self, config: Train, devkit: Path) -> None:
        self.device = choose_device(config.device)
        self.dtype = choose_precision("auto", self.device)
        spec = make_spec(config.phi, config.input_size, load_classes(devkit / "Demo" / "classes.txt"))
        model = build_model(spec).to(self.device).to(memory_format=torch.channels_last).train()
        optimizer = build_optimizer(model, 0.014, 0.1)
        self.state = TrainingState(
            model,
            optimizer,
            LambdaLR(optimizer, lr_factor(10_000, 1000)),
            torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16),
            build_ema(model, 10_000, 0.05),
            Progress(end=1),
            torch.zeros(1),
        )
        self.loss = YoloLoss(spec, LossSettings(), self.device)
        if choose_compile(config.compile, self.device):  # as train.py does
            model.compile(dynamic=False)
            self.loss.sums = torch.compile(self.loss.sums, dynamic=False)
        samples = load_samples(devkit, ["Demo/train"], spec.class_names)
        cache = build_cache(samples, spec, self.device, "device" if self.device.type == "cuda" else "ram")
        settings = AugmentSettings(config.mosaic, **STRENGTHS)
        self.batches = Batches(cache, config.batch_size, 0, 0, settings, ProcessGroup())
        with closing(self.batches.load([0], self.device)) as loaded:
            self.batch = next(loaded)

    def forward(self, images: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            heads = self.state.model(images)
        return self.state.scaler.scale(self.loss(heads, boxes, labels)["loss"])

    def now(self) -> float:
        """The time when the device has done what it was given."""
        synchronize(self.device)
        return time.perf_counter()

    def images_per_second(self, steps: int) -> float:
        started = self.now()
        for _ in range(steps):
            self.forward(*self.batch).backward()
            self.state.step()
        return steps * len(self.batch[0]) / (self.now() - started)

    def shares(self, steps: int) -> dict[str, float]:
        """The share of a step's time in each of PARTS, waiting for the device between them.

        Augmentation is the wait for the next batch, which a thread plans ahead, and drawing it.
        """
        seconds: dict[str, float] = defaultdict(float)
        numbers = [step % len(self.batches) for step in range(WARMUP_STEPS + steps)]
        with closing(self.batches.load(numbers, self.device)) as loaded:
            for step in range(len(numbers)):
                times = [self.now()]
                batch = next(loaded)
                times.append(self.now())
                loss = self.forward(*batch)
                times.append(self.now())
                loss.backward()
                times.append(self.now())
                self.state.step()
                times.append(self.now())
                for part, (before, after) in zip(PARTS, pairwise(times), strict=True):
                    seconds[part] += (after - before) * (step >= WARMUP_STEPS)
        return {part: value / sum(seconds.values()) for part, value in seconds.items()}


def whole_loop(config: Train, devkit: Path, run_dir: Path) -> list[float]:
    """Images per second of each epoch but the first of a run of train.py, all that an epoch does included."""
    command = [sys.executable, ROOT / "train.py", "--devkit", devkit, "--train-sets", "Demo/repeated", "--val-sets"]
    command += ["--classes", devkit / "Demo" / "classes.txt", "--anchors", ANCHORS, "--input-size", *config.input_size]
    command += ["--batch-size", config.batch_size, "--nominal-batch", config.batch_size, "--epochs", EPOCHS]
    command += ["--mosaic", config.mosaic, "--mosaic-until", 1, "--phi", config.phi]
    command += ["--cache", config.cache, "--compile", config.compile, "--device", config.device, "--run-dir", run_dir]
    run_quietly(command)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [record["seconds"] for record in records]  # since the start, at the end of each epoch
    return [config.steps * config.batch_size / (after - before) for before, after in pairwise(seconds)]


def benchmark_train(config: Train) -> dict[str, object]:
    """The medians of both, their ratio, and the peak memory and the parts of the fixed batch's step."""
    device = choose_device(config.device)
    config = replace(config, steps=config.steps or STEPS[device.type])
    images = config.steps * config.batch_size
    whole: list[float] = []
    fixed: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        devkit = Path(name) / "devkit"
        draw_images(devkit, min(images, max(DRAWN, config.batch_size)), images)
        batch = FixedBatch(config, devkit)
        batch.images_per_second(WARMUP_STEPS)
        for turn in range(config.rounds):
            fixed.append(batch.images_per_second(config.steps))
            whole += whole_loop(config, devkit, Path(name) / f"run{turn}")
            fixed.append(batch.images_per_second(config.steps))
    figures = {
        "images_per_second": statistics.median(whole),
        "fixed_batch_images_per_second": statistics.median(fixed),
        "ratio": statistics.median(whole) / statistics.median(fixed),
        "shares": batch.shares(config.steps),
        "step_memory_gb": peak_memory(device) / 1e9,  # reserved on a GPU; on the CPU resident, of the whole process
    }
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    about = {"settings": asdict(config), "gpu": gpu, "precision": str(batch.dtype), "torch": torch.__version__}
    return figures | {"epochs": whole, "fixed_batch_turns": fixed} | about


def benchmark_gpu(config: Gpu) -> list[dict[str, object]]:
    """The figures of each run, or why it failed; each is a process of its own, so that it begins with an empty GPU."""
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU here, which these runs need; benchmark.py train measures a CPU")
    common = ["--device", "cuda", "--cache", "device", "--mosaic", config.mosaic]
    common += ["--steps", config.steps, "--rounds", config.rounds]
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        part = Path(name) / "figures.json"
        for phi, batch_size in config.runs:
            started = time.perf_counter()
            command = [sys.executable, __file__, "train", "--phi", phi, "--batch-size", batch_size, "--json", part]
            figures: dict[str, object] = {"phi": phi, "batch_size": batch_size}
            try:
                run_quietly([*command, *common])
                figures |= json.loads(part.read_text(encoding="utf-8"))
            except RuntimeError as error:  # the other runs may still go well
                figures["error"] = str(error)
            found.append(figures)
            write_json(config.json, found)
            print(f"{gpu_table([figures])}  ({time.perf_counter() - started:.0f} s)", flush=True)
    return found


def gpu_table(found: Sequence[dict]) -> str:
    lines = ["phi  batch  images/s  fixed  ratio  step GB  " + "  ".join(PARTS)]
    for run in found:
        line = f"{run['phi']:3}  {run['batch_size']:5}  "
        if "error" in run:
            lines.append(line + f"failed: {run['error'].splitlines()[-1]}")
            continue
        line += f"{run['images_per_second']:8.0f}  {run['fixed_batch_images_per_second']:5.0f}  {run['ratio']:5.3f}  "
        shares = (f"{run['shares'][part]:{len(part)}.3f}" for part in PARTS)
        lines.append(line + f"{run['step_memory_gb']:7.1f}  " + "  ".join(shares))
    return "\n".join(lines)


def time_evaluation(config: Evaluation, detector: Detector) -> dict[str, float]:
    """Seconds of each part."""
    names, times = detector.spec.class_names, [time.perf_counter()]

    def lap() -> None:
        synchronize(detector.network.device)
        times.append(time.perf_counter())

    samples = load_samples(config.devkit, config.sets, names)
    lap()
    cache = build_cache(samples, detector.spec, detector.network.device)
    lap()
    network, found = 0.0, []
    batches = detector.run_cached(cache, config.batch_size)
    for _ in range(math.ceil(len(cache) / config.batch_size)):
        started = time.perf_counter()
        part, heads = next(batches)
        synchronize(detector.network.device)
        network += time.perf_counter() - started
        found += detector.select(heads, cache.fits[part], cache.sizes[part])
    lap()
    measured = evaluate(samples, found, cache.sizes, names)
    lap()
    with tempfile.TemporaryDirectory() as folder:
        Report(Path(config.weights), config.devkit, config.sets, detector, cache, found, measured).write(Path(folder))
        lap()
    parts = ("annotations", "images", "detections", "figures", "report")
    seconds = dict(zip(parts, np.diff(times).tolist(), strict=True))
    return seconds | {"network": network, "detections": seconds["detections"] - network}


def benchmark_evaluation(config: Evaluation) -> dict[str, object]:
    """Median seconds of the parts, and the share of all but the network, without the report and with it."""
    weights = find_checkpoint(config.weights)
    detector = Detector.load(weights, choose_device(config.device), thresholds=EVALUATION_THRESHOLDS)
    rounds = [time_evaluation(config, detector) for _ in range(config.rounds + 1)][1:]  # the first warms up
    parts = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    total = sum(parts.values())
    measured = total - parts["report"]
    return {
        "seconds": parts,
        "share_without_network": 1 - parts["network"] / measured,
        "share_with_report": 1 - parts["network"] / total,
    }


def link_set(drawn: Path, devkit: Path, images: int) -> None:
    """A set Demo of so many images with their annotations: links to the drawn ones, as if drawn an hour ago.

    What has just changed would not come into the index of annotations.
    """
    names = [f"image_{i:05d}" for i in range(images)]
    (devkit / "Demo" / "ImageSets" / "Main").mkdir(parents=True)
    (devkit / "Demo" / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names), encoding="utf-8")
    shutil.copy(drawn / "Demo" / "classes.txt", devkit / "Demo")
    for part in ("JPEGImages", "Annotations"):
        sources = sorted((drawn / "Demo" / part).glob("train_*"))
        for source in sources:
            os.utime(source, (time.time() - 3600,) * 2)
        (devkit / "Demo" / part).mkdir()
        for name, source in zip(names, cycle(sources), strict=False):
            os.link(source, devkit / "Demo" / part / (name + source.suffix))


def peaks_of_training(config: Memory, folder: Path) -> dict[str, float]:
    """Peak GB of a run of train.py in `folder`, which is stopped once it has written a checkpoint after some steps."""
    demo, size = folder / "devkit" / "Demo", map(str, config.input_size)
    command = [sys.executable, str(ROOT / "train.py"), "--devkit", str(folder / "devkit"), "--train-sets", "Demo/train"]
    command += ["--val-sets", "--classes", str(demo / "classes.txt"), "--input-size", *size, "--cache", "disk"]
    command += ["--anchors", str(ANCHORS), "--batch-size", str(config.batch_size)]
    command += ["--checkpoint-every", str(config.steps), "--device", config.device, "--run-dir", str(folder / "run")]
    peaks = dict.fromkeys(KINDS, 0.0)
    stopping = False
    with open(folder / "output", "w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                for kind, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE):
                    if kind in peaks:
                        peaks[kind] = max(peaks[kind], 1024 * int(kilobytes) / 1e9)
                if not stopping and (folder / "run" / LAST).exists():
                    process.send_signal(SIGTERM)
                    stopping = True
                time.sleep(LOOK_SECONDS)
        finally:
            process.kill()  # does nothing where it has ended
            process.wait()
        output.seek(0)
        if not stopping or process.returncode != 128 + SIGTERM:
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{output.read()}")
    return peaks


def benchmark_memory(config: Memory) -> dict[str, object]:
    """The peaks with each number of images, and the ratio of the last to the first."""
    if sys.platform != "linux":
        raise UserError(f"memory is measured with Linux's /proc, which {sys.platform} does not have")
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        draw_images(Path(name) / "drawn", min(DRAWN, *config.images), 1)
        for images in config.images:
            folder = Path(name) / str(images)
            link_set(Path(name) / "drawn", folder / "devkit", images)
            found[images] = peaks_of_training(config, folder)
            shutil.rmtree(folder)
    first, last = (found[images]["RssAnon"] for images in (config.images[0], config.images[-1]))
    return {"peaks_gb": found, "ratio": last / first, "settings": asdict(config)}


def time_annotations(folder: Path) -> float:
    """Seconds of load_samples in a folder; for a process of its own, since it changes where that is."""
    os.chdir(folder)  # the index is under it
    started = time.perf_counter()
    load_samples("devkit", ["Many/train"], ["thing"])
    return time.perf_counter() - started


def benchmark_annotations(config: Annotations) -> dict[str, float]:
    """Seconds of both readings, each in a fresh process; the files are in the system's memory already."""
    shape = "<size><width>500</width><height>375</height><depth>3</depth></size>"
    box = "<bndbox><xmin>{}</xmin><ymin>20</ymin><xmax>300</xmax><ymax>200</ymax></bndbox>"
    thing = "<object><name>thing</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>{}</object>"
    hour_ago = time.time() - 3600  # what has just changed would not come into the index
    with tempfile.TemporaryDirectory() as name:
        many = Path(name) / "devkit" / "Many"
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (many / part).mkdir(parents=True)
        names = [f"{i:06d}" for i in range(config.images)]
        (many / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names), encoding="utf-8")
        for i, image in enumerate(names):
            objects = "".join(thing.format(box.format(1 + (i + j) % 200)) for j in range(3))
            text = f"<annotation><filename>{image}.jpg</filename>{shape}{objects}</annotation>\n"
            (many / "JPEGImages" / f"{image}.jpg").touch()  # is not read
            (many / "Annotations" / f"{image}.xml").write_text(text, encoding="utf-8")
            os.utime(many / "Annotations" / f"{image}.xml", (hour_ago, hour_ago))
        seconds = []
        for _ in range(2):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                seconds.append(pool.submit(time_annotations, Path(name)).result())
        index = sum(path.stat().st_size for path in (Path(name) / CACHE_FOLDER).glob("*.json")) / 1e6
    return {"images": config.images, "first_seconds": seconds[0], "index_seconds": seconds[1], "index_mb": index}


MEASURES = {
    Train: benchmark_train,
    Gpu: benchmark_gpu,
    Evaluation: benchmark_evaluation,
    Memory: benchmark_memory,
    Annotations: benchmark_annotations,
}


def main(config: Train | Gpu | Evaluation | Memory | Annotations) -> None:
    with StopSignals():  # so that the temporary folders go, whatever ends it
        if isinstance(config, Train | Evaluation) and choose_device(config.device).type == "cpu":
            keep_freed_memory()
        figures = MEASURES[type(config)](config)
    write_json(config.json, figures)
    print(json.dumps(figures, indent=2))
    if isinstance(config, Gpu):
        print(gpu_table(figures))
        if any("error" in run for run in figures):
            raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Config)
