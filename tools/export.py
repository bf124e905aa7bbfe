"""Write a checkpoint for other programs, and compare each file with it on real images:

python tools/export.py --weights logs/RUN/best.safetensors --formats onnx openvino --images photos/

onnx: for ONNX Runtime, OpenCV 5 and TensorRT; onnx-nms: the same with suppression inside; openvino and int8: for
OpenVINO, whole and quantized; torch: for torch.export; darknet: for Darknet and OpenCV 4, phi 0 alone. How each is run
stands in docs/deployment.md. A file that finds other boxes or scores than the checkpoint is not written.
"""

import copy
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.yolo import STRIDES, ModelSpec
from utils.anchors import decode, levels_of
from utils.boxes import Fit, clip_boxes
from utils.cache import ImageCache, build_cache
from utils.checkpoint import FORMAT, find_checkpoint, load_checkpoint
from utils.darknet import cfg_of, read_darknet, write_darknet
from utils.detector import Detector
from utils.errors import UserError, make_folder, run_script
from utils.files import replacing
from utils.images import fit_image, read_image
from utils.metrics import evaluate
from utils.nms import EVALUATION_THRESHOLDS, Thresholds
from utils.runtimes import (
    EXPORT_KEY,
    OUTPUTS,
    ExportedNetwork,
    Network,
    OnnxNetwork,
    fold_batch_norms,
    import_runtime,
    open_exported,
    openvino_core,
)
from utils.sources import Images, open_sources
from utils.voc import load_samples

Format = Literal["onnx", "onnx-nms", "openvino", "int8", "torch", "darknet"]
ONNX = ("onnx", "onnxscript", "onnxruntime")
PACKAGES: dict[str, tuple[str, ...]] = {  # that a format needs
    "onnx": ONNX,
    "onnx-nms": ONNX,
    "openvino": ("onnx", "onnxscript", "openvino"),
    "int8": ("onnx", "onnxscript", "openvino", "nncf"),
}
OPSET = 18  # of ONNX; what torch writes without converting, known to every runtime since 2023
COMPARED = 50  # images at most
CALIBRATED = 300  # images at most for int8, as NNCF suggests
BATCH_SIZES = (1, 3, 8)  # that the images are compared in
OTHER_SIZE = (32, 64)  # pixels by which the other size is higher and wider
LEAST_SCORE = 0.01  # of the boxes that are compared
BOX_TOLERANCE = 0.05  # pixels of the input
SCORE_TOLERANCE = 1e-4
MOST_OF_A_CLASS = 1000  # detections in an image, of the ONNX with suppression
UNLIMITED = 10**9
MOST_ALONE = 0.01  # share of detections that rounding may push over a threshold


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


class DecodedModel(nn.Module):
    """What exported networks compute: images (B, 3, H, W) in 0..1 -> boxes (B, N, 4) xyxy, scores (B, N, C)."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.model, self.levels, self.scale_xy = model, levels_of(spec), spec.scale_xy

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode(self.model(images), self.levels, self.scale_xy)


class ModuleNetwork(ExportedNetwork):
    """A module of that kind in torch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return self.module(images.float() / 255)


