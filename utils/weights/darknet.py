"""Darknet's file formats: `.weights`, and the `.cfg` that describes the network to Darknet and OpenCV.

A `.weights` file (AlexeyAB/darknet, `load_weights_upto` in src/parser.c) is little-endian: int32 major, minor and
revision; `seen`, the number of images trained on, as int64 or in old files int32; then for each convolution, in the
order of the cfg, float32 beta, gamma, running mean and variance of its batch norm, or its bias; then its weights.
"""

import os
import struct
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nets.darknet53_tiny import BasicConv
from nets.spec import MAX_CLASSES, ModelSpec
from nets.yolo import YoloBody
from utils.system.errors import UserError
from utils.system.files import atomic_write

VERSION = (0, 2, 5)  # written by current versions of Darknet
MAX_SEEN = 10**12  # images; a larger number means that the header is damaged
PARTS = ("backbone", "conv_for_P5", "yolo_headP5", "upsample", "yolo_headP4")  # modules in the order of the file
START = 17  # number of convolutions in yolov4-tiny.conv.29, the first 29 layers of the cfg
ANCHORS_PER_HEAD = 3

Layer = dict[str, torch.Size]  # names and shapes of one convolution's tensors, in the order of the file


def list_layers(model: nn.Module) -> list[Layer]:
    """The convolutions of a YoloBody in the order of the file, without attention."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    layers = []
    for part in PARTS:
        for name, module in model.get_submodule(part).named_modules(prefix=part):
            if isinstance(module, BasicConv):
                tensors = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var", "conv.weight")
            elif isinstance(module, nn.Conv2d) and not name.endswith(".conv"):
                tensors = ("bias", "weight")
            else:
                continue
            layers.append({f"{name}.{tensor}": shapes[f"{name}.{tensor}"] for tensor in tensors})
    return layers


@cache
def standard_layers(num_classes: int) -> list[Layer]:
    """The convolutions of Darknet's yolov4-tiny for a number of classes."""
    with torch.device("meta"):
        return list_layers(YoloBody([[0] * ANCHORS_PER_HEAD] * 2, num_classes))


def count_floats(layers: Sequence[Layer]) -> int:
    return sum(prod(shape) for layer in layers for shape in layer.values())


def read_darknet(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read parameters, named as in `YoloBody`, from a `.weights` file; raises UserError unless it fits `model`.

    Without a model, the file's size determines the number of classes, or shows that the network is partial.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"there is no weights file {path}")
    try:
        with open(path, "rb") as file:
            header = header_size(path, file.read(20))
        size = path.stat().st_size
        layers = infer_layers(path, size, header) if model is None else list_layers(model)
        if size != (expected := header + 4 * count_floats(layers)):
            raise UserError(f"{path} has {size:,} bytes, but this network takes {expected:,}")
        values = torch.from_numpy(np.fromfile(path, "<f4", count_floats(layers), offset=header).astype(np.float32))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    tensors = [(name, shape) for layer in layers for name, shape in layer.items()]
    parts = values.split([prod(shape) for _, shape in tensors])
    weights = {name: part.view(shape) for (name, shape), part in zip(tensors, parts, strict=True)}
    for name, value in weights.items():
        if name.endswith("running_var") and not (value >= 0).all():
            raise UserError(f"{path} is damaged, or contains another network: {name} has negative variances")
    return weights


def header_size(path: Path, content: bytes) -> int:
    """The number of bytes before the first float in a file that starts with `content`."""
    if len(content) < 20:
        raise UserError(f"{path} is truncated within its header, or is not a Darknet file")
    major, minor, revision = struct.unpack_from("<3i", content)
    wide = major * 10 + minor >= 2 and major < 1000 and minor < 1000  # Darknet's rule for a 64-bit `seen`
    (seen,) = struct.unpack_from("<q" if wide else "<i", content, 12)
    if min(major, minor, revision) < 0 or not 0 <= seen <= MAX_SEEN:
        version = f"{major}.{minor}.{revision}"
        raise UserError(f"{path} is damaged or not from Darknet: its header gives version {version} and {seen} images")
    return 20 if wide else 16


def infer_layers(path: Path, size: int, header: int) -> list[Layer]:
    """The convolutions in a file of `size` bytes: a partial network, or a complete one for some number of classes."""
    start, none, one = standard_layers(1)[:START], count_floats(standard_layers(0)), count_floats(standard_layers(1))
    if size == header + 4 * count_floats(start):
        return start
    classes, rest = divmod(size - header - 4 * none, 4 * (one - none))
    if rest or not 1 <= classes <= MAX_CLASSES:
        reason = "is truncated, has extra bytes, or contains another network"
        raise UserError(f"{path} {reason}: {size:,} bytes fit no number of classes of YOLOv4-tiny")
    return standard_layers(classes)


def write_darknet(path: str | Path, model: nn.Module) -> None:
    """Write a `.weights` file atomically; raises UserError for a network with attention."""
    values = model.state_dict()
    names = [name for layer in list_layers(model) for name in layer]
    other = [name for name in values if name not in names and not name.endswith("num_batches_tracked")]
    if other:
        raise UserError(f"Darknet does not support attention such as {other[0]}; use another format, or phi 0")
    with atomic_write(path) as file:
        file.write(struct.pack("<3iq", *VERSION, 0))
        for name in names:
            file.write(values[name].detach().cpu().numpy().astype("<f4").tobytes())


def make_cfg(spec: ModelSpec) -> str:
    """The `.cfg` of a network without attention, for prediction."""
    height, width = spec.input_size
    sections = [section("net", batch=1, subdivisions=1, width=width, height=height, channels=3)]
    sections += [convolution(32, 3, stride=2), convolution(64, 3, stride=2)]
    for channels in (64, 128, 256):
        sections += [
            convolution(channels, 3),
            section("route", layers=-1, groups=2, group_id=1),
            convolution(channels // 2, 3),
            convolution(channels // 2, 3),
            section("route", layers="-1,-2"),
            convolution(channels, 1),
            section("route", layers="-6,-1"),
            section("maxpool", size=2, stride=2),
        ]
    sections += [convolution(512, 3), convolution(256, 1), convolution(512, 3), *head(spec, 0)]
    sections += [section("route", layers=-4), convolution(128, 1), section("upsample", stride=2)]
    feat1 = 23  # index of the layer in the cfg
    sections += [section("route", layers=f"-1,{feat1}"), convolution(256, 3), *head(spec, 1)]
    return "\n".join(sections)


def section(kind: str, **settings: object) -> str:
    return f"[{kind}]\n" + "".join(f"{name}={value}\n" for name, value in settings.items())


def convolution(filters: int, size: int, stride: int = 1) -> str:
    return section(
        "convolutional", batch_normalize=1, filters=filters, size=size, stride=stride, pad=1, activation="leaky"
    )


def head(spec: ModelSpec, index: int) -> list[str]:
    """The last convolution of a head, and the layer that decodes its output."""
    mask = spec.anchors_mask[index]
    filters = len(mask) * (5 + spec.num_classes)
    return [
        section("convolutional", filters=filters, size=1, stride=1, pad=1, activation="linear"),
        section(
            "yolo",
            mask=",".join(map(str, mask)),
            anchors=", ".join(f"{width:.8g},{height:.8g}" for width, height in spec.anchors),
            classes=spec.num_classes,
            num=len(spec.anchors),
            scale_x_y=spec.scale_xy,
        ),
    ]
