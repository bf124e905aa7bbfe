"""Export formats of `tools/export.py`."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nets.spec import STRIDES, ModelSpec
from nets.yolo import build_model
from utils.data.image_io import fit_image, read_image
from utils.detection.anchors import decode_heads, head_levels
from utils.detection.nms import Thresholds
from utils.inference.backends import (
    EXPORT_KEY,
    OUTPUTS,
    BoxOutputs,
    Network,
    fold_batch_norms,
    import_runtime,
    open_exported,
    openvino_core,
)
from utils.inference.detector import Detector
from utils.weights.checkpoint import FORMAT
from utils.weights.darknet import make_cfg, read_darknet, write_darknet

OPSET = 18  # ONNX opset that torch writes without conversion, supported by all runtimes since 2023


def load_images(paths: Sequence[Path], spec: ModelSpec, size: tuple[int, int]) -> Tensor:
    """Image files -> uint8 RGB (K, 3, H, W), fitted to `size` (height, width) as in training."""
    fitted = [fit_image(read_image(path), size, spec.letterbox)[0] for path in paths]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()


class DecodedModel(nn.Module):
    """The computation of an exported network: images (B, 3, H, W) in 0..1 -> boxes (B, N, 4) xyxy, scores (B, N, C)."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.model, self.levels, self.scale_xy = model, head_levels(spec), spec.scale_xy

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode_heads(self.model(images), self.levels, self.scale_xy)


class ModuleNetwork(BoxOutputs):
    """A `DecodedModel` that runs in PyTorch."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return self.module(images.float() / 255)


@dataclass(frozen=True)
class ExportJob:
    """A checkpoint and its export settings."""

    spec: ModelSpec
    model: nn.Module  # in eval mode, with unfolded batch norms
    suggested: Sequence[float]  # confidence thresholds per class, or empty
    thresholds: Thresholds  # for onnx-nms
    calibration: Sequence[Path]  # images for int8 calibration

    @property
    def metadata(self) -> str:
        """JSON from which `open_exported` restores the detector."""
        return json.dumps({"format": FORMAT, "spec": self.spec.to_dict(), "thresholds": list(self.suggested)})

    @property
    def reference(self) -> Network:
        """The checkpoint in fp32 with unfolded batch norms, as the reference for comparisons."""
        return ModuleNetwork(DecodedModel(self.model, self.spec))

    @cached_property
    def program(self) -> ExportedProgram:
        """The network with folded batch norms, for any batch size and any input size that is a multiple of 32."""
        model = DecodedModel(fold_batch_norms(copy.deepcopy(self.model)), self.spec).eval().requires_grad_(False)
        sides = {axis: STRIDES[0] * Dim(name, min=1) for axis, name in ((2, "rows"), (3, "columns"))}
        example = torch.rand(2, 3, 2 * STRIDES[0], 3 * STRIDES[0])  # torch.export specializes on equal sizes and on 1
        program = torch.export.export(model, (example,), dynamic_shapes={"images": {0: Dim("batch", min=1)} | sides})
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # contains local paths
        return program

    @cached_property
    def onnx(self) -> Any:
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
            del part.metadata_props[:]  # debugging information from torch
        del proto.graph.value_info[:]  # contains the previous names of the axes
        import_runtime("onnx").helper.set_model_props(proto, {EXPORT_KEY: self.metadata})
        return proto

    def to_openvino(self) -> Any:
        return openvino_core().read_model(self.onnx.SerializeToString())


def name_axes(value: Any, names: Sequence[str]) -> None:
    """Name the axes of an onnx.ValueInfoProto, except those with an empty name."""
    for axis, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
        if name:
            axis.dim_param = name


def write_onnx(job: ExportJob, path: Path) -> None:
    path.write_bytes(job.onnx.SerializeToString())


def write_onnx_nms(job: ExportJob, path: Path) -> None:
    """Write a network with NMS, whose output is that of `onnx_nms.build_nms`."""
    from utils.inference.onnx_nms import append_nms  # requires onnxscript

    detector = Detector(job.reference, job.spec, job.thresholds, job.suggested)
    proto = append_nms(job.onnx, detector.min_confidences(), job.thresholds.nms_iou)
    name_axes(proto.graph.output[0], ("detections", ""))
    import_runtime("onnx").checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def write_openvino(job: ExportJob, path: Path) -> None:
    save_openvino(job, job.to_openvino(), path)


def save_openvino(job: ExportJob, model: Any, path: Path) -> None:
    model.set_rt_info(job.metadata, [EXPORT_KEY])
    import_runtime("openvino").save_model(model, path, compress_to_fp16=False)


def write_int8(job: ExportJob, path: Path) -> None:
    """Quantize the convolutions with NNCF's post-training quantization; decoding stays in floating point."""
    nncf = import_runtime("nncf")
    logging.getLogger("nncf").setLevel(logging.WARNING)

    def load(image: Path) -> dict[str, np.ndarray]:
        return {"images": load_images([image], job.spec, job.spec.input_size).float().numpy() / 255}

    model = job.to_openvino()
    quantized = nncf.quantize(
        model,
        nncf.Dataset(job.calibration, load),
        subset_size=len(job.calibration),
        ignored_scope=nncf.IgnoredScope(names=decoding_operations(model), validate=False),
    )
    save_openvino(job, quantized, path)


