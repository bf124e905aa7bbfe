"""Measure prediction: python tests/benchmarks/benchmark_inference.py network|folder|video|memory

network: latency of a batch, from pixels to boxes and scores, of networks in PyTorch and exported networks; and of NMS
folder: time to predict on images and write JSON lines, relative to decoding them and running the network
video: the network's share of the time for reading and annotating a generated 1080p video
memory: growth of memory over the frames of consecutive videos
"""

import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from math import inf, log
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nets.spec import ModelSpec
from utils.data.image_io import read_image
from utils.detection.nms import EVALUATION_THRESHOLDS, FALLBACK_CONFIDENCE, Thresholds, select_detections
from utils.evaluation.timing import time_alternately
from utils.inference.backends import EXPORTED, CompiledNetwork, Network, TorchNetwork, open_exported, precision_for
from utils.inference.detector import Detector
from utils.inference.pipeline import FrameOptions, Pipeline, write_behind
from utils.inference.sinks import JsonLines, Pictures, Sink
from utils.inference.sources import Images, Source, open_sources
from utils.inference.video import Frame, VideoFile, VideoWriter
from utils.system.cli import run_script
from utils.system.device import choose_device, choose_precision, cpu_has_bf16, keep_freed_memory, synchronize
from utils.system.errors import UserError, check_range
from utils.system.signals import StopSignals
from utils.weights.checkpoint import find_checkpoint, load_checkpoint

VIDEO_SIZE, FRAME_RATE = (1080, 1920), Fraction(30)  # (height, width), frames per second
SMALL_SIZE, SMALL_FRAMES = (96, 128), 300  # size and length of the videos for the memory benchmark
READINGS = 50  # number of memory readings
CANDIDATE_SHARE = 0.01  # of generated scores that exceed FALLBACK_CONFIDENCE; with 3 classes 76 per image at 416x416


@dataclass(frozen=True)
class Config:
    """Measure prediction."""

    benchmark: tyro.conf.Positional[Literal["network", "folder", "video", "memory"]]  # what to measure
    weights: str = ""  # checkpoint, run folder, .onnx or .xml; empty: the newest run in logs/
    exported: tuple[str, ...] = ()  # network: .onnx and .xml files to compare with
    compile: bool = True  # network: also with torch.compile
    batch_size: int = 1  # network: images per batch
    source: str = ""  # folder: folder, glob or list of images
    rounds: int = 10  # network and folder: rounds whose medians are reported
    frames: int = 600  # video and memory: total number of frames
    precision: str = "fp32"  # folder, video and memory: precision of the network
    device: str = "auto"  # auto, cpu, cuda or cuda:N (the GPU with index N)


class TimedNetwork:
    """A network that measures the total duration of its calls in seconds."""

    def __init__(self, network: Network) -> None:
        self.network, self.device, self.to_boxes = network, network.device, network.to_boxes
        self.seconds = 0.0

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        started = time.perf_counter()
        outputs = self.network(images)
        synchronize(self.device)
        self.seconds += time.perf_counter() - started
        return outputs


def torch_modes(config: Config, device: torch.device) -> tuple[dict[str, Network], ModelSpec]:
    """The networks to time in PyTorch, by name."""
    path = find_checkpoint(config.weights)
    if path.suffix in EXPORTED:
        raise UserError(f"{path} is not a checkpoint; give it to --exported, which compares it with one")
    checkpoint = load_checkpoint(path)
    spec, model = checkpoint.spec, checkpoint.build_model(path)
    modes: dict[str, Network] = {}
    for name in ("fp32", "bf16", "fp16"):
        if device.type == "cuda" or name == "fp32" or (name == "bf16" and cpu_has_bf16()):
            modes[f"torch {name}"] = network = TorchNetwork(model, spec, device, choose_precision(name, device))
            if config.compile:
                modes[f"torch {name} compiled"] = CompiledNetwork(network)
    return modes, spec