@dataclass(frozen=True)
class Job:
    """A checkpoint with what its exports are made of."""

    spec: ModelSpec
    model: nn.Module  # in eval mode, as it was trained
    suggested: Sequence[float]  # confidence of each class
    thresholds: Thresholds  # of the ONNX with suppression
    calibration: Sequence[Path]

    @property
    def about(self) -> str:
        """The metadata that makes an exported file a detector again."""
        return json.dumps({"format": FORMAT, "spec": self.spec.to_dict(), "thresholds": list(self.suggested)})

    @property
    def reference(self) -> Network:
        """The checkpoint itself in fp32, batch norms and all."""
        return ModuleNetwork(DecodedModel(self.model, self.spec))

    @cached_property
    def program(self) -> ExportedProgram:
        """The network with folded batch norms, for any batch and for sides that are multiples of 32."""
        model = DecodedModel(fold_batch_norms(copy.deepcopy(self.model)), self.spec).eval().requires_grad_(False)
        sides = {axis: STRIDES[0] * Dim(name, min=1) for axis, name in ((2, "rows"), (3, "columns"))}
        example = torch.rand(2, 3, 2 * STRIDES[0], 3 * STRIDES[0])  # torch fixes a size of 1, and sizes that are equal
        program = torch.export.export(model, (example,), dynamic_shapes={"images": {0: Dim("batch", min=1)} | sides})
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        return program

    @cached_property
    def onnx(self) -> Any:
        """The program as onnx.ModelProto."""
        proto = torch.onnx.export(
            self.program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(OUTPUTS),
            verbose=False,
        ).model_proto
        name_axes(proto.graph.input[0], ("batch", "", "height", "width"))
        for output in proto.graph.output:
            name_axes(output, ("batch", "boxes", ""))
        for part in (*proto.graph.input, *proto.graph.output, *proto.graph.node):
            del part.metadata_props[:]  # torch's notes to itself
        del proto.graph.value_info[:]  # speaks of the axes by their former names
        import_runtime("onnx").helper.set_model_props(proto, {EXPORT_KEY: self.about})
        return proto

    def open_ir(self) -> Any:
        """The network as openvino.Model."""
        return openvino_core().read_model(self.onnx.SerializeToString())


def name_axes(value: Any, names: Sequence[str]) -> None:
    """Name the free axes of an onnx.ValueInfoProto."""
    for axis, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
        if name:
            axis.dim_param = name


def write_onnx(job: Job, path: Path) -> None:
    path.write_bytes(job.onnx.SerializeToString())


def write_onnx_nms(job: Job, path: Path) -> None:
    """The output `detections` (D, 7) has rows of image index, x1, y1, x2, y2 in input pixels, score, class index."""
    onnx = import_runtime("onnx")
    least = Detector(job.reference, job.spec, job.thresholds, job.suggested).confidences.tolist()
    # Scores below the threshold of their class become 0, so that one threshold does for all
    tail = onnx.parser.parse_graph(f"""
        suppression (float[batch, boxes, 4] boxes, float[batch, boxes, {len(least)}] scores)
        => (float[detections, 7] detections)
        <
            float[{len(least)}] nms_least = {{{", ".join(f"{value:.9f}" for value in least)}}},
            float[1] nms_least_of_all = {{{min(least):.9f}}},
            float[1] nms_iou = {{{job.thresholds.nms_iou:.9f}}},
            float[1] nms_zero = {{0.0}},
            int64[1] nms_most = {{{MOST_OF_A_CLASS}}},
            int64[1] nms_last = {{1}}
        > {{
            nms_confident = Greater (scores, nms_least)
            nms_scores = Where (nms_confident, scores, nms_zero)
            nms_by_class = Transpose <perm = [0, 2, 1]> (nms_scores)
            nms_found = NonMaxSuppression (boxes, nms_by_class, nms_most, nms_iou, nms_least_of_all)
            nms_image, nms_class, nms_box = Split <axis = 1, num_outputs = 3> (nms_found)
            nms_place = Concat <axis = 1> (nms_image, nms_box)
            nms_corners = GatherND (boxes, nms_place)
            nms_entry = Concat <axis = 1> (nms_image, nms_box, nms_class)
            nms_score = GatherND (scores, nms_entry)
            nms_column = Unsqueeze (nms_score, nms_last)
            nms_image_number = Cast <to = 1> (nms_image)
            nms_class_number = Cast <to = 1> (nms_class)
            detections = Concat <axis = 1> (nms_image_number, nms_corners, nms_column, nms_class_number)
        }}
    """)
    proto = copy.deepcopy(job.onnx)
    proto.graph.node.extend(tail.node)
    proto.graph.initializer.extend(tail.initializer)
    del proto.graph.output[:]
    proto.graph.output.extend(tail.output)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def write_openvino(job: Job, path: Path) -> None:
    save_ir(job, job.open_ir(), path)


def save_ir(job: Job, model: Any, path: Path) -> None:
    """The .xml, and the .bin beside it."""
    model.set_rt_info(job.about, [EXPORT_KEY])
    import_runtime("openvino").save_model(model, path, compress_to_fp16=False)