def decoding_operations(model: Any) -> list[str]:
    """Names of the operations after the last convolutions, not quantized: 8 bits are too coarse for coordinates."""
    names: set[str] = set()
    waiting = list(model.get_results())
    while waiting:
        node = waiting.pop()
        name, kind = node.get_friendly_name(), node.get_type_name()
        if kind not in ("Convolution", "Constant", "Parameter") and name not in names:
            names.add(name)
            waiting += [source.get_source_output().get_node() for source in node.inputs()]
    return sorted(names)


def write_torch(job: ExportJob, path: Path) -> None:
    torch.export.save(job.program, path, extra_files={EXPORT_KEY: job.metadata})


def write_darknet_files(job: ExportJob, path: Path) -> None:
    """Write a .weights file, a .cfg file and the class names."""
    write_darknet(path, job.model)
    path.with_suffix(".cfg").write_text(make_cfg(job.spec), encoding="utf-8")
    path.with_suffix(".names").write_text("".join(f"{name}\n" for name in job.spec.class_names), encoding="utf-8")


class ExportFormat(NamedTuple):
    suffix: str  # end of the file name
    write: Callable[[ExportJob, Path], None]
    packages: tuple[str, ...] = ()  # optional packages that it requires


ONNX = ("onnx", "onnxscript")
FORMATS = {
    "onnx": ExportFormat(".onnx", write_onnx, (*ONNX, "onnxruntime")),
    "onnx-nms": ExportFormat("-nms.onnx", write_onnx_nms, (*ONNX, "onnxruntime")),
    "openvino": ExportFormat(".xml", write_openvino, (*ONNX, "openvino")),
    "int8": ExportFormat("-int8.xml", write_int8, (*ONNX, "openvino", "nncf")),
    "torch": ExportFormat(".pt2", write_torch),
    "darknet": ExportFormat(".weights", write_darknet_files),
}


def open_written(job: ExportJob, path: Path) -> Network:
    """Open an exported file as its users do, to compare it with the checkpoint."""
    if path.suffix == ".pt2":
        return ModuleNetwork(torch.export.load(path).module())
    if path.suffix == ".weights":
        model = build_model(job.spec).eval()
        model.load_state_dict(read_darknet(path, model), strict=False)  # batch norm counters are not stored
        return ModuleNetwork(DecodedModel(model, job.spec))
    network, _, _ = open_exported(path, torch.device("cpu"), torch.float32)
    return network