def opencv_mode(path: str, images: Tensor) -> Callable[[], object]:
    """A function that runs an ONNX file in OpenCV's DNN module."""
    network = cv2.dnn.readNetFromONNX(path)
    names = network.getUnconnectedOutLayersNames()

    def call() -> object:
        network.setInput((images.float() / 255).numpy())
        return network.forward(names)

    return call


def nms_calls(boxes: Tensor, scores: Tensor) -> dict[str, Callable[[], object]]:
    """NMS as in a prediction and in an evaluation, of generated predictions in the shapes of boxes and scores.

    The scores are powers of random numbers, so that few are high; sides are up to 100 pixels, positions up to 400.
    """
    generator = torch.Generator().manual_seed(0)
    exponent = log(FALLBACK_CONFIDENCE) / log(1 - CANDIDATE_SHARE)
    scores = torch.rand(scores.shape, generator=generator).pow(exponent).to(scores.device)
    corners = torch.rand(boxes.shape, generator=generator) * torch.tensor([400, 400, 100, 100])
    boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], dim=-1).to(boxes.device)
    limits = {"NMS": Thresholds(FALLBACK_CONFIDENCE), "NMS of an evaluation": EVALUATION_THRESHOLDS}
    return {
        name: lambda limit=limit: select_detections(boxes, scores, limit.confidence, limit)
        for name, limit in limits.items()
    }


def benchmark_network(config: Config) -> dict[str, float]:
    """Median milliseconds of each network, and of NMS."""
    device = choose_device(config.device)
    modes, spec = torch_modes(config, device)
    images = torch.randint(256, (config.batch_size, 3, *spec.input_size), dtype=torch.uint8)
    calls: dict[str, Callable[[], object]] = {}
    for path in config.exported:
        if Path(path).suffix not in EXPORTED:
            raise UserError(f"{path} does not end with {' or '.join(EXPORTED)}; give a checkpoint to --weights")
        modes[Path(path).name] = open_exported(Path(path), device, torch.float32)[0]
        if Path(path).suffix == ".xml" and cpu_has_bf16():
            modes[f"{Path(path).name} bf16"] = open_exported(Path(path), device, torch.bfloat16)[0]
        if Path(path).suffix == ".onnx" and device.type == "cpu":
            calls[f"{Path(path).name} in OpenCV"] = opencv_mode(path, images)
    for name, network in modes.items():
        placed = images.to(network.device)
        calls[name] = lambda network=network, placed=placed: network.to_boxes(network(placed))
    calls |= nms_calls(*calls["torch fp32"]())
    return time_alternately(calls, config.rounds, device)


def load_detector(config: Config) -> Detector:
    device, path = choose_device(config.device), find_checkpoint(config.weights)
    return Detector.load(path, device, precision_for(path, config.precision, device))


def run(detector: Detector, sources: Sequence[Source], sinks: Sequence[Sink]) -> Iterator[Frame]:
    """Predict and write as predict.py does; yields the finished frames."""
    with ExitStack() as stack:
        for sink in sinks:
            stack.enter_context(closing(sink))
        results = stack.enter_context(closing(write_behind(Pipeline(detector, sources, FrameOptions()), sinks)))
        yield from (frame for frame, _, _ in results)


def benchmark_folder(config: Config) -> dict[str, float]:
    """Median seconds of decoding, the network and the whole prediction, and the ratio of the whole to the parts."""
    detector = load_detector(config)
    sources = open_sources(config.source, 0)
    if not all(isinstance(source, Images) for source in sources):
        raise UserError(f"{config.source} must contain only images")
    paths = [path for source in sources for path in source.paths]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(config.rounds + 1):  # the first one is a warm-up
            started = time.perf_counter()
            images = [read_image(path) for path in paths]
            decoding = time.perf_counter() - started
            batches = [detector.prepare([image]).images for image in images]
            started = time.perf_counter()
            for batch in batches:
                detector.network(batch)
            synchronize(detector.network.device)
            network = time.perf_counter() - started
            started = time.perf_counter()
            count = sum(1 for _ in run(detector, sources, [JsonLines(Path(folder), detector.spec.class_names)]))
            whole = time.perf_counter() - started
            rounds.append({"decoding": decoding, "network": network, "whole": whole, "images": count})
    medians = {name: statistics.median(times[name] for times in rounds[1:]) for name in rounds[0]}
    ratio = statistics.median(times["whole"] / (times["decoding"] + times["network"]) for times in rounds[1:])
    return medians | {"ratio": ratio}


