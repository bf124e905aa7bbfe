"""Darknet's files: `.weights` to read and to write, and the `.cfg` that describes the network to Darknet and OpenCV.

A `.weights` file (AlexeyAB/darknet, `load_weights_upto` of src/parser.c) is little endian: int32 major, minor and
revision; `seen`, the images trained on, as int64 or in old files int32; then float32, convolution by convolution in the
order of the cfg: with batch norm its beta, gamma, running mean and variance, else its bias; then its weights.
"""

import os
import struct
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
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

VERSION = (0, 2, 5)  # that Darknet writes today
MAX_SEEN = 10**12  # images; no training saw more
PARTS = ("backbone", "conv_for_P5", "yolo_headP5", "upsample", "yolo_headP4")  # of the network, in the file's order
START = 17  # convolutions in yolov4-tiny.conv.29: of its 30 layers the first 29
ANCHORS_PER_HEAD = 3
COCO_CLASSES = 80

Layer = dict[str, torch.Size]  # the tensors of one convolution, in the file's order


def layers_of(model: nn.Module) -> list[Layer]:
    """The convolutions of a YoloBody in the file's order, attention left out."""
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
def layers_for(num_classes: int) -> list[Layer]:
    """The convolutions of Darknet's own yolov4-tiny with so many classes."""
    with torch.device("meta"):
        return layers_of(YoloBody([[0] * ANCHORS_PER_HEAD] * 2, num_classes))


def count(layers: Sequence[Layer]) -> int:
    """The floats of some convolutions."""
    return sum(prod(shape) for layer in layers for shape in layer.values())


def read_darknet(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Parameters by our names from a `.weights` file, which must be exactly those of `model`.

    Without one the number of classes follows from the size of the file, and it may be the start of a network that
    `yolov4-tiny.conv.29` is. Raises UserError for any other size, before anything is read, and for what is no
    Darknet file.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"there is no weights file {path}")
    try:
        with open(path, "rb") as file:
            header = header_size(path, file.read(20))
        size = path.stat().st_size
        layers = fitting_layers(path, size, header) if model is None else layers_of(model)
        if model is not None:
            expect_size(path, size, header, layers)
        values = torch.from_numpy(np.fromfile(path, "<f4", count(layers), offset=header).astype(np.float32))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    tensors = [(name, shape) for layer in layers for name, shape in layer.items()]
    parts = values.split([prod(shape) for _, shape in tensors])
    weights = {name: part.view(shape) for (name, shape), part in zip(tensors, parts, strict=True)}
    for name, value in weights.items():
        if name.endswith("running_var") and not (value >= 0).all():
            raise UserError(f"{path} is damaged, or of another network: the variances of {name} must not be negative")
    return weights


def header_size(path: Path, content: bytes) -> int:
    """Bytes before the first float, of a file that begins with `content`."""
    if len(content) < 20:
        raise UserError(f"{path} is cut off within its header, or is no Darknet file")
    major, minor, revision = struct.unpack_from("<3i", content)
    wide = major * 10 + minor >= 2 and major < 1000 and minor < 1000  # Darknet's own rule
    (seen,) = struct.unpack_from("<q" if wide else "<i", content, 12)
    if min(major, minor, revision) < 0 or not 0 <= seen <= MAX_SEEN:
        raise UserError(
            f"{path} is no Darknet file, or damaged: its header says version {major}.{minor}.{revision}, trained on "
            f"{seen} images"
        )
    return 20 if wide else 16


def fitting_layers(path: Path, size: int, header: int) -> list[Layer]:
    """The convolutions in a file of `size` bytes: the start of a network, or all for some number of classes."""
    start, none, one = layers_for(1)[:START], count(layers_for(0)), count(layers_for(1))
    if size == header + 4 * count(start):
        return start
    classes, rest = divmod(size - header - 4 * none, 4 * (one - none))
    if rest or not 1 <= classes <= MAX_CLASSES:
        coco = header + 4 * count(layers_for(COCO_CLASSES))
        raise UserError(
            f"{path} has {size:,} bytes, but YOLOv4-tiny has {coco:,} with {COCO_CLASSES} classes, "
            f"{4 * (one - none):,} more or less with each class, and as a start of {START} convolutions "
            f"{header + 4 * count(start):,}; it is cut off, has something behind its end, or is another network"
        )
    return layers_for(classes)


def expect_size(path: Path, size: int, header: int, layers: Sequence[Layer]) -> None:
    """Raise UserError that says what is wrong when the file's size is not that of the network."""
    ends = [header + 4 * floats for floats in accumulate(count([layer]) for layer in layers)]
    if size == ends[START - 1]:
        raise UserError(
            f"{path} ends after {START} convolutions: it is a start to train from, with train.py --weights, and no "
            "network to predict with"
        )
    if size < ends[-1]:
        inside = sum(end <= size for end in ends) + 1
        raise UserError(
            f"{path} is cut off, or made for fewer classes: it has {size:,} bytes of {ends[-1]:,}, and ends within "
            f"convolution {inside} of {len(ends)}"
        )
    if size > ends[-1]:
        raise UserError(
            f"{path} has {size - ends[-1]:,} bytes more than the {ends[-1]:,} of this network; it has something behind "
            "its end, or was made for more classes"
        )


def write_darknet(path: str | Path, model: nn.Module) -> None:
    """Write a `.weights` file, whole or not at all; raises UserError for a network with attention."""
    values = model.state_dict()
    names = [name for layer in layers_of(model) for name in layer]
    left = [name for name in values if name not in names and not name.endswith("num_batches_tracked")]
    if left:
        raise UserError(f"Darknet has no place for attention such as {left[0]}; export another format, or train phi 0")
    with atomic_write(path) as file:
        file.write(struct.pack("<3iq", *VERSION, 0))
        for name in names:
            file.write(values[name].detach().cpu().numpy().astype("<f4").tobytes())


def cfg_of(spec: ModelSpec) -> str:
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
    inner = 23  # number of the third block's inner feature
    sections += [section("route", layers=f"-1,{inner}"), convolution(256, 3), *head(spec, 1)]
    return "\n".join(sections)


def section(kind: str, **settings: object) -> str:
    return f"[{kind}]\n" + "".join(f"{name}={value}\n" for name, value in settings.items())


def convolution(filters: int, size: int, stride: int = 1) -> str:
    return section(
        "convolutional", batch_normalize=1, filters=filters, size=size, stride=stride, pad=1, activation="leaky"
    )


def head(spec: ModelSpec, index: int) -> list[str]:
    """The last convolution of a head, and the layer that decodes it."""
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
