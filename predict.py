"""Detect objects in images and videos: python predict.py SOURCE --weights logs/RUN/best.safetensors

Change the constants of `Config`, or give them as flags.
"""

import sys
import time
from collections import Counter
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
from utils.inference.pipeline import Look, Pipeline, finishing, write_behind
from utils.inference.sinks import SINKS, Sink, Window, WindowClosed
from utils.inference.sources import inputs, open_sources
from utils.system.cli import run_script
from utils.system.device import choose_compile, choose_device, keep_freed_memory, synchronize
from utils.system.errors import UserError, check_choice, check_range, make_folder
from utils.system.signals import StopSignals
from utils.weights.checkpoint import find_checkpoint

SHOWN = 3  # diagnostics that are told
WARMUP_CALLS, TIMED_CALLS = 10, 50  # of a benchmark
SOURCE_HELP = (
    'images, videos, folders, globs such as "photos/*.jpg", .txt lists, - for stdin, 0 for a camera, addresses'
)


@dataclass(frozen=True)
class Config:
    """Detect objects in images and videos."""

    source: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE", help=SOURCE_HELP)]
    weights: str = ""  # checkpoint, run folder, .onnx or .xml; empty: the newest run under logs/
    out: str = ""  # folder for the results; empty: predictions/ and the time
    write: tuple[str, ...] = ("pictures", "jsonl")  # pictures jsonl csv voc yolo coco crops counts heatmap window
    explain: bool = False  # of each image also a panel of what the network looked at, and its arrays
    classes: str = ""  # class file to compare with the checkpoint's classes; empty: those of the checkpoint

    # what is an object
    confidence: float | Literal["auto"] = "auto"  # least score; auto: for each class what its validation suggests
    class_confidence: dict[str, float] = field(default_factory=dict)  # for single classes, such as: helmet 0.5
    only: tuple[str, ...] = ()  # classes to look for; empty: all
    nms_iou: float = 0.5  # two boxes of a class that overlap more are one object
    agnostic: bool = False  # let boxes of different classes count as one object too
    flip: bool = False  # look at the mirrored image as well, which takes twice the time
    tile: int = 0  # pixels of the side of tiles that large images are looked at in; 0: the whole image at once
    track: bool = False  # give objects in videos a number that stays

    # how
    every: int = 1  # of videos, look only at every Nth frame; the boxes stay until the next
    patience: float = 30.0  # seconds to wait for a camera or stream that went away
    batch_size: int = 0  # images, or tiles, in the network at once; 0: 1 of cameras and streams, else 4, on a GPU 16
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # of the network: auto, bf16, fp16 or fp32
    compile: str = "auto"  # torch.compile: on, off, or auto: on a GPU
    benchmark: tuple[int, ...] = ()  # instead of writing anything, measure the speed at these batch sizes

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        check_range(self, 0, 1e9, "patience")
        check_choice(self, "compile", ("auto", "on", "off"))
        unknown = [name for name in self.write if name not in SINKS]
        if unknown or not self.write:
            raise UserError(f"write is {', '.join(unknown) or 'empty'}, but must be among {', '.join(SINKS)}")
        if any(size < 1 for size in self.benchmark):
            raise UserError(f"benchmark is {self.benchmark}, but batch sizes are at least 1")
        if self.explain and self.tile:
            raise UserError("explain shows one look at the whole image; leave out --tile")

    @cached_property
    def folder(self) -> Path:
        """Of the results."""
        return Path(self.out or time.strftime("predictions/%Y-%m-%d_%H-%M-%S"))

    def look(self) -> Look:
        return Look(self.batch_size, self.every, self.tile, self.track)

    def thresholds(self) -> Thresholds:
        confidence = None if self.confidence == "auto" else self.confidence
        return Thresholds(confidence, self.class_confidence, self.only, self.nms_iou, self.agnostic)


def open_sinks(config: Config, detector: Detector, stack: ExitStack) -> list[Sink]:
    """Where the detections go; the stack closes them."""
    make_folder(config.folder)
    if any(config.folder.iterdir()):
        print(f"{config.folder} has older files, which stay unless new ones have their names", file=sys.stderr)
    names = list(dict.fromkeys(config.write))
    if "window" in names and not Window.is_possible():
        print("there is no display, or OpenCV was installed without windows; going on without one", file=sys.stderr)
        names.remove("window")
    sinks: list[Sink] = []
    if config.explain:
        from utils.reports.panels import Panels  # takes a second, which only those who want it wait for

        sinks.append(Panels(config.folder, detector))
    class_names = detector.spec.class_names
    try:
        return sinks + [stack.enter_context(finishing(SINKS[name](config.folder, class_names))) for name in names]
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from None