def write_video(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Write a video of discs that move over a noisy background."""
    height, width = size
    rng = np.random.default_rng(0)
    background = cv2.resize(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8), (width, height))
    starts, steps = rng.random((12, 2)), rng.normal(0, 0.01, (12, 2))
    colors = rng.integers(0, 256, (12, 3)).tolist()
    writer = VideoWriter(path, FRAME_RATE, size)
    for number in range(frames):
        image = background.copy()
        for (x, y), color in zip((starts + number * steps) % 1, colors, strict=True):
            cv2.circle(image, (int(x * width), int(y * height)), height // 16, color, -1)
        writer.write(image, number / float(FRAME_RATE))
    writer.close()


def benchmark_video(config: Config) -> dict[str, float]:
    """Total seconds, and those of the network, which runs in parallel with reading and writing."""
    detector = load_detector(config)
    detector.network = network = TimedNetwork(detector.network)
    with tempfile.TemporaryDirectory() as name:
        write_video(Path(name) / "video.mp4", config.frames, VIDEO_SIZE)
        detector(np.zeros((*VIDEO_SIZE, 3), np.uint8))
        network.seconds, started = 0.0, time.perf_counter()
        sinks = [Pictures(Path(name) / "out", detector.spec.class_names)]
        frames = sum(1 for _ in run(detector, [VideoFile(str(Path(name) / "video.mp4"))], sinks))
        seconds = time.perf_counter() - started
    figures = {"frames": frames, "seconds": seconds, "network_seconds": network.seconds}
    return figures | {"share": network.seconds / seconds, "frames_per_second": frames / seconds}


def benchmark_memory(config: Config) -> dict[str, object]:
    """Readings of the memory in MB, and its growth per 10,000 frames, from a line fitted to the second half."""
    if sys.platform != "linux":
        raise UserError(f"memory is measured with Linux's /proc, which {sys.platform} does not have")
    detector, readings = load_detector(config), []
    with tempfile.TemporaryDirectory() as name:
        video, out = Path(name) / "video.mp4", Path(name) / "out"
        write_video(video, SMALL_FRAMES, SMALL_SIZE)
        out.mkdir()
        sources = [VideoFile(str(video))] * -(-config.frames // SMALL_FRAMES)
        sinks = [sink(out, detector.spec.class_names) for sink in (Pictures, JsonLines)]
        for number, _ in enumerate(run(detector, sources, sinks)):
            if number % max(1, config.frames // READINGS) == 0:
                status = Path("/proc/self/status").read_text(encoding="ascii")
                readings.append((number, int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024))
    numbers, sizes = np.array(readings[len(readings) // 2 :]).T
    slope = float(np.polyfit(numbers, sizes, 1)[0]) * 10_000
    return {"frames": config.frames, "mb": [round(size, 1) for _, size in readings], "mb_per_10000_frames": slope}


BENCHMARKS = {"network": benchmark_network, "folder": benchmark_folder}
BENCHMARKS |= {"video": benchmark_video, "memory": benchmark_memory}


def main(config: Config) -> None:
    check_range(config, 1, inf, "batch_size", "rounds", "frames")
    with StopSignals():  # temporary folders are deleted after a signal too
        if choose_device(config.device).type == "cpu":
            keep_freed_memory()
        figures = BENCHMARKS[config.benchmark](config)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_script(main, Config)
