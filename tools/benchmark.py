"""Measure speed: python tools/benchmark.py train, or python tools/benchmark.py infer

`train` runs train.py on drawn data and compares its whole loop with the bare step (forward, loss, backward, optimizer,
weight average) on one fixed batch in memory, in turns, since machines drift. `infer` times the network alone and from
image to detections, for one image in several modes. Both print a table, and write JSON with --json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.yolo import ModelSpec
from utils.anchors import load_anchors
from utils.detector import Detector
from utils.device import autocast, choose_device, choose_precision, cpu_has_bf16, keep_freed_memory
from utils.errors import run_script
from utils.loss import LossSettings, YoloLoss
from utils.optim import build_ema, build_optimizer, lr_factor
from utils.training import Progress, TrainingState

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = 12  # per image of the fixed batch
WARMUP_STEPS = 5
PHOTO = (480, 640)  # height, width of the image that end-to-end times start from


@dataclass(frozen=True)
class Train:
    """Compare the whole training loop with the bare step on a fixed batch."""

    json: str = ""  # file for the figures
    phi: int = 0  # attention block
    input_size: tuple[int, int] = (416, 416)  # height and width
    batch_size: int = 16  # images of a step
    steps: int = 20  # steps of an epoch, and of a turn of the fixed batch
    rounds: int = 3  # turns of each
    device: str = "auto"  # auto, cpu or cuda


@dataclass(frozen=True)
class Infer:
    """Time one image through the network alone and from image to detections."""

    json: str = ""  # file for the figures
    phi: int = 0  # attention block
    input_size: tuple[int, int] = (416, 416)  # height and width
    rounds: int = 60  # timed runs of each mode, in turns
    device: str = "auto"  # auto, cpu or cuda


def make_spec(phi: int, input_size: tuple[int, int]) -> ModelSpec:
    names = tuple(f"class{i}" for i in range(20))
    return ModelSpec(names, load_anchors(ROOT / "model_data" / "yolo_anchors.txt"), phi=phi, input_size=input_size)


def run_quietly(command: list[object]) -> None:
    """Run a command, and show what it printed if it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{command} failed:\n{result.stdout}\n{result.stderr}")


def whole_loop(config: Train, folder: Path, turn: int) -> list[float]:
    """Images per second of each epoch but the first of a run of train.py, all that an epoch does included."""
    run_dir, devkit = folder / f"run{turn}", folder / "devkit"
    command = [sys.executable, ROOT / "train.py", "--devkit", devkit, "--train-sets", "Demo/train", "--val-sets"]
    command += ["--classes", devkit / "Demo" / "classes.txt", "--anchors", ROOT / "model_data" / "yolo_anchors.txt"]
    command += ["--epochs", 4, "--batch-size", config.batch_size, "--nominal-batch", config.batch_size]
    command += ["--input-size", *config.input_size, "--phi", config.phi]
    command += ["--device", config.device, "--run-dir", run_dir]
    run_quietly(command)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    images = config.steps * config.batch_size
    seconds = [record["seconds"] for record in records]  # since the start, at the end of each epoch
    return [images / (after - before) for before, after in pairwise(seconds)]


class FixedBatch:
    """The bare step on one batch in memory."""

    def __init__(self, config: Train) -> None:
        self.config, self.device = config, choose_device(config.device)
        self.dtype = choose_precision("auto", self.device)
        spec = make_spec(config.phi, config.input_size)
        model = spec.build().to(self.device).to(memory_format=torch.channels_last).train()
        optimizer = build_optimizer(model, "adamw", 0.004, 0.9, 0.05)
        self.state = TrainingState(
            model,
            optimizer,
            LambdaLR(optimizer, lr_factor("cosine", 10_000, 1000)),
            torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16),
            build_ema(model, 10_000, 0.05),
            Progress(end=1),
            torch.zeros(1),
        )
        self.loss = YoloLoss(spec, LossSettings(), self.device)
        height, width = config.input_size
        images = torch.rand(config.batch_size, 3, height, width, device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        corners = torch.rand(config.batch_size, OBJECTS, 2) * torch.tensor([width / 2, height / 2])
        sides = 10 + torch.rand(config.batch_size, OBJECTS, 2) * 100
        self.boxes = torch.cat([corners, corners + sides], dim=-1).to(self.device)
        self.labels = torch.randint(spec.num_classes, (config.batch_size, OBJECTS), device=self.device)

    def images_per_second(self, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            with autocast(self.device, self.dtype):
                heads = self.state.model(self.images)
            loss = self.loss(heads, self.boxes, self.labels)["loss"]
            self.state.scaler.scale(loss).backward()
            self.state.step()
        wait(self.device)
        return steps * self.config.batch_size / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def benchmark_train(config: Train) -> dict[str, float]:
    """The medians of both, and their ratio."""
    whole: list[float] = []
    fixed: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder, images = Path(name), config.steps * config.batch_size
        draw = [sys.executable, ROOT / "tools" / "make_demo_data.py", "--folder", folder / "devkit" / "Demo"]
        draw += ["--train", images, "--val", 1, "--test", 1]
        run_quietly(draw)
        batch = FixedBatch(config)
        batch.images_per_second(WARMUP_STEPS)
        for turn in range(config.rounds):
            whole += whole_loop(config, folder, turn)
            fixed += [batch.images_per_second(config.steps) for _ in range(2)]
    figures = {
        "images_per_second": statistics.median(whole),
        "fixed_batch_images_per_second": statistics.median(fixed),
    }
    return figures | {"ratio": figures["images_per_second"] / figures["fixed_batch_images_per_second"]}


def benchmark_infer(config: Infer) -> dict[str, dict[str, float]]:
    """Median milliseconds per mode, the modes in turns."""
    device = choose_device(config.device)
    spec = make_spec(config.phi, config.input_size)
    model = spec.build().to(device).eval()
    detectors = {"folded_fp32_channels_last": Detector(model, spec, device)}
    if device.type == "cuda" or cpu_has_bf16():
        detectors["folded_bf16_channels_last"] = Detector(model, spec, device, torch.bfloat16)
    if device.type == "cuda":
        detectors["folded_fp16_channels_last"] = Detector(model, spec, device, torch.float16)
    batch = torch.randint(256, (1, 3, *config.input_size), dtype=torch.uint8, device=device)
    image = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), dtype=np.uint8)
    plain = batch.float() / 255

    @torch.inference_mode()
    def eager() -> None:
        model(plain)

    modes: dict[str, Callable[[], object]] = {"eager_fp32_channels_first": eager}
    modes |= {name: lambda detector=detector: detector.forward(batch) for name, detector in detectors.items()}
    ends = {name: lambda detector=detector: detector(image) for name, detector in detectors.items()}
    return {
        "network_ms": time_in_turns(modes, config.rounds, device),
        "end_to_end_ms": time_in_turns(ends, config.rounds, device),
    }


def time_in_turns(modes: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in modes}
    for turn in range(WARMUP_STEPS + rounds):
        for name, call in modes.items():
            wait(device)
            started = time.perf_counter()
            call()
            wait(device)
            if turn >= WARMUP_STEPS:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


Config = Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Infer, tyro.conf.subcommand("infer")]


def main(config: Train | Infer) -> None:
    keep_freed_memory()
    figures = benchmark_train(config) if isinstance(config, Train) else benchmark_infer(config)
    print(json.dumps(figures, indent=2))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main, Config)
