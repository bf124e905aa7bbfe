"""Measure prediction: python tests/benchmarks/benchmark_inference.py network, or folder, video, memory

`network` times one image, or a batch, from pixels at the input size to boxes and scores, in several modes of torch and
in the runtimes of exported networks, in turns, since machines drift. `folder` compares predicting on files, JSON lines
written, with reading them and running the network, added up. `video` draws a film and finds the network's share of the
time from file to annotated file. `memory` predicts on a film again and again, and finds how fast memory grows.
All print their figures, and write JSON with --json.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nets.spec import ModelSpec
from nets.yolo import build_model
from utils.data.image_io import read_image
from utils.detection.anchors import load_anchors
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

ROOT = Path(__file__).resolve().parents[2]
ANCHORS = ROOT / "model_data" / "yolo_anchors.txt"
FILM_SIZE, FILM_RATE = (1080, 1920), Fraction(30)  # height, width; frames a second
SMALL_FILM, SMALL_FRAMES = (96, 128), 300  # of the film for memory
LOOKS = 50  # at memory


@dataclass(frozen=True)
class NetworkTimes:
    """Time one batch from pixels at the input size to boxes and scores."""

    weights: str = ""  # checkpoint of train.py, or folder of a run; empty: an untrained network of 20 classes
    exported: tuple[str, ...] = ()  # .onnx and .xml files to compare with
    phi: int = 0  # attention block, without weights
    batch_size: int = 1  # images at once
    rounds: int = 60  # timed calls of each mode, in turns
    compile: bool = True  # with torch.compile too
    device: str = "auto"  # auto, cpu or cuda
    json: str = ""  # file for the figures


@dataclass(frozen=True)
class Folder:
    """Compare predicting on files with reading them and running the network."""

    source: str  # folder, glob or list of images
    weights: str = ""  # checkpoint, run folder, .onnx or .xml; empty: the newest run under logs/
    precision: str = "fp32"  # of the network
    rounds: int = 3  # of which the medians count
    device: str = "auto"  # auto, cpu or cuda
    json: str = ""  # file for the figures


@dataclass(frozen=True)
class Video:
    """Find the network's share of the time from a 1080p film to an annotated one."""

    weights: str = ""  # checkpoint, run folder, .onnx or .xml; empty: the newest run under logs/
    precision: str = "fp32"  # of the network
    frames: int = 600  # of the film
    device: str = "auto"  # auto, cpu or cuda
    json: str = ""  # file for the figures


@dataclass(frozen=True)
class Memory:
    """Find how fast memory grows with the frames of a film that begins again and again; Linux only."""

    weights: str = ""  # checkpoint, run folder, .onnx or .xml; empty: the newest run under logs/
    frames: int = 100_000  # in all
    device: str = "auto"  # auto, cpu or cuda
    json: str = ""  # file for the figures


