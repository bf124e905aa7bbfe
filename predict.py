"""Detect objects in images and videos: python predict.py SOURCE --weights logs/RUN/best.safetensors

Change the defaults in `Config`, or override them on the command line.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from utils.data.voc import load_classes
from utils.detection.nms import Thresholds
from utils.inference.backends import EXPORTED, precision_for
from utils.inference.detector import Detector
from utils.inference.pipeline import FrameOptions, Pipeline, closing_sink, write_behind
from utils.inference.sinks import SINKS, Sink, Window, WindowClosed, track_ids
from utils.inference.sources import Images, Source, input_files, open_sources
from utils.system.cli import run_script
from utils.system.device import choose_device, keep_freed_memory, synchronize
from utils.system.errors import UserError, check_choice, check_range
from utils.system.files import make_folder
from utils.system.signals import StopSignals
from utils.weights.checkpoint import find_checkpoint

MAX_SHOWN = 3  # read errors in the summary
WARMUP_CALLS, TIMED_CALLS = 10, 50  # for --benchmark
SOURCE_HELP = "images, videos, folders, globs ('photos/*.jpg'), .txt lists, - for stdin, 0 for a camera, URLs"
RENAMED_FLAGS = {
    "write": "save",
    "only": "class-filter",
    "every": "frame-stride",
    "flip": "tta",
    "patience": "reconnect-timeout",
    "agnostic": "agnostic-nms",
}


@dataclass(frozen=True)
class Config:
    """Detect objects in images and videos."""

    source: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE", help=SOURCE_HELP)]
    weights: str = ""  # checkpoint, run folder, .onnx or .xml; empty: the newest run in logs/
    out: str = ""  # output folder; empty: a new one in predictions/, named by date and time
    # any of: pictures (annotated images and videos), jsonl and csv (tables of detections), voc, yolo and coco (labels),
    # crops (cut-out detections), counts (per class, printed), heatmap (of positions), window (live view)
    save: tuple[str, ...] = ("pictures", "jsonl")
    explain: bool = False  # also write the attention and Grad-CAM maps of each image
    classes: str = ""  # class file that must match the classes of the network; empty: no check

    # detection
    confidence: float | Literal["auto"] = "auto"  # minimum confidence; auto: per class, as suggested by validation
    class_confidence: dict[str, float] = field(default_factory=dict)  # minimum confidence per class, such as helmet 0.5
    class_filter: tuple[str, ...] = ()  # classes to detect; empty: all
    nms_iou: float = 0.5  # IoU above which NMS suppresses a lower-scoring box of the same class
    agnostic_nms: bool = False  # class-agnostic NMS: boxes also suppress boxes of other classes
    tta: bool = False  # test-time augmentation with the mirrored image, which doubles the time
    tile: int = 0  # divide images into square tiles of this size in pixels; 0: no tiling
    track: bool = False  # assign track IDs to the objects in videos

    # speed and devices
    frame_stride: int = 1  # process every Nth frame of a video; the frames in between reuse its detections
    reconnect_timeout: float = 30.0  # seconds to keep reconnecting to a lost camera or stream
    batch_size: int = 0  # images or tiles per batch; 0: 1 for cameras and streams, otherwise 4, or 16 on a GPU
    device: str = "auto"  # auto, cpu, cuda or cuda:N (the GPU with index N)
    precision: str = "auto"  # precision of the network: auto, bf16, fp16 or fp32
    compile: str = "auto"  # torch.compile: auto (on a GPU), on or off
    benchmark: tuple[int, ...] = ()  # only measure the speed, with these batch sizes

    def __post_init__(self) -> None:
        check_range(self, 0, 1e9, "reconnect_timeout")
        check_choice(self, "compile", ("auto", "on", "off"))
        unknown = [name for name in self.save if name not in SINKS]
        if unknown or not self.save:
            raise UserError(f"save is {', '.join(unknown) or 'empty'}, but must be one or more of {', '.join(SINKS)}")
        if any(size < 1 for size in self.benchmark):
            raise UserError(f"benchmark is {self.benchmark}, but batch sizes must be at least 1")
        if self.explain and self.tile:
            raise UserError("explain works on whole images only; leave out --tile")

    @cached_property
    def folder(self) -> Path:
        return Path(self.out or time.strftime("predictions/%Y-%m-%d_%H-%M-%S"))

    @property
    def frame_options(self) -> FrameOptions:
        return FrameOptions(self.batch_size, self.frame_stride, self.tile, self.track)

    @property
    def thresholds(self) -> Thresholds:
        confidence = None if self.confidence == "auto" else self.confidence
        return Thresholds(confidence, self.class_confidence, self.class_filter, self.nms_iou, self.agnostic_nms)


@dataclass
class Totals:
    """Counts of what was processed."""

    frames: int = 0
    processed: int = 0  # frames except those skipped by --frame-stride
    detections: int = 0
    tracks: set[tuple[str, int]] = field(default_factory=set)  # video, track ID


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def main(config: Config) -> int:
    """Detect objects in all sources; returns the number of detections."""
    sources = open_all(config)
    detector = load_detector(config)
    pipeline = Pipeline(detector, sources, config.frame_options)
    if config.benchmark:
        run_benchmark(config.benchmark, pipeline)
        return 0
    totals = Totals()
    try:
        with StopSignals(), ExitStack() as stack:
            run_pipeline(pipeline, open_sinks(config, detector, stack), totals)
    finally:
        print_summary(config, pipeline, totals)
    if pipeline.read_errors and not totals.frames:
        raise UserError(shorten(pipeline.read_errors, 1))
    return totals.detections


def open_all(config: Config) -> list[Source]:
    """Open the sources; raises UserError if there are none or the output would overwrite them."""
    sources = [source for name in config.source for source in open_sources(name, config.reconnect_timeout)]
    if not sources:
        raise UserError("no source was given; specify an image, a video, a folder or a glob")
    if any(path.parent.resolve() == config.folder.resolve() for path in input_files(sources)):
        raise UserError(f"out is {config.folder}, where the results would overwrite the input; choose another folder")
    return sources


def load_detector(config: Config) -> Detector:
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    path = find_checkpoint(config.weights)
    if config.compile == "on" and path.suffix in EXPORTED:
        raise UserError(f"{path} does not run in PyTorch; leave out --compile on")
    dtype = precision_for(path, config.precision, device)
    compile = "off" if config.explain and config.compile == "auto" else config.compile
    detector = Detector.load(path, device, dtype, config.thresholds, compile, config.tta)
    if config.classes:
        detector.expect_classes(load_classes(config.classes), config.classes)
    return detector


def open_sinks(config: Config, detector: Detector, stack: ExitStack) -> list[Sink]:
    """Open the sinks in `config.save`, which the stack closes."""
    make_folder(config.folder)
    if any(config.folder.iterdir()):
        print(f"note: {config.folder} is not empty; files with the same name are overwritten", file=sys.stderr)
    names = list(dict.fromkeys(config.save))
    if "window" in names and not Window.is_available():
        print("note: no window is shown, since there is no display or OpenCV does not support windows", file=sys.stderr)
        names.remove("window")
    sinks: list[Sink] = []
    if config.explain:
        from utils.reports.explain_panels import Panels  # slow to import

        sinks.append(Panels(config.folder, detector))
    class_names = detector.spec.class_names
    try:
        return sinks + [stack.enter_context(closing_sink(SINKS[name](config.folder, class_names))) for name in names]
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from None


def run_pipeline(pipeline: Pipeline, sinks: Sequence[Sink], totals: Totals) -> None:
    """Write all results to the sinks, and add them to `totals`."""
    expected = [source.total for source in pipeline.sources]
    total = None if None in expected else sum(expected)
    with (
        suppress(WindowClosed),
        closing(write_behind(pipeline, sinks)) as results,
        tqdm(total=total, desc="predicting", unit=" frames", disable=None) as progress,
    ):
        for frame, detections, is_new in results:
            totals.frames += 1
            if is_new:
                totals.processed += 1
                totals.detections += len(detections)
                name = frame.video.name if frame.video else ""
                totals.tracks.update((name, track) for track in track_ids(detections) if track is not None)
            progress.update()


def print_summary(config: Config, pipeline: Pipeline, totals: Totals) -> None:
    """Print read errors and the number of detections."""
    if not totals.frames:
        return
    if pipeline.read_errors:
        print(f"warning: {shorten(pipeline.read_errors, MAX_SHOWN)}", file=sys.stderr)
    print(f"confidence thresholds: {pipeline.detector.describe_confidences()}")
    processed = f", of which {totals.processed} were processed" if totals.processed < totals.frames else ""
    tracks = f", {count(len(totals.tracks), 'track')}" if totals.tracks else ""
    unit = "image" if all(isinstance(source, Images) for source in pipeline.sources) else "frame"
    text = f"{count(totals.detections, 'detection')} in {count(totals.frames, unit)}{processed}{tracks}"
    print(f"{text}; the results are in {config.folder}")
    if not totals.detections:
        print("no score reached its threshold; a lower --confidence shows less certain detections")


def shorten(errors: Sequence[str], max_shown: int) -> str:
    hidden = len(errors) - max_shown
    return "; ".join(errors[:max_shown]) + (f" (and {hidden} more)" if hidden > 0 else "")


def run_benchmark(batch_sizes: Sequence[int], pipeline: Pipeline) -> None:
    """Print the time of the network alone and of end-to-end detection on images in memory, by batch size."""
    detector = pipeline.detector
    images = [frame.image for frame in islice(pipeline.frames(), max(batch_sizes))]
    if not images:
        raise UserError("none of the images can be read")
    print(f"{'':5}  {'network (ms)':>18}  {'end to end (ms)':>18}")
    print(f"{'batch':5}  {'median':>9}{'95%':>9}  {'median':>9}{'95%':>9}  {'images/s':>9}")
    for size in batch_sizes:
        batch = [images[i % len(images)] for i in range(size)]
        network = time_calls(partial(detector.network, detector.prepare(batch).images), detector.network.device)
        whole = time_calls(lambda batch=batch: detector.detect_batch(detector.prepare(batch)), detector.network.device)
        times = "  ".join(f"{median:9.2f}{slow:9.2f}" for median, slow in (network, whole))
        print(f"{size:5}  {times}  {1000 * size / whole[0]:9.1f}")


def time_calls(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median and 95th percentile in milliseconds."""
    times = []
    for _ in range(WARMUP_CALLS + TIMED_CALLS):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    return tuple(np.percentile(times[WARMUP_CALLS:], [50, 95]).tolist())


if __name__ == "__main__":
    run_script(main, Config, RENAMED_FLAGS)
