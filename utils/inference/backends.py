"""What runs a network: torch, or for exported ones ONNX Runtime and OpenVINO. Each turns images into raw outputs."""

import copy
import json
import sys
from collections.abc import Sequence
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
from utils.detection.anchors import decode, head_levels
from utils.system.device import choose_precision
from utils.system.errors import UserError
from utils.system.text import show
from utils.weights.checkpoint import FORMAT

EXPORTED = (".onnx", ".xml")  # suffixes of networks that tools/export.py writes and other runtimes run
EXPORT_KEY = "yolov4-tiny"  # of the JSON in their metadata: format, spec, thresholds
OUTPUTS = ("boxes", "scores")  # names of what an exported network gives
REQUIREMENTS = "requirements-export.txt"


class Network(Protocol):
    """A network on its device."""

    device: torch.device
    dtype: torch.dtype  # of its arithmetic, where the file does not say another

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """uint8 RGB (B, 3, H, W) at the input size -> its raw outputs."""

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Raw outputs -> boxes (B, N, 4) xyxy in input pixels and class scores (B, N, C)."""


class TorchNetwork:
    """A copy of a model whose batch norms are folded into the convolutions, channels-last, in precision `dtype`.

    Its outputs are the raw heads.
    """

    def __init__(
        self, model: nn.Module, spec: ModelSpec, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.device, self.dtype = device, dtype
        self.levels, self.scale_xy = head_levels(spec, device), spec.scale_xy
        model = fold_batch_norms(copy.deepcopy(model).eval()).requires_grad_(False)
        self.model = model.to(device, dtype).to(memory_format=torch.channels_last)

    @torch.no_grad()  # torch.compile's freezing does not know inference_mode
    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        images = images.to(self.device)
        return self.model(images.to(self.dtype, memory_format=torch.channels_last) / 255)

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return decode(outputs, self.levels, self.scale_xy)


class CompiledNetwork(TorchNetwork):
    """The same through torch.compile, from pixels to boxes and scores.

    It is compiled at the first images, which takes some seconds; smaller batches later are filled up to that size.
    Without CUDA graphs, which work in one thread only.
    """

    def __init__(
        self, model: nn.Module, spec: ModelSpec, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(model, spec, device, dtype)
        self.batch_size = 0
        self.compiled = torch.compile(self.run, dynamic=False)

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().decode(super().__call__(images))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        count = len(images)
        self.batch_size = max(self.batch_size, count)
        if count < self.batch_size:
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch._inductor.config.patch(freezing=True):  # weights are constants, in the convolutions' own layout
            return [values[:count] for values in self.compiled(images)]

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        boxes, scores = outputs
        return boxes, scores


class FlippedNetwork:
    """Another network on each image and on its mirror image; the boxes of both are candidates."""

    def __init__(self, network: Network) -> None:
        self.network, self.width = network, 0
        self.device, self.dtype = network.device, network.dtype

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        self.width = images.shape[-1]
        outputs = self.network(torch.cat([images, images.flip(-1)]))
        return [torch.stack(output.chunk(2)) for output in outputs]  # (2, B, ...)

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        boxes, scores = self.network.decode([output[0] for output in outputs])
        others, other_scores = self.network.decode([output[1] for output in outputs])
        x1, y1, x2, y2 = others.unbind(-1)
        others = torch.stack([self.width - x2, y1, self.width - x1, y2], dim=-1)
        return torch.cat([boxes, others], dim=1), torch.cat([scores, other_scores], dim=1)


class ExportedNetwork:
    """What exported networks share: float input in 0..1 on the CPU, boxes and scores as outputs."""

    device, dtype = torch.device("cpu"), torch.float32

    @staticmethod
    def to_input(images: Tensor) -> np.ndarray:
        """By NumPy, since torch's threads would keep the cores for a while."""
        return np.multiply(images.numpy(), np.float32(1 / 255), order="C")

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        boxes, scores = outputs
        return boxes, scores


class OnnxNetwork(ExportedNetwork):
    """An ONNX file in ONNX Runtime, on a GPU where that is asked for."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            raise UserError(f"{path} runs in its own precision; leave --precision at fp32")
        ort = import_runtime("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise UserError("this ONNX Runtime has no CUDA; install onnxruntime-gpu, or use --device cpu")
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self.session = ort.InferenceSession(path, options, providers)
        except Exception as error:  # onnxruntime's own types, which have no common ancestor
            raise UserError(f"{path} is no ONNX file that ONNX Runtime can read: {first_line(error)}") from None
        self.metadata = self.session.get_modelmeta().custom_metadata_map.get(EXPORT_KEY, "")
        self.outputs = tuple(output.name for output in self.session.get_outputs())

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        found = self.session.run(OUTPUTS, {"images": self.to_input(images)})
        return [torch.from_numpy(values) for values in found]


class OpenVinoNetwork(ExportedNetwork):
    """OpenVINO's .xml, with its .bin beside it, on the CPU."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cpu":
            raise UserError(f"{path} is for OpenVINO, which runs on the CPU here; use --device cpu")
        self.core, self.dtype = openvino_core(), dtype
        try:
            self.model = self.core.read_model(path)
        except RuntimeError as error:
            raise UserError(f"{path} is no network that OpenVINO can read: {first_line(error)}") from None
        self.metadata = self.model.get_rt_info([EXPORT_KEY]).value if self.model.has_rt_info([EXPORT_KEY]) else ""
        self.outputs = tuple(output.any_name for output in self.model.outputs)
        self.requests: dict[tuple[int, ...], Any] = {}  # by shape of the input, since a fixed one is faster

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
    """What the precision `name` means for a network's file: "auto" leaves an ONNX file its own."""
    return torch.float32 if name == "auto" and path.suffix == ".onnx" else choose_precision(name, device)


def open_exported(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Network, ModelSpec, list[float]]:
    """A network that tools/export.py wrote, its specification, and the suggested threshold of each class.

    Raises UserError when the file is none, or its runtime is not installed.
    """
    if not path.is_file():
        raise UserError(f"there is no network {path}; correct the path, or write it with tools/export.py")
    network = (OnnxNetwork if path.suffix == ".onnx" else OpenVinoNetwork)(path, device, dtype)
    try:
        about = json.loads(network.metadata)
        known = about["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path} was not written by this version of tools/export.py; export the checkpoint again")
    if set(network.outputs) != set(OUTPUTS):
        raise UserError(f"{path} has NMS within, for other programs; give the one without")
    try:
        return network, ModelSpec.from_dict(about["spec"]), about["thresholds"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} describes no network that can be: {show(error)}") from None


@cache
def openvino_core() -> Any:
    """The one openvino.Core of this process.

    Each leaves a stack for signals behind: where a second one outlives the first, the next signal ends the process.
    """
    return import_runtime("openvino").Core()


def import_runtime(name: str) -> ModuleType:
    """An optional package; raises UserError that says how to get it."""
    sys.modules["openvino_telemetry"] = None  # with it, OpenVINO and NNCF tell Intel when they are used
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be used ({error}); install it with pip install -r {REQUIREMENTS}") from None


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Fold each block's batch norm into its convolution, in place; the outputs stay the same in eval mode."""
    for module in model.modules():
        if isinstance(module, BasicConv):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return model
