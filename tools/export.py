"""Write a checkpoint for other programs, and compare each file with it on real images:

python tools/export.py --weights logs/RUN/best.safetensors --formats onnx openvino --images photos/

onnx: for ONNX Runtime, OpenCV 5 and TensorRT; onnx-nms: the same with suppression inside; openvino and int8: for
OpenVINO, whole and quantized; torch: for torch.export; darknet: for Darknet and OpenCV 4, phi 0 alone. How each is run
stands in docs/deployment.md. A file that finds other boxes or scores than the checkpoint is not written.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data.cache import ImageCache, build_cache
from utils.data.voc import load_samples
from utils.detection.letterbox import Fit, clip_boxes
from utils.detection.nms import EVALUATION_THRESHOLDS, Thresholds
from utils.evaluation.metrics import evaluate
from utils.inference.backends import Network, OnnxNetwork, import_runtime
from utils.inference.detector import Detector
from utils.inference.exporters import PACKAGES, WRITERS, Format, Job, load_images, open_written
from utils.inference.sources import Images, open_sources
from utils.system.cli import run_script
from utils.system.errors import UserError, make_folder
from utils.system.files import atomic_write
from utils.weights.checkpoint import find_checkpoint, load_checkpoint

COMPARED = 50  # images at most
CALIBRATED = 300  # images at most for int8, as NNCF suggests
BATCH_SIZES = (1, 3, 8)  # that the images are compared in
OTHER_SIZE = (32, 64)  # pixels by which the other size is higher and wider
MIN_SCORE = 0.01  # of the boxes that are compared
BOX_TOLERANCE = 0.05  # pixels of the input
SCORE_TOLERANCE = 1e-4
UNLIMITED = 10**9
MAX_ALONE = 0.01  # share of detections that rounding may push over a threshold


@dataclass(frozen=True)
class Config:
    """Write a checkpoint for other programs, and compare each file with it on real images."""

    weights: str = ""  # checkpoint of train.py, or folder of a run; empty: the newest run under logs/
    formats: tuple[Format, ...] = ("onnx",)  # what to write
    out: str = ""  # folder for the files; empty: export/ beside the checkpoint
    images: tuple[str, ...] = ()  # real images to compare on: files, folders, globs, or lists (.txt)
    calibration: tuple[str, ...] = ()  # images that int8 takes its ranges from, best of the training; empty: images
    devkit: str = "VOCdevkit"  # folder of the data sets
    sets: tuple[str, ...] = ()  # sets to measure the AP of every file on, such as VOC2007/test; empty: none
    confidence: float | Literal["auto"] = "auto"  # least score in onnx-nms; auto: as validation suggests
    nms_iou: float = 0.5  # in onnx-nms two boxes of a class that overlap more are one object


@dataclass(frozen=True)
class Expected:
    """What the checkpoint finds in images of one size."""

    images: Tensor  # (K, 3, H, W) uint8
    boxes: Tensor  # (K, N, 4)
    scores: Tensor  # (K, N, C)

    def batches(self) -> Iterator["Expected"]:
        """All images in batches of each size."""
        for size in BATCH_SIZES:
            parts = (values.split(size) for values in (self.images, self.boxes, self.scores))
            yield from (Expected(*part) for part in zip(*parts, strict=True))


@dataclass(frozen=True)
class Difference:
    """The largest between a file and its checkpoint."""

    boxes: float  # in pixels of the input
    scores: float

    def __str__(self) -> str:
        return f"boxes differ by {self.boxes:.2g} px at most, scores by {self.scores:.2g}"

    @property
    def tolerable(self) -> bool:
        return self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE  # and not NaN


def expect(job: Job, paths: Sequence[Path]) -> list[Expected]:
    """What the checkpoint finds at the input size, and at another one; raises UserError when that is nothing."""
    height, width = job.spec.input_size
    expected = []
    for size in ((height, width), (height + OTHER_SIZE[0], width + OTHER_SIZE[1])):
        images = load_images(paths, job.spec, size)
        found = zip(*(job.reference(part) for part in images.split(max(BATCH_SIZES))), strict=True)
        expected.append(Expected(images, *map(torch.cat, found)))
    if not (expected[0].scores > MIN_SCORE).any():
        raise UserError(
            f"the checkpoint finds nothing in these {len(paths)} images, which leaves nothing to compare; give images "
            "of what it was trained on"
        )
    return expected


def compare(network: Network, expected: Sequence[Expected]) -> Difference:
    """All scores, and the boxes that have one above MIN_SCORE, as far as they lie in the image."""
    boxes, scores = [], []
    for batch in (batch for item in expected for batch in item.batches()):
        found_boxes, found_scores = network.decode(network(batch.images))
        if found_boxes.shape != batch.boxes.shape or found_scores.shape != batch.scores.shape:
            return Difference(inf, inf)
        scored = batch.scores.amax(dim=-1, keepdim=True) > MIN_SCORE
        height, width = batch.images.shape[2:]
        # clipped, since rounding alone moves the ends of boxes that are far larger than the image
        limits = torch.zeros(4), torch.tensor([width, height] * 2)
        shift = found_boxes.clamp(*limits) - batch.boxes.clamp(*limits)
        boxes.append(torch.where(scored, shift, 0).abs().max())
        scores.append((found_scores - batch.scores).abs().max())
    return Difference(*(torch.stack(values).max().item() for values in (boxes, scores)))  # NaN if there is one


def compare_detections(job: Job, path: Path, expected: Sequence[Expected]) -> Difference:
    """The same of an ONNX with suppression; infinite where more than a few detections are of one side alone."""
    network = OnnxNetwork(path, torch.device("cpu"), torch.float32)
    detector = Detector(job.reference, job.spec, job.thresholds, job.suggested)
    pairs, alone = [np.zeros((1, 2))], 0
    for batch in (batch for item in expected for batch in item.batches()):
        images = (batch.images.float() / 255).numpy()
        (rows,) = network.session.run(["detections"], {"images": images})
        count, size = len(images), images.shape[2:]
        wanted = detector.select((batch.boxes, batch.scores), [Fit(1, 1, 0, 0)] * count, [size] * count)
        for i, detections in enumerate(wanted):
            own = rows[rows[:, 0] == i]
            boxes = np.abs(clip_boxes(own[:, None, 1:5], size) - detections.xyxy).max(axis=2)  # (D, E)
            scores = np.abs(own[:, None, 5] - detections.confidence)
            boxes[own[:, None, 6] != detections.class_id] = inf
            near = (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE)
            alone += (~near.any(axis=0)).sum() + (~near.any(axis=1)).sum()
            pairs.append(np.stack([boxes[near], scores[near]], axis=1))
    found = np.concatenate(pairs)
    if alone > MAX_ALONE * len(found):
        return Difference(inf, inf)
    return Difference(*map(float, found.max(axis=0)))


def find_images(names: Sequence[str], most: int) -> list[Path]:
    """At most so many image files, evenly spread over everything that is named."""
    sources = [source for name in names for source in open_sources(name, patience=0)]
    paths = [path for source in sources if isinstance(source, Images) for path in source.paths]
    if not paths:
        raise UserError(f"{', '.join(names)} has no image file")
    count = min(most, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def measure(job: Job, network: Network, cache: ImageCache) -> str:
    """The AP of a network on a split, in words."""
    detector = Detector(network, job.spec, EVALUATION_THRESHOLDS)
    found = detector.detect_cached(cache, max(BATCH_SIZES))
    metrics = evaluate(cache.samples, found, cache.sizes, job.spec.class_names).metrics["coco"]
    return f"AP {metrics['AP']:.4f}, AP50 {metrics['AP50']:.4f}"


def publish(folder: Path, out: Path) -> list[Path]:
    """Put what lies in `folder` into `out`; of several files that belong together never some old and some new."""
    files = sorted(folder.iterdir())
    if len(files) > 1:
        (out / files[-1].name).unlink(missing_ok=True)  # .xml or .weights, without which nobody looks at the others
    for path in files:
        with atomic_write(out / path.name) as file:
            file.write(path.read_bytes())
    return [out / path.name for path in files]


def write(job: Job, name: Format, expected: Sequence[Expected], path: Path) -> tuple[Difference, Network | None]:
    """Write one format, run it; returns how it differs, and what can be measured on a split.

    Raises UserError when it differs by more than rounding, which int8 may.
    """
    WRITERS[name][1](job, path)
    if name == "onnx-nms":
        network, difference = None, compare_detections(job, path, expected)
    else:
        network = open_written(job, path)
        difference = compare(network, expected)
    if not (isfinite(difference.scores) if name == "int8" else difference.tolerable):
        raise UserError(
            f"{path.name} does not find what the checkpoint finds and was not kept: {difference}, and only "
            f"{BOX_TOLERANCE} px and {SCORE_TOLERANCE} are rounding; another version of "
            f"{', '.join(PACKAGES.get(name, ('torch',)))} may do it right"
        )
    return difference, network


def prepare(config: Config) -> tuple[Path, Job]:
    """The checkpoint's path and what is made of it; raises UserError for whatever would fail later."""
    for package in dict.fromkeys(package for name in config.formats for package in PACKAGES.get(name, ())):
        import_runtime(package)
    confidence = None if config.confidence == "auto" else config.confidence
    thresholds = Thresholds(confidence, nms_iou=config.nms_iou, top_k=UNLIMITED, max_detections=UNLIMITED)
    path = find_checkpoint(config.weights)
    checkpoint = load_checkpoint(path)
    if "darknet" in config.formats and checkpoint.spec.phi:
        raise UserError(f"{path} has attention (phi {checkpoint.spec.phi}), which Darknet has not; leave darknet out")
    if not config.images:
        raise UserError("images is empty; name real images, such as those of the test set, to compare the files on")
    calibration = find_images(config.calibration or config.images, CALIBRATED)
    model = checkpoint.build_model(path).eval().requires_grad_(False)
    return path, Job(checkpoint.spec, model, checkpoint.info.get("thresholds", ()), thresholds, calibration)


def main(config: Config) -> dict[str, Difference]:
    """Write the files; returns how much each differs from the checkpoint."""
    path, job = prepare(config)
    images = find_images(config.images, COMPARED)
    expected = expect(job, images)
    cache = None
    if config.sets:
        samples = load_samples(config.devkit, config.sets, job.spec.class_names)
        cache = build_cache(samples, job.spec, torch.device("cpu"))
        print(f"{path} on {', '.join(config.sets)}: {measure(job, job.reference, cache)}")
    out = Path(config.out) if config.out else path.parent / "export"
    make_folder(out)
    sizes = " and ".join("{}x{}".format(*item.images.shape[2:]) for item in expected)
    print(f"compared on {len(images)} images at {sizes}, in batches of {', '.join(map(str, BATCH_SIZES))}")
    differences = {}
    for name in dict.fromkeys(config.formats):
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps what is still open
            difference, network = write(job, name, expected, Path(folder) / f"{path.stem}{WRITERS[name][0]}")
            words = f"; {measure(job, network, cache)}" if cache is not None and network is not None else ""
            files = publish(Path(folder), out)
        print(f"{', '.join(map(str, files))}: {difference}{words}")
        differences[name] = difference
    return differences


if __name__ == "__main__":
    run_script(main, Config)
