"""Export a checkpoint to other formats, and compare each file with the checkpoint on images:

python tools/export.py --weights logs/RUN/best.safetensors --formats onnx openvino --images photos/

docs/deployment.md describes the formats. Files whose boxes or scores differ from those of the checkpoint are discarded.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

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
from utils.inference.exporters import FORMATS, ExportJob, load_images, open_written
from utils.inference.sources import Images, open_sources
from utils.system.cli import run_script
from utils.system.errors import UserError
from utils.system.files import atomic_write, make_folder
from utils.weights.checkpoint import find_checkpoint, load_checkpoint

MAX_COMPARED = 50  # images
MAX_CALIBRATION = 300  # images for int8, as NNCF recommends
BATCH_SIZES = (1, 3, 8)  # for the comparison
SIZE_CHANGE = (32, 64)  # pixels added to height and width for the second input size
MIN_SCORE = 0.01  # of compared boxes
BOX_TOLERANCE = 0.05  # input pixels
SCORE_TOLERANCE = 1e-4
UNLIMITED = 10**9
MAX_UNMATCHED = 0.01  # fraction of detections that rounding may move across a threshold
Format = Literal[*FORMATS]


@dataclass(frozen=True)
class Config:
    """Export a checkpoint to other formats, and compare each file with the checkpoint on images."""

    weights: str = ""  # checkpoint or run folder; empty: the newest run in logs/
    formats: tuple[Format, ...] = ("onnx",)  # see docs/deployment.md
    out: str = ""  # output folder; empty: export/ next to the checkpoint
    images: tuple[str, ...] = ()  # images for the comparison: files, folders, globs or lists (.txt)
    calibration: tuple[str, ...] = ()  # images to calibrate int8, ideally training images; empty: --images
    devkit: str = "VOCdevkit"  # folder with the datasets
    sets: tuple[str, ...] = ()  # sets to measure the AP of each file on, such as VOC2007/test; empty: none
    confidence: float | Literal["auto"] = "auto"  # minimum confidence in onnx-nms; auto: as suggested by validation
    nms_iou: float = 0.5  # IoU above which onnx-nms suppresses a lower-scoring box of the same class


class Reference(NamedTuple):
    """A batch of images with the outputs of the checkpoint."""

    images: Tensor  # (K, 3, H, W) uint8
    boxes: Tensor  # (K, N, 4)
    scores: Tensor  # (K, N, C)


@dataclass(frozen=True)
class Difference:
    """The largest differences between a file and its checkpoint."""

    boxes: float  # input pixels
    scores: float

    def __str__(self) -> str:
        return f"boxes differ by up to {self.boxes:.2g} px, scores by up to {self.scores:.2g}"

    @property
    def is_tolerable(self) -> bool:
        return self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE  # False for NaN


def run_checkpoint(job: ExportJob, paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> list[Reference]:
    """Run the checkpoint at all input and batch sizes; raises UserError if it detects nothing."""
    references: list[Reference] = []
    for size in sizes:
        images = load_images(paths, job.spec, size)
        outputs = zip(*(job.reference(part) for part in images.split(max(BATCH_SIZES))), strict=True)
        boxes, scores = map(torch.cat, outputs)
        if not references and not (scores > MIN_SCORE).any():
            raise UserError(f"the checkpoint detects nothing in these {len(paths)} images; use other images")
        for batch_size in BATCH_SIZES:
            parts = (values.split(batch_size) for values in (images, boxes, scores))
            references += [Reference(*part) for part in zip(*parts, strict=True)]
    return references


def compare(network: Network, references: Sequence[Reference]) -> Difference:
    """Compare all scores, and all boxes with a score above MIN_SCORE, clipped to the image."""
    largest = torch.zeros(2)
    for batch in references:
        boxes, scores = network.to_boxes(network(batch.images))
        if boxes.shape != batch.boxes.shape or scores.shape != batch.scores.shape:
            return Difference(inf, inf)
        is_scored = batch.scores.amax(dim=-1, keepdim=True) > MIN_SCORE
        height, width = batch.images.shape[2:]
        # rounding moves the edges of boxes that are much larger than the image
        limits = torch.zeros(4), torch.tensor([width, height] * 2)
        shift = boxes.clamp(*limits) - batch.boxes.clamp(*limits)
        differences = torch.where(is_scored, shift, 0), scores - batch.scores
        largest = torch.maximum(largest, torch.stack([values.abs().max() for values in differences]))  # keeps NaN
    return Difference(*largest.tolist())


def compare_detections(job: ExportJob, path: Path, references: Sequence[Reference]) -> Difference:
    """Compare the detections of an ONNX file with NMS; infinite if more than MAX_UNMATCHED have no counterpart."""
    network = OnnxNetwork(path, torch.device("cpu"), torch.float32)
    detector = Detector(job.reference, job.spec, job.thresholds, job.suggested)
    pairs, unmatched = [np.zeros((1, 2))], 0
    for batch in references:
        images = (batch.images.float() / 255).numpy()
        (rows,) = network.session.run(["detections"], {"images": images})
        count, size = len(images), images.shape[2:]
        expected = detector.select((batch.boxes, batch.scores), [Fit(1, 1, 0, 0)] * count, [size] * count)
        for i, detections in enumerate(expected):
            own = rows[rows[:, 0] == i]
            boxes = np.abs(clip_boxes(own[:, None, 1:5], size) - detections.xyxy).max(axis=2)  # (D, E)
            scores = np.abs(own[:, None, 5] - detections.confidence)
            boxes[own[:, None, 6] != detections.class_id] = inf
            is_match = (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE)
            unmatched += (~is_match.any(axis=0)).sum() + (~is_match.any(axis=1)).sum()
            pairs.append(np.stack([boxes[is_match], scores[is_match]], axis=1))
    matched = np.concatenate(pairs)
    if unmatched > MAX_UNMATCHED * len(matched):
        return Difference(inf, inf)
    return Difference(*map(float, matched.max(axis=0)))


def find_images(names: Sequence[str], max_images: int) -> list[Path]:
    """Up to `max_images` image files, evenly spaced among those found."""
    sources = [source for name in names for source in open_sources(name, reconnect_timeout=0)]
    paths = [path for source in sources if isinstance(source, Images) for path in source.paths]
    if not paths:
        raise UserError(f"{', '.join(names)} contains no image files")
    count = min(max_images, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def measure_ap(job: ExportJob, network: Network, cache: ImageCache) -> str:
    detector = Detector(network, job.spec, EVALUATION_THRESHOLDS)
    detections = detector.detect_cached(cache, max(BATCH_SIZES))
    metrics = evaluate(cache.samples, detections, cache.sizes, job.spec.class_names).metrics["coco"]
    return f"AP {metrics['AP']:.4f}, AP50 {metrics['AP50']:.4f}"


def publish(folder: Path, out: Path) -> list[Path]:
    """Copy the files of `folder` to `out`, without ever mixing old and new files that belong together."""
    files = sorted(folder.iterdir())
    if len(files) > 1:
        (out / files[-1].name).unlink(missing_ok=True)  # .xml or .weights, without which the other files are not used
    for path in files:
        with atomic_write(out / path.name) as file:
            file.write(path.read_bytes())
    return [out / path.name for path in files]


def export(job: ExportJob, name: str, references: Sequence[Reference], path: Path) -> tuple[Difference, Network | None]:
    """Write and compare a file; returns the difference and, unless the file contains NMS, the network."""
    FORMATS[name].write(job, path)
    if name == "onnx-nms":
        network, difference = None, compare_detections(job, path, references)
    else:
        network = open_written(job, path)
        difference = compare(network, references)
    if not (isfinite(difference.scores) if name == "int8" else difference.is_tolerable):
        raise UserError(
            f"{path.name} was discarded: {difference} from the checkpoint, but the limits are {BOX_TOLERANCE} "
            f"px and {SCORE_TOLERANCE}; try another version of {', '.join(FORMATS[name].packages or ('torch',))}"
        )
    return difference, network


def load_job(config: Config) -> tuple[Path, ExportJob]:
    """Load the checkpoint; returns its path and the job, and raises UserError for invalid settings."""
    for package in dict.fromkeys(package for name in config.formats for package in FORMATS[name].packages):
        import_runtime(package)
    confidence = None if config.confidence == "auto" else config.confidence
    thresholds = Thresholds(confidence, nms_iou=config.nms_iou, top_k=UNLIMITED, max_detections=UNLIMITED)
    path = find_checkpoint(config.weights)
    checkpoint = load_checkpoint(path)
    if "darknet" in config.formats and checkpoint.spec.phi:
        raise UserError(
            f"Darknet does not support the attention of {path} (phi {checkpoint.spec.phi}); omit darknet from --formats"
        )
    if not config.images:
        raise UserError("images is empty; specify images to compare the files on, such as those of the test set")
    calibration = find_images(config.calibration or config.images, MAX_CALIBRATION)
    model = checkpoint.build_model(path).eval().requires_grad_(False)
    return path, ExportJob(checkpoint.spec, model, checkpoint.info.get("thresholds", ()), thresholds, calibration)


def main(config: Config) -> dict[str, Difference]:
    """Write the files; returns their differences from the checkpoint, by format."""
    path, job = load_job(config)
    images = find_images(config.images, MAX_COMPARED)
    height, width = job.spec.input_size
    sizes = (height, width), (height + SIZE_CHANGE[0], width + SIZE_CHANGE[1])
    references = run_checkpoint(job, images, sizes)
    cache = None
    if config.sets:
        samples = load_samples(config.devkit, config.sets, job.spec.class_names)
        cache = build_cache(samples, job.spec, torch.device("cpu"))
        print(f"{path} on {', '.join(config.sets)}: {measure_ap(job, job.reference, cache)}")
    out = Path(config.out) if config.out else path.parent / "export"
    make_folder(out)
    shown_sizes = " and ".join(f"{height}x{width}" for height, width in sizes)
    print(f"comparing on {len(images)} images at {shown_sizes}, in batches of {', '.join(map(str, BATCH_SIZES))}")
    differences = {}
    for name in dict.fromkeys(config.formats):
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows cannot delete open files
            file = Path(folder) / f"{path.stem}{FORMATS[name].suffix}"
            differences[name], network = export(job, name, references, file)
            ap = f"; {measure_ap(job, network, cache)}" if cache is not None and network is not None else ""
            files = publish(Path(folder), out)
        print(f"{', '.join(map(str, files))}: {differences[name]}{ap}")
    return differences


if __name__ == "__main__":
    run_script(main, Config)
