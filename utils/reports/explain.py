"""Explanations of predictions: attention maps, objectness maps, and class activation maps (Grad-CAM)."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import NamedTuple

import numpy as np
import supervision as sv
import torch
from torch import Tensor, nn

from nets.attention import AttentionBlock
from nets.spec import ATTENTION_PLACES
from nets.yolo import YoloBody, read_gains
from utils.detection.anchors import decode_head, head_levels, reshape_head
from utils.detection.boxes import batched_iou
from utils.detection.letterbox import Fit
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.system.errors import UserError

HEADS = ("P5", "P4")
STRIDE_16 = "stride 16"  # the input of the last CSP block, whose resolution shows parts of an object
MAX_EXPLAINED = 4  # maximum number of detections with a Grad-CAM map, the highest-scoring ones


class AttentionMaps(NamedTuple):
    """The effect of an attention block on features (B, C, H, W)."""

    features: Tensor  # the block's input
    gates: tuple[Tensor, ...]  # in 0..1, broadcastable to the features
    gain: float | None  # learned gain of the identity start, initially 0; None without identity start

    @property
    def has_spatial(self) -> bool:
        return any(gate.shape[2:].numel() > 1 for gate in self.gates)

    @property
    def has_channel(self) -> bool:
        """Whether a gate differs between channels but not between positions."""
        return any(gate.shape[1] > 1 and gate.shape[2:].numel() == 1 for gate in self.gates)

    @property
    def gate(self) -> Tensor:
        return reduce(mul, self.gates)

    @property
    def factor(self) -> Tensor:
        """The factor that multiplies the features: x + gain * (x * gate - x) = x * (1 + gain * (gate - 1))."""
        return self.gate if self.gain is None else 1 + self.gain * (self.gate - 1)


class DetectionMaps(NamedTuple):
    """Evidence for a detection; the maximum of each map is 1."""

    detection: int  # index of the detection
    head: str  # the head that predicted it
    grad_cam: Tensor  # (H, W) at the head: evidence for all similar objects
    evidence: Tensor  # (H/16, W/16): evidence for this detection alone


@dataclass(frozen=True)
class Explanation:
    """Maps of one image at the resolution of the network; `project_to_image` resamples them."""

    fit: Fit  # transform from the image to the network input
    input_size: tuple[int, int]
    attention: dict[str, AttentionMaps]  # by place
    objectness: dict[str, Tensor]  # by head, (H, W) in 0..1, of the best anchor
    detections: list[DetectionMaps]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All maps as arrays by name, for an .npz file."""
        tensors = {f"objectness/{head}": cells for head, cells in self.objectness.items()}
        for place, maps in self.attention.items():
            tensors |= {f"gate/{place}/{i}": gate[0] for i, gate in enumerate(maps.gates)}
            tensors |= {f"features/{place}": maps.features[0]}
            if maps.gain is not None:
                tensors[f"gain/{place}"] = torch.tensor(maps.gain)
        for maps in self.detections:
            tensors |= {f"grad_cam/{maps.detection}/{maps.head}": maps.grad_cam}
            tensors |= {f"evidence/{maps.detection}": maps.evidence}
        arrays = {name: values.float().cpu().numpy() for name, values in tensors.items()}
        return arrays | {"fit": np.array(self.fit), "input_size": np.array(self.input_size)}


class Explainer:
    """Computes explanations for a detector that runs a checkpoint in eager mode."""

    def __init__(self, detector: Detector) -> None:
        if type(detector.network) is not TorchNetwork:
            raise UserError(
                "--explain reads the layers of a checkpoint, so it does not support exported networks, --compile and "
                "--tta; pass a .safetensors file written by train.py, and leave out --compile and --tta"
            )
        self.detector = detector
        self.model = copy.deepcopy(detector.network.model).float()
        self.levels = head_levels(detector.spec, detector.network.device)

    def explain(self, image: np.ndarray, detections: sv.Detections) -> Explanation:
        """Explain the detections, in descending order of score, of a uint8 RGB image (H, W, 3)."""
        prepared = self.detector.prepare([image])
        fit, model = prepared.fits[0], self.model
        pixels = prepared.images.to(self.detector.network.device).float() / 255
        attention = compute_attention(model, pixels)
        layers = {"P5": model.yolo_headP5, "P4": model.yolo_headP4, STRIDE_16: model.backbone.resblock_body3}
        with torch.enable_grad(), capture_inputs(layers) as features:
            outputs = model(pixels.requires_grad_())
        heads = {
            name: reshape_head(output, len(level.anchors))
            for name, output, level in zip(HEADS, outputs, self.levels, strict=True)
        }
        objectness = {name: raw[0, ..., 4].detach().sigmoid().amax(dim=0) for name, raw in heads.items()}
        maps = []
        boxes = torch.from_numpy(fit.to_input(detections.xyxy[:MAX_EXPLAINED])).to(pixels.device)
        for number, (box, label) in enumerate(zip(boxes, detections.class_id, strict=False)):
            head, index = self.find_prediction(outputs, box, int(label))
            logits = heads[head].flatten(1, 3)[0, index, 4:]  # (1 + C,)
            score = logits[0] + logits[1 + label]  # objectness and class
            at_head, earlier = torch.autograd.grad(score, [features[head], features[STRIDE_16]], retain_graph=True)
            grad_cam = compute_cam(features[head], at_head.mean(dim=(2, 3), keepdim=True))
            maps.append(DetectionMaps(number, head, grad_cam, compute_cam(features[STRIDE_16], earlier)))
        return Explanation(fit, self.detector.spec.input_size, attention, objectness, maps)

    @torch.no_grad()
    def find_prediction(self, outputs: Sequence[Tensor], box: Tensor, label: int) -> tuple[str, int]:
        """The head, and the index in it, of the prediction behind a box (4,) in input pixels and its label."""
        best = []
        for head, output, level in zip(HEADS, outputs, self.levels, strict=True):
            boxes, logits = decode_head(output, level, self.detector.spec.scale_xy)
            scores = logits[0, :, 0].sigmoid() * logits[0, :, 1 + label].sigmoid()
            value, index = (batched_iou(boxes, box[None, None])[0, :, 0] * scores).max(dim=0)
            best.append((float(value), head, int(index)))
        return max(best)[1:]


@contextmanager
def capture_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that receives the input of each module's last call, by name."""
    captured: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: captured.update({name: inputs[0]}))
        for name, module in modules.items()
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def compute_attention(model: YoloBody, pixels: Tensor) -> dict[str, AttentionMaps]:
    """The attention maps, by place, of a network in eval mode for a batch (B, 3, H, W) in 0..1."""
    blocks: dict[str, AttentionBlock] = {
        place: getattr(model, f"{place}_att") for place in ATTENTION_PLACES if hasattr(model, f"{place}_att")
    }
    with capture_inputs(blocks) as features:
        model(pixels)
    gains = read_gains(model)
    return {
        place: AttentionMaps(features[place], block.gates(features[place]), gains.get(place))
        for place, block in blocks.items()
    }


def compute_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """A class activation map (H, W), at most 1, from features (1, C, H, W) and the gradient of a score.

    The mean gradient of each channel gives Grad-CAM (arXiv 1610.02391), which responds to all similar objects; the full
    gradient gives HiResCAM (arXiv 2011.08891), which responds to one object only. Negative evidence is set to 0.
    """
    cells = (features.detach() * gradient).sum(dim=1)[0].relu()
    return cells / cells.max().clamp(min=torch.finfo(cells.dtype).tiny)