def write_int8(job: Job, path: Path) -> None:
    """8-bit convolutions by NNCF's post-training quantization; the decoding stays as it is."""
    nncf = import_runtime("nncf")
    logging.getLogger("nncf").setLevel(logging.WARNING)

    def load(image: Path) -> dict[str, np.ndarray]:
        return {"images": load_images([image], job.spec, job.spec.input_size).float().numpy() / 255}

    model = job.open_ir()
    quantized = nncf.quantize(
        model,
        nncf.Dataset(job.calibration, load),
        subset_size=len(job.calibration),
        ignored_scope=nncf.IgnoredScope(names=decoding_operations(model), validate=False),
    )
    save_ir(job, quantized, path)


def decoding_operations(model: Any) -> list[str]:
    """Names of the operations of an openvino.Model that come after its last convolutions.

    Quantized as well, they would cost AP (docs/deployment.md): 256 steps are few for coordinates.
    """
    names: set[str] = set()
    waiting = list(model.get_results())
    while waiting:
        node = waiting.pop()
        name, kind = node.get_friendly_name(), node.get_type_name()
        if kind not in ("Convolution", "Constant", "Parameter") and name not in names:
            names.add(name)
            waiting += [source.get_source_output().get_node() for source in node.inputs()]
    return sorted(names)


def write_torch(job: Job, path: Path) -> None:
    torch.export.save(job.program, path, extra_files={EXPORT_KEY: job.about})


def write_darknet_files(job: Job, path: Path) -> None:
    """The .weights with its .cfg, and the names of the classes."""
    write_darknet(path, job.model)
    path.with_suffix(".cfg").write_text(cfg_of(job.spec), encoding="utf-8")
    path.with_suffix(".names").write_text("".join(f"{name}\n" for name in job.spec.class_names), encoding="utf-8")


WRITERS: dict[str, tuple[str, Callable[[Job, Path], None]]] = {  # by format: end of the file's name, and who writes it
    "onnx": (".onnx", write_onnx),
    "onnx-nms": ("-nms.onnx", write_onnx_nms),
    "openvino": (".xml", write_openvino),
    "int8": ("-int8.xml", write_int8),
    "torch": (".pt2", write_torch),
    "darknet": (".weights", write_darknet_files),
}


def open_written(job: Job, path: Path) -> Network:
    """A file that was just written, as its users run it."""
    if path.suffix == ".pt2":
        return ModuleNetwork(torch.export.load(path).module())
    if path.suffix == ".weights":
        model = job.spec.build().eval()
        model.load_state_dict(read_darknet(path, model), strict=False)  # batch norm's counters are not in there
        return ModuleNetwork(DecodedModel(model, job.spec))
    network, _, _ = open_exported(path, torch.device("cpu"), torch.float32)
    return network


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
    if not (expected[0].scores > LEAST_SCORE).any():
        raise UserError(
            f"the checkpoint finds nothing in these {len(paths)} images, which leaves nothing to compare; give images "
            "of what it was trained on"
        )
    return expected


def compare(network: Network, expected: Sequence[Expected]) -> Difference:
    """All scores, and the boxes that have one above LEAST_SCORE, as far as they lie in the image."""
    boxes, scores = [], []
    for batch in (batch for item in expected for batch in item.batches()):
        found_boxes, found_scores = network.decode(network(batch.images))
        if found_boxes.shape != batch.boxes.shape or found_scores.shape != batch.scores.shape:
            return Difference(inf, inf)
        scored = batch.scores.amax(dim=-1, keepdim=True) > LEAST_SCORE
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
    if alone > MOST_ALONE * len(found):
        return Difference(inf, inf)
    return Difference(*map(float, found.max(axis=0)))


def load_images(paths: Sequence[Path], spec: ModelSpec, size: tuple[int, int]) -> Tensor:
    """Image files -> uint8 RGB (K, 3, H, W), fitted as the checkpoint wants them."""
    fitted = [fit_image(read_image(path), size, spec.letterbox)[0] for path in paths]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()


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
        with replacing(out / path.name) as file:
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