def load_detector(config: Config) -> Detector:
    """The network on its device."""
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    path = find_checkpoint(config.weights)
    if config.compile == "on" and path.suffix in EXPORTED:
        raise UserError(f"{path} is run by a program that compiles it by itself; leave out --compile on")
    dtype = precision_for(path, config.precision, device)
    compiled = choose_compile("off" if config.explain and config.compile == "auto" else config.compile, device)
    detector = Detector.load(path, device, dtype, config.thresholds(), compiled, config.flip)
    if config.classes:
        detector.expect_classes(load_classes(config.classes), config.classes)
    return detector


def main(config: Config) -> int:
    """Predict on every frame of the source; returns how many objects were found."""
    sources = [source for name in config.source for source in open_sources(name, config.patience)]
    if not sources:
        raise UserError("no source was given; name an image, a video, a folder or a glob")
    if any(path.parent.resolve() == config.folder.resolve() for path in inputs(sources)):
        raise UserError(f"out is {config.folder}, where the results would replace their inputs; choose another folder")
    detector = load_detector(config)
    pipeline = Pipeline(detector, sources, config.look())
    if config.benchmark:
        return measure(config.benchmark, pipeline)
    done: Counter[str] = Counter()
    try:
        with StopSignals(), ExitStack() as stack:
            sinks = open_sinks(config, detector, stack)
            write_all(pipeline, sinks, done)
    finally:
        report(config, pipeline, done)
    if pipeline.problems and not done["images"]:
        others = len(pipeline.problems) - 1
        raise UserError(pipeline.problems[0] + (f" (and {others} more like this)" if others else ""))
    return done["objects"]


def report(config: Config, pipeline: Pipeline, done: Counter[str]) -> None:
    """Say what could not be read, and what was found, also of a run that was stopped."""
    if pipeline.problems and done["images"]:
        number = len(pipeline.problems)
        several = "s" if number > 1 else ""
        print(f"{number} problem{several}: {'; '.join(pipeline.problems[:SHOWN])}", file=sys.stderr)
    if done["images"]:
        print(f"confidence {pipeline.detector.describe_confidences()}")
        part = f", of which {done['looked_at']} were looked at" if done["looked_at"] < done["images"] else ""
        print(f"{done['objects']} objects in {done['images']} image(s){part}; the results are in {config.folder}")
        if not done["objects"]:
            print("nothing reached that confidence; a lower --confidence shows less certain detections")


def write_all(pipeline: Pipeline, sinks: Sequence[Sink], done: Counter[str]) -> None:
    """Hand everything to the sinks, and count the images, and the objects on those looked at."""
    totals = [source.total for source in pipeline.sources]
    total = None if None in totals else sum(totals)
    with (
        suppress(WindowClosed),
        closing(write_behind(pipeline, sinks)) as results,
        tqdm(total=total, desc="predicting", unit=" images", disable=None) as bar,
    ):
        for _, detections, new in results:
            done.update(images=1, looked_at=int(new), objects=len(detections) * new)
            bar.update()


def measure(batch_sizes: Sequence[int], pipeline: Pipeline) -> int:
    """Print the time of the network alone, and from images in memory to their detections, for batches of each size."""
    detector = pipeline.detector
    images = [frame.image for frame in islice(pipeline.frames(), max(batch_sizes))]
    if not images:
        raise UserError("none of the images can be read")
    print(f"{'':5}  {'network, ms':>18}  {'end to end, ms':>18}")
    print(f"{'batch':5}  {'median':>9}{'95 %':>9}  {'median':>9}{'95 %':>9}  {'images/s':>9}")
    for size in batch_sizes:
        batch = [images[i % len(images)] for i in range(size)]
        network = time_calls(partial(detector.network, detector.prepare(batch).images), detector.network.device)
        whole = time_calls(lambda batch=batch: detector.find(detector.prepare(batch)), detector.network.device)
        times = "  ".join(f"{median:9.2f}{slow:9.2f}" for median, slow in (network, whole))
        print(f"{size:5}  {times}  {1000 * size / whole[0]:9.1f}")
    return 0


def time_calls(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median and 95th percentile, in milliseconds."""
    times = []
    for _ in range(WARMUP_CALLS + TIMED_CALLS):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    median, slow = np.percentile(times[WARMUP_CALLS:], [50, 95])
    return float(median), float(slow)


if __name__ == "__main__":
    run_script(main, Config)
