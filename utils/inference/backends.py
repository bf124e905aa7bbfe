"""Inference backends: PyTorch for checkpoints, ONNX Runtime and OpenVINO for exported networks."""

import copy
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nets.darknet53_tiny import BasicConv
from nets.spec import ModelSpec
from utils.detection.anchors import decode_heads, head_levels
from utils.system.device import choose_precision, explain_failed_compile, is_out_of_memory, to_device
from utils.system.errors import UserError
from utils.system.text import printable
from utils.weights.checkpoint import FORMAT

EXPORTED = (".onnx", ".xml")  # suffixes of supported exported networks
EXPORT_KEY = "yolov4-tiny"  # metadata entry with JSON: format, spec, thresholds
OUTPUTS = ("boxes", "scores")  # output names of an exported network
REQUIREMENTS = "requirements-export.txt"


class Network(Protocol):
    """A network on its device."""

    device: torch.device  # where inputs and outputs live
    dtype: torch.dtype  # precision of the computation, unless the file determines it

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """uint8 RGB (B, 3, H, W) -> raw outputs, for `to_boxes`."""

    def to_boxes(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Raw outputs -> boxes (B, N, 4) xyxy in input pixels and class scores (B, N, C)."""


class BoxOutputs:
    """Mixin for networks that output boxes and scores."""

    def to_boxes(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        boxes, scores = outputs
        return boxes, scores


class TorchNetwork:
    """A copy of a model in channels-last format, with folded batch norms; its outputs are the raw heads."""

    def __init__(
        self, model: nn.Module, spec: ModelSpec, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.device, self.dtype = device, dtype
        self.levels, self.scale_xy = head_levels(spec, device), spec.scale_xy
        model = fold_batch_norms(copy.deepcopy(model).eval()).requires_grad_(False)
        self.model = model.to(device, dtype).to(memory_format=torch.channels_last)

    @torch.no_grad()  # not inference_mode, which freezing in torch.compile does not support
    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        images = to_device(images, self.device)
        return self.model(images.to(self.dtype, memory_format=torch.channels_last) / 255)

    def to_boxes(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return decode_heads(outputs, self.levels, self.scale_xy)


class CompiledNetwork(BoxOutputs):
    """A `TorchNetwork` compiled with torch.compile, from pixels to boxes and scores.

    The first call compiles, which takes several seconds. If compilation fails, UserError is raised if it is `required`;
    otherwise, the network runs without it. Smaller batches are padded to the largest size so far. CUDA graphs are not
    used, since they are bound to one thread.
    """

    def __init__(self, network: TorchNetwork, required: bool = False) -> None:
        self.network, self.device, self.dtype, self.required = network, network.device, network.dtype, required
        self.compiled = torch.compile(self.run_eagerly, dynamic=False)
        self.batch_size = 0  # largest so far

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        count = len(images)
        self.batch_size = max(self.batch_size, count)
        if count < self.batch_size:
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        images = to_device(images, self.device).contiguous(memory_format=torch.channels_last)
        try:
            with torch._inductor.config.patch(freezing=True):  # treats the weights as constants, and prepacks them
                outputs = self.compiled(images)
        except Exception as error:  # compilation can fail anywhere in torch, Triton or the C compiler
            if self.compiled == self.run_eagerly or is_out_of_memory(error):
                raise
            self.compiled = self.run_eagerly
            outputs = self.compiled(images)  # fails again if there is another reason
            explain_failed_compile(error, self.required)
        return [values[:count] for values in outputs]

    def run_eagerly(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.to_boxes(self.network(images))


class FlippedNetwork(BoxOutputs):
    """Test-time augmentation: concatenates the boxes and scores of each image and its mirror image."""

    def __init__(self, network: Network) -> None:
        self.network, self.device, self.dtype = network, network.device, network.dtype

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        outputs = self.network(torch.cat([images, images.flip(-1)]))
        parts = zip(*(output.chunk(2) for output in outputs), strict=True)
        (boxes, scores), (flipped, flipped_scores) = map(self.network.to_boxes, parts)
        x1, y1, x2, y2 = flipped.unbind(-1)
        width = images.shape[-1]
        flipped = torch.stack([width - x2, y1, width - x1, y2], dim=-1)
        return torch.cat([boxes, flipped], dim=1), torch.cat([scores, flipped_scores], dim=1)


class ExportedNetwork(BoxOutputs):
    """Base class of exported networks; their inputs and outputs live on the CPU, even if they run on a GPU."""

    device, dtype = torch.device("cpu"), torch.float32
    metadata: str  # JSON stored under EXPORT_KEY, or empty
    outputs: tuple[str, ...]  # names of the outputs in the file

    @staticmethod
    def to_input(images: Tensor) -> np.ndarray:
        """uint8 images -> floats in 0..1."""
        return np.multiply(images.numpy(), np.float32(1 / 255), order="C")  # torch's threads would slow the runtime


class OnnxNetwork(ExportedNetwork):
    """An ONNX file in ONNX Runtime, on the CPU or a GPU."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            raise UserError(f"{path} has a fixed precision; leave --precision at auto or fp32")
        ort = import_runtime("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise UserError(
                    "this build of ONNX Runtime does not support CUDA; install onnxruntime-gpu, or use --device cpu"
                )
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self.session = ort.InferenceSession(path, options, providers)
        except Exception as error:  # the exceptions of onnxruntime have no common base class
            raise UserError(f"{path} is not an ONNX file that ONNX Runtime can read: {first_line(error)}") from None
        self.metadata = self.session.get_modelmeta().custom_metadata_map.get(EXPORT_KEY, "")
        self.outputs = tuple(output.name for output in self.session.get_outputs())

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        found = self.session.run(OUTPUTS, {"images": self.to_input(images)})
        return [torch.from_numpy(values) for values in found]


class OpenVinoNetwork(ExportedNetwork):
    """An OpenVINO .xml file, with the .bin file beside it, on the CPU."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cpu":
            raise UserError(f"{path} is an OpenVINO network, which runs on the CPU only; use --device cpu")
        self.core, self.dtype = openvino_core(), dtype
        try:
            self.model = self.core.read_model(path)
        except RuntimeError as error:
            raise UserError(f"{path} is not a network that OpenVINO can read: {first_line(error)}") from None
        self.metadata = self.model.get_rt_info([EXPORT_KEY]).value if self.model.has_rt_info([EXPORT_KEY]) else ""
        self.outputs = tuple(output.any_name for output in self.model.outputs)
        self.requests: dict[tuple[int, ...], Any] = {}  # one per input shape: fixed shapes are faster

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        shape = tuple(images.shape)
        if shape not in self.requests:
            model = self.model.clone()
            model.reshape(list(shape))
            settings = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == torch.bfloat16 else "f32",
            }
            self.requests[shape] = self.core.compile_model(model, "CPU", settings).create_infer_request()
        found = self.requests[shape].infer([self.to_input(images)], share_inputs=True)
        return [torch.from_numpy(found[name]) for name in OUTPUTS]


def precision_for(path: Path, name: str, device: torch.device) -> torch.dtype:
    """The dtype for a precision setting; "auto" is fp32 for ONNX files."""
    return torch.float32 if name == "auto" and path.suffix == ".onnx" else choose_precision(name, device)


def open_exported(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Network, ModelSpec, list[float]]:
    """Open an exported network; returns it, its spec and the suggested confidences (C,); raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; correct the path, or create the file with tools/export.py")
    network = (OnnxNetwork if path.suffix == ".onnx" else OpenVinoNetwork)(path, device, dtype)
    about = None
    with suppress(ValueError):
        about = json.loads(network.metadata)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this version of tools/export.py; export the checkpoint again")
    if set(network.outputs) != set(OUTPUTS):
        raise UserError(f"{path} contains NMS and is for use in other programs; use the file without -nms")
    try:
        return network, ModelSpec.from_dict(about["spec"]), about["thresholds"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} has an invalid model specification: {printable(error)}") from None


@cache
def openvino_core() -> Any:
    """The only openvino.Core of this process: with a second one, a signal can crash the process."""
    return import_runtime("openvino").Core()


def import_runtime(name: str) -> ModuleType:
    """Import an optional package; raises UserError with the command that installs it."""
    if name.startswith(("openvino", "nncf")):
        sys.modules["openvino_telemetry"] = None  # disables their telemetry
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not available ({error}); install it with pip install -r {REQUIREMENTS}") from None


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Fold each batch norm into the preceding convolution, in place, for use in eval mode."""
    for module in model.modules():
        if isinstance(module, BasicConv):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return model
