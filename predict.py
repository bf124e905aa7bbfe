"""Detect objects in images: python predict.py SOURCE --weights logs/RUN/best.safetensors

Change the constants of `Config`, or give them as flags.
"""

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from utils.checkpoint import find_checkpoint
from utils.detector import Detector, Thresholds
from utils.device import choose_device, choose_precision, keep_freed_memory
from utils.errors import UserError, make_folder, run_script
from utils.images import read_image
from utils.sinks import Counts, Crops, JsonLines, Pictures, Sink
from utils.sources import Frame, find_images
from utils.voc import load_classes

SHOWN = 3  # of the images that could not be read, in the message
SOURCE_HELP = 'images, folders of images, or globs such as "photos/*.jpg"'


@dataclass(frozen=True)
class Config:
    """Detect objects in images."""

    source: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE", help=SOURCE_HELP)]
    weights: str = ""  # checkpoint of train.py, or folder of a run; empty: the newest run under logs/
    out: str = "predictions"  # folder for the results: annotated pictures and detections.jsonl
    classes: str = ""  # class file to compare with the checkpoint's classes; empty: those of the checkpoint
    confidence: float | Literal["auto"] = "auto"  # least score; auto: for each class what its validation suggests
    nms_iou: float = 0.5  # two boxes of a class that overlap more are one object
    crops: bool = False  # write each detection as a picture of its own, under out/crops
    counts: bool = False  # print how many objects of each class there are
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "fp32"  # of the network: fp32, bf16, fp16 or auto


def open_sinks(config: Config, class_names: tuple[str, ...]) -> list[Sink]:
    """Where the detections go."""
    folder = Path(config.out)
    make_folder(folder)
    sinks: list[Sink] = [Pictures(folder, class_names), JsonLines(folder / "detections.jsonl", class_names)]
    if config.crops:
        sinks.append(Crops(folder / "crops", class_names))
    if config.counts:
        sinks.append(Counts(class_names))
    return sinks


def detect_all(detector: Detector, paths: list[Path], sinks: list[Sink]) -> tuple[int, list[str]]:
    """Detect in each image and hand on what was found: how many objects, and why which images could not be read."""
    found, unread = 0, []
    for path in tqdm(paths, "predicting", disable=None):
        try:
            frame = Frame(path, read_image(path))
        except UserError as error:
            unread.append(str(error))
            continue
        detections = detector(frame.image)
        found += len(detections)
        for sink in sinks:
            sink.write(frame, detections)
    return found, unread


def main(config: Config) -> int:
    """Predict on every image of the source; returns how many objects were found."""
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    paths = [path for source in config.source for path in find_images(source)]
    if not paths:
        raise UserError("no source was given; name an image, a folder or a glob")
    if any(path.parent.resolve() == Path(config.out).resolve() for path in paths):
        raise UserError(f"out is {config.out}, where the pictures would replace their inputs; choose another folder")
    weights = find_checkpoint(config.weights)
    thresholds = Thresholds(None if config.confidence == "auto" else config.confidence, config.nms_iou)
    detector = Detector.load(weights, device, choose_precision(config.precision, device), thresholds)
    if config.classes:
        detector.expect_classes(load_classes(config.classes), config.classes)
    with ExitStack() as stack:
        sinks = [stack.enter_context(closing(sink)) for sink in open_sinks(config, detector.spec.class_names)]
        found, unread = detect_all(detector, paths, sinks)
    if len(unread) == len(paths):
        raise UserError(unread[0] + (f", nor are the other {len(unread) - 1}" if len(unread) > 1 else ""))
    if unread:
        print(f"skipped {len(unread)} of {len(paths)} images: {'; '.join(unread[:SHOWN])}", file=sys.stderr)
    print(f"confidence {detector.describe_confidences()}")
    print(f"{found} objects in {len(paths) - len(unread)} image(s); pictures and detections.jsonl are in {config.out}")
    if not found:
        least = "that suggested for its class" if config.confidence == "auto" else f"{config.confidence:g}"
        print(f"nothing reached the confidence {least}; a lower --confidence shows less certain detections")
    return found


if __name__ == "__main__":
    run_script(main, Config)
