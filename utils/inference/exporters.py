"""Networks written in the formats of other programs, and opened again: what `tools/export.py` makes its files by."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nets.spec import STRIDES, ModelSpec
from nets.yolo import build_model
from utils.data.image_io import fit_image, read_image
from utils.detection.anchors import decode_heads, head_levels
from utils.detection.nms import MIN_CONFIDENCE, VOTING_SIGMA, Thresholds
from utils.inference.backends import (
    EXPORT_KEY,
    OUTPUTS,
    ExportedNetwork,
    Network,
    fold_batch_norms,
    import_runtime,
    open_exported,
    openvino_core,
)
from utils.inference.detector import Detector
from utils.weights.checkpoint import FORMAT
from utils.weights.darknet import cfg_of, read_darknet, write_darknet

Format = Literal["onnx", "onnx-nms", "openvino", "int8", "torch", "darknet"]
ONNX = ("onnx", "onnxscript", "onnxruntime")
PACKAGES: dict[str, tuple[str, ...]] = {  # that a format needs
    "onnx": ONNX,
    "onnx-nms": ONNX,
    "openvino": ("onnx", "onnxscript", "openvino"),
    "int8": ("onnx", "onnxscript", "openvino", "nncf"),
}
OPSET = 18  # of ONNX; what torch writes without converting, known to every runtime since 2023
MAX_OF_A_CLASS = 1000  # detections in an image, of the ONNX with suppression
SUPPRESS = """
    nms_confident = Greater (scores, nms_least)
    nms_scores = Where (nms_confident, scores, nms_zero)
    nms_by_class = Transpose <perm = [0, 2, 1]> (nms_scores)
    nms_found = NonMaxSuppression (boxes, nms_by_class, nms_most, nms_iou, nms_least_of_all)
    nms_image, nms_class, nms_box = Split <axis = 1, num_outputs = 3> (nms_found)
    nms_place = Concat <axis = 1> (nms_image, nms_box)
    nms_corners = GatherND (boxes, nms_place)
    nms_entry = Concat <axis = 1> (nms_image, nms_box, nms_class)
    nms_score = GatherND (scores, nms_entry)
    nms_column = Unsqueeze (nms_score, nms_axis_1)
"""  # ONNX's text of the first half of `select_detections`
AVERAGE = """
    nms_own_image = Squeeze (nms_image, nms_axis_1)
    nms_near = Gather <axis = 0> (boxes, nms_own_image)
    nms_low, nms_high = Split <axis = 1, num_outputs = 2> (nms_corners)
    nms_near_low, nms_near_high = Split <axis = 2, num_outputs = 2> (nms_near)
    nms_own_low = Unsqueeze (nms_low, nms_axis_1)
    nms_own_high = Unsqueeze (nms_high, nms_axis_1)
    nms_shared_low = Max (nms_own_low, nms_near_low)
    nms_shared_high = Min (nms_own_high, nms_near_high)
    nms_between = Sub (nms_shared_high, nms_shared_low)
    nms_shared_sides = Relu (nms_between)
    nms_own_sides = Sub (nms_own_high, nms_own_low)
    nms_near_sides = Sub (nms_near_high, nms_near_low)
    nms_shared = ReduceProd <keepdims = 0> (nms_shared_sides, nms_axis_2)
    nms_own_area = ReduceProd <keepdims = 0> (nms_own_sides, nms_axis_2)
    nms_near_area = ReduceProd <keepdims = 0> (nms_near_sides, nms_axis_2)
    nms_areas = Add (nms_own_area, nms_near_area)
    nms_union = Sub (nms_areas, nms_shared)
    nms_overlap = Div (nms_shared, nms_union)
    nms_apart = Sub (nms_one, nms_overlap)
    nms_square = Mul (nms_apart, nms_apart)
    nms_exponent = Div (nms_square, nms_minus_spread)
    nms_closeness = Exp (nms_exponent)
    nms_voting = Greater (scores, nms_voting_least)
    nms_votes = Where (nms_voting, scores, nms_zero)
    nms_votes_by_class = Transpose <perm = [0, 2, 1]> (nms_votes)
    nms_image_class = Concat <axis = 1> (nms_image, nms_class)
    nms_near_votes = GatherND (nms_votes_by_class, nms_image_class)
    nms_weights = Mul (nms_near_votes, nms_closeness)
    nms_weights_row = Unsqueeze (nms_weights, nms_axis_1)
    nms_sum_row = MatMul (nms_weights_row, nms_near)
    nms_sum = Squeeze (nms_sum_row, nms_axis_1)
    nms_total = ReduceSum (nms_weights, nms_axis_1)
    nms_mean = Div (nms_sum, nms_total)
    nms_votes_at_all = Greater (nms_total, nms_voting_least)
    nms_confident_box = Greater (nms_column, nms_voting_least)
    nms_has_votes = And (nms_votes_at_all, nms_confident_box)
    nms_averaged = Where (nms_has_votes, nms_mean, nms_corners)
"""  # and of `average_boxes`


def load_images(paths: Sequence[Path], spec: ModelSpec, size: tuple[int, int]) -> Tensor:
    """Image files -> uint8 RGB (K, 3, H, W), fitted as the checkpoint wants them."""
    fitted = [fit_image(read_image(path), size, spec.letterbox)[0] for path in paths]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()


class DecodedModel(nn.Module):
    """What exported networks compute: images (B, 3, H, W) in 0..1 -> boxes (B, N, 4) xyxy, scores (B, N, C)."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.model, self.levels, self.scale_xy = model, head_levels(spec), spec.scale_xy

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode_heads(self.model(images), self.levels, self.scale_xy)


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
            float[1] nms_voting_least = {{{MIN_CONFIDENCE:.9f}}},
            float[1] nms_minus_spread = {{{-VOTING_SIGMA:.9f}}},
            float[1] nms_zero = {{0.0}},
            float[1] nms_one = {{1.0}},
            int64[1] nms_most = {{{MAX_OF_A_CLASS}}},
            int64[1] nms_axis_1 = {{1}},
            int64[1] nms_axis_2 = {{2}}
        > {{
            {SUPPRESS}
            {AVERAGE}
            nms_image_number = Cast <to = 1> (nms_image)
            nms_class_number = Cast <to = 1> (nms_class)
            detections = Concat <axis = 1> (nms_image_number, nms_averaged, nms_column, nms_class_number)
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
        model = build_model(job.spec).eval()
        model.load_state_dict(read_darknet(path, model), strict=False)  # batch norm's counters are not in there
        return ModuleNetwork(DecodedModel(model, job.spec))
    network, _, _ = open_exported(path, torch.device("cpu"), torch.float32)
    return network