Config = (
    Annotated[NetworkTimes, tyro.conf.subcommand("network")]
    | Annotated[Folder, tyro.conf.subcommand("folder")]
    | Annotated[Video, tyro.conf.subcommand("video")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
)


class TimedNetwork:
    """A network that adds up the seconds that it takes."""

    def __init__(self, network: Network) -> None:
        self.network, self.device, self.seconds = network, network.device, 0.0

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        started = time.perf_counter()
        outputs = self.network(images)
        synchronize(self.device)
        self.seconds += time.perf_counter() - started
        return outputs

    def to_boxes(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.network.to_boxes(outputs)


def torch_modes(config: NetworkTimes, device: torch.device) -> tuple[dict[str, Network], ModelSpec]:
    """The networks of torch by name."""
    if config.weights:
        path = find_checkpoint(config.weights)
        if path.suffix in EXPORTED:
            raise UserError(f"{path} is no checkpoint; give it to --exported, which compares it with one")
        checkpoint = load_checkpoint(path)
        spec, model = checkpoint.spec, checkpoint.build_model(path)
    else:
        torch.manual_seed(0)
        spec = ModelSpec(tuple(f"class{i}" for i in range(20)), load_anchors(ANCHORS), phi=config.phi)
        model = build_model(spec)
    precisions = ["fp32"]
    precisions += ["bf16"] if device.type == "cuda" or cpu_has_bf16() else []
    precisions += ["fp16"] if device.type == "cuda" else []
    modes: dict[str, Network] = {}
    for name in precisions:
        dtype = choose_precision(name, device)
        modes[f"torch {name}"] = TorchNetwork(model, spec, device, dtype)
        if config.compile:
            modes[f"torch {name} compiled"] = CompiledNetwork(model, spec, device, dtype)
    return modes, spec


def opencv_mode(path: str, images: Tensor) -> Callable[[], object]:
    """OpenCV's DNN on an ONNX file."""
    network = cv2.dnn.readNetFromONNX(path)
    names = network.getUnconnectedOutLayersNames()

    def call() -> object:
        network.setInput((images.float() / 255).numpy())
        return network.forward(names)

    return call


def benchmark_network(config: NetworkTimes) -> dict[str, float]:
    """Median milliseconds of each mode."""
    device = choose_device(config.device)
    modes, spec = torch_modes(config, device)
    images = torch.randint(256, (config.batch_size, 3, *spec.input_size), dtype=torch.uint8)
    calls: dict[str, Callable[[], object]] = {}
    for path in config.exported:
        if Path(path).suffix not in EXPORTED:
            raise UserError(f"{path} is not among {', '.join(EXPORTED)}; a checkpoint goes to --weights")
        modes[Path(path).name] = open_exported(Path(path), device, torch.float32)[0]
        if Path(path).suffix == ".xml" and cpu_has_bf16():
            modes[f"{Path(path).name} bf16"] = open_exported(Path(path), device, torch.bfloat16)[0]
        if Path(path).suffix == ".onnx" and device.type == "cpu":
            calls[f"{Path(path).name} in OpenCV"] = opencv_mode(path, images)
    for name, network in modes.items():
        placed = images.to(network.device)  # ONNX Runtime takes what is in memory, also for a GPU
        calls[name] = lambda network=network, placed=placed: network.to_boxes(network(placed))
    return time_alternately(calls, config.rounds, device)


def load_detector(config: Folder | Video | Memory, precision: str) -> Detector:
    device = choose_device(config.device)
    path = find_checkpoint(config.weights)
    return Detector.load(path, device, precision_for(path, precision, device))


def run(detector: Detector, sources: Sequence[Source], sinks: Sequence[Sink]) -> Iterator[Frame]:
    """Predict as predict.py does, frame by frame."""
    with ExitStack() as stack:
        for sink in sinks:
            stack.enter_context(closing(sink))
        results = stack.enter_context(closing(write_behind(Pipeline(detector, sources, FrameOptions()), sinks)))
        yield from (frame for frame, _, _ in results)


def benchmark_folder(config: Folder) -> dict[str, float]:
    """Median seconds of the parts and of the whole, and their ratio."""
    detector = load_detector(config, config.precision)
    sources = open_sources(config.source, 0)
    if not all(isinstance(source, Images) for source in sources):
        raise UserError(f"{config.source} must be images only")
    paths = [path for source in sources for path in source.paths]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(config.rounds + 1):  # the first warms up
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
            done = sum(1 for _ in run(detector, sources, [JsonLines(Path(folder), detector.spec.class_names)]))
            whole = time.perf_counter() - started
            rounds.append({"decoding": decoding, "network": network, "whole": whole, "images": done})
    medians = {name: statistics.median(times[name] for times in rounds[1:]) for name in rounds[0]}
    ratio = statistics.median(times["whole"] / (times["decoding"] + times["network"]) for times in rounds[1:])
    return medians | {"ratio": ratio}


def draw_film(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Discs that move over a noisy background."""
    height, width = size
    rng = np.random.default_rng(0)
    ground = cv2.resize(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8), (width, height))
    starts, steps = rng.random((12, 2)), rng.normal(0, 0.01, (12, 2))
    colours = rng.integers(0, 256, (12, 3)).tolist()
    writer = VideoWriter(path, FILM_RATE, size)
    for number in range(frames):
        image = ground.copy()
        for (x, y), colour in zip((starts + number * steps) % 1, colours, strict=True):
            cv2.circle(image, (int(x * width), int(y * height)), height // 16, colour, -1)
        writer.write(image, number / float(FILM_RATE))
    writer.close()


def benchmark_video(config: Video) -> dict[str, float]:
    """Seconds of the whole and of the network within it, which runs beside the rest."""
    detector = load_detector(config, config.precision)
    detector.network = network = TimedNetwork(detector.network)
    with tempfile.TemporaryDirectory() as name:
        draw_film(Path(name) / "film.mp4", config.frames, FILM_SIZE)
        detector(np.zeros((*FILM_SIZE, 3), np.uint8))
        network.seconds, started = 0.0, time.perf_counter()
        sinks = [Pictures(Path(name) / "out", detector.spec.class_names)]
        frames = sum(1 for _ in run(detector, [VideoFile(str(Path(name) / "film.mp4"))], sinks))
        seconds = time.perf_counter() - started
    return {
        "frames": frames,
        "seconds": seconds,
        "network_seconds": network.seconds,
        "share": network.seconds / seconds,
        "frames_per_second": frames / seconds,
    }


def resident_mb() -> float:
    """This process's memory, without mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def benchmark_memory(config: Memory) -> dict[str, object]:
    """MB at some moments, and how many more per 10,000 frames, by a line through the second half."""
    if sys.platform != "linux":
        raise UserError(f"memory is measured with Linux's /proc, which {sys.platform} does not have")
    detector = load_detector(config, "auto")
    seen: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as name:
        film, out = Path(name) / "film.mp4", Path(name) / "out"
        draw_film(film, SMALL_FRAMES, SMALL_FILM)
        sources = [VideoFile(str(film))] * -(-config.frames // SMALL_FRAMES)
        out.mkdir()
        names = detector.spec.class_names
        for number, frame in enumerate(run(detector, sources, [Pictures(out, names), JsonLines(out, names)])):
            if number % max(1, config.frames // LOOKS) == 0:
                seen.append((number, resident_mb()))
            if frame.number == 0:  # films that are done, so that the disk does not fill
                for path in sorted(out.glob("*.mp4"), key=lambda path: path.stat().st_mtime)[:-3]:
                    path.unlink()
        shutil.rmtree(out)
    numbers, sizes = np.array(seen[len(seen) // 2 :]).T
    slope = float(np.polyfit(numbers, sizes, 1)[0]) * 10_000
    return {"frames": config.frames, "mb": [round(size, 1) for _, size in seen], "mb_per_10000_frames": slope}


MEASURES = {
    NetworkTimes: benchmark_network,
    Folder: benchmark_folder,
    Video: benchmark_video,
    Memory: benchmark_memory,
}


def main(config: NetworkTimes | Folder | Video | Memory) -> None:
    for name in ("batch_size", "rounds", "frames"):
        if hasattr(config, name):
            check_range(config, 1, inf, name)
    with StopSignals():  # so that the temporary folders go, whatever ends it
        if choose_device(config.device).type == "cpu":
            keep_freed_memory()
        figures = MEASURES[type(config)](config)
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_script(main, Config)
