"""Detect objects in images: python predict.py SOURCE --weights logs/RUN/best.safetensors

Change the constants of `Config`, or give them as flags.
"""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from utils.checkpoint import newest_checkpoint
from utils.detector import Detector, Thresholds
from utils.device import choose_device, choose_precision, keep_freed_memory
from utils.errors import UserError, run_script
from utils.sinks import Counts, Crops, JsonLines, Pictures, Sink
from utils.sources import find_images, read_frames
from utils.voc import load_classes

SOURCE_HELP = 'an image, a folder of images, or a glob such as "photos/*.jpg"'


@dataclass(frozen=True)
class Config:
    """Detect objects in images."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE", help=SOURCE_HELP)]
    weights: str = ""  # checkpoint of train.py; empty: best.safetensors of the newest run under logs/
    out: str = "predictions"  # folder for the results: annotated pictures and detections.jsonl
    classes: str = ""  # class file to compare with the checkpoint's classes; empty: those of the checkpoint
    confidence: float = 0.3  # least score of a detection
    nms_iou: float = 0.5  # two boxes of a class that overlap more are one object
    crops: bool = False  # write each detection as a picture of its own, under out/crops
    counts: bool = False  # print how many objects of each class there are
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "fp32"  # of the network: fp32, bf16, fp16 or auto


def open_sinks(config: Config, class_names: tuple[str, ...]) -> list[Sink]:
    """Where the detections go."""
    folder = Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sinks: list[Sink] = [Pictures(folder, class_names), JsonLines(folder / "detections.jsonl", class_names)]
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if config.crops:
        sinks.append(Crops(folder / "crops", class_names))
    if config.counts:
        sinks.append(Counts(class_names))
    return sinks


def main(config: Config) -> int:
    """Predict on every image of the source; returns how many objects were found."""
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    paths = find_images(config.source)
    if any(path.parent.resolve() == Path(config.out).resolve() for path in paths):
        raise UserError(f"out is {config.out}, where the pictures would replace their inputs; choose another folder")
    weights = config.weights or newest_checkpoint("best")
    thresholds = Thresholds(config.confidence, config.nms_iou)
    detector = Detector.load(weights, device, choose_precision(config.precision, device), thresholds)
    if config.classes:
        detector.expect_classes(load_classes(config.classes), config.classes)
    found = 0
    with ExitStack() as stack:
        sinks = [stack.enter_context(closing(sink)) for sink in open_sinks(config, detector.spec.class_names)]
        for frame in tqdm(read_frames(paths), "predicting", len(paths), disable=None):
            detections = detector(frame.image)
            found += len(detections)
            for sink in sinks:
                sink.write(frame, detections)
    print(f"{found} objects in {len(paths)} images; pictures and detections.jsonl are in {config.out}")
    return found


if __name__ == "__main__":
    run_script(main, Config)
