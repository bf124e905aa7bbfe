"""What a network looks at: the gates of its attention, its objectness, and what made it find a box (Grad-CAM)."""

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
from nets.yolo import YoloBody
from utils.detection.anchors import decode_head, head_levels, reshape_head
from utils.detection.boxes import batched_iou
from utils.detection.letterbox import Fit
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.system.errors import UserError

HEADS = ("P5", "P4")
EARLIER = "stride 16"  # the input of the last CSP block, fine enough to show parts of an object
MAX_CAUSES = 4  # detections, the best ones, that Grad-CAM explains


class Attended(NamedTuple):
    """What the attention block at one place did to a batch of features (B, C, H, W)."""

    features: Tensor  # that came to it
    gates: tuple[Tensor, ...]  # of its own, each 1 or the features' size along every axis
    gain: float | None  # the learned gain of the identity start, which begins at 0; None for a plain gate

    @property
    def has_spatial(self) -> bool:
        """Whether a gate differs between positions."""
        return any(gate.shape[2:].numel() > 1 for gate in self.gates)

    @property
    def has_channel(self) -> bool:
        """Whether a gate is one of channels alone, the same at all positions."""
        return any(gate.shape[1] > 1 and gate.shape[2:].numel() == 1 for gate in self.gates)

    @property
    def gate(self) -> Tensor:
        """The product of the gates, in 0..1."""
        return reduce(mul, self.gates)

    @property
    def factor(self) -> Tensor:
        """What the features were multiplied by: x + gain * (x * gate - x) is x * (1 + gain * (gate - 1))."""
        return self.gate if self.gain is None else 1 + self.gain * (self.gate - 1)


class Cause(NamedTuple):
    """Where the evidence for a detection lies; the greatest value of each map is 1."""

    detection: int  # its number
    head: str  # that found it
    grad_cam: Tensor  # (H, W): where this head sees what speaks for such a detection
    evidence: Tensor  # (H/16, W/16): what spoke for this detection alone


@dataclass(frozen=True)
class Explanation:
    """Maps of one image, in the cells of the network; `utils.detection.boxes.project_to_image` lays them over the image."""

    fit: Fit  # how the image lies in the network's input
    input_size: tuple[int, int]
    attention: dict[str, Attended]  # by place
    objectness: dict[str, Tensor]  # by head, (H, W) in 0..1, of the likeliest anchor
    causes: list[Cause]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name."""
        tensors = {f"objectness/{head}": cells for head, cells in self.objectness.items()}
        for place, attended in self.attention.items():
            tensors |= {f"gate/{place}/{i}": gate[0] for i, gate in enumerate(attended.gates)}
            tensors |= {f"features/{place}": attended.features[0]}
            if attended.gain is not None:
                tensors[f"gain/{place}"] = torch.tensor(attended.gain)
        for cause in self.causes:
            tensors |= {f"grad_cam/{cause.detection}/{cause.head}": cause.grad_cam}
            tensors |= {f"evidence/{cause.detection}": cause.evidence}
        arrays = {name: values.float().cpu().numpy() for name, values in tensors.items()}
        return arrays | {"fit": np.array(self.fit), "input_size": np.array(self.input_size)}


class Explainer:
    """Explains what a detector finds; for one whose network is a checkpoint's, run by torch as it is."""

    def __init__(self, detector: Detector) -> None:
        if type(detector.network) is not TorchNetwork:
            raise UserError(
                "explain looks into the layers of a checkpoint, which exported, compiled and mirrored networks do not "
                "show; give a .safetensors of train.py, and leave out --compile and --flip"
            )
        self.detector = detector
        self.model = copy.deepcopy(detector.network.model).float()
        self.levels = head_levels(detector.spec, detector.network.device)

    def __call__(self, image: np.ndarray, detections: sv.Detections) -> Explanation:
        """Of a uint8 RGB image (H, W, 3) and what was found on it, best first."""
        prepared = self.detector.prepare([image])
        fit, model = prepared.fits[0], self.model
        pixels = prepared.images.to(self.detector.network.device).float() / 255
        attention = attend(model, pixels)
        layers = {"P5": model.yolo_headP5, "P4": model.yolo_headP4, EARLIER: model.backbone.resblock_body3}
        with torch.enable_grad(), kept_inputs(layers) as features:
            outputs = model(pixels.requires_grad_())
        heads = {
            name: reshape_head(output, len(level.anchors))
            for name, output, level in zip(HEADS, outputs, self.levels, strict=True)
        }
        objectness = {name: raw[0, ..., 4].detach().sigmoid().amax(dim=0) for name, raw in heads.items()}
        causes = []
        boxes = torch.from_numpy(fit.to_input(detections.xyxy[:MAX_CAUSES])).to(pixels.device)
        for number, (box, label) in enumerate(zip(boxes, detections.class_id, strict=False)):
            head, index = self.find_cell(outputs, box, int(label))
            logits = heads[head].flatten(1, 3)[0, index, 4:]  # (1 + C,)
            said = logits[0] + logits[1 + label]  # that there is an object, and of this class
            own, earlier = torch.autograd.grad(said, [features[head], features[EARLIER]], retain_graph=True)
            grad_cam = weigh(features[head], own.mean(dim=(2, 3), keepdim=True))
            causes.append(Cause(number, head, grad_cam, weigh(features[EARLIER], earlier)))
        return Explanation(fit, self.detector.spec.input_size, attention, objectness, causes)

    @torch.no_grad()
    def find_cell(self, outputs: Sequence[Tensor], box: Tensor, label: int) -> tuple[str, int]:
        """The head, and which of its predictions, that gave a box (4,) of the network's input with this label."""
        best = []
        for head, output, level in zip(HEADS, outputs, self.levels, strict=True):
            boxes, logits = decode_head(output, level, self.detector.spec.scale_xy)
            scores = logits[0, :, 0].sigmoid() * logits[0, :, 1 + label].sigmoid()
            value, index = (batched_iou(boxes, box[None, None])[0, :, 0] * scores).max(dim=0)
            best.append((float(value), head, int(index)))
        return max(best)[1:]


@contextmanager
def kept_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While entered, the dict holds under the name of each module the input of its last call."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, inputs: tuple[Tensor, ...]) -> None:
        kept[name] = inputs[0]

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs))
        for name, module in modules.items()
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attend(model: YoloBody, pixels: Tensor) -> dict[str, Attended]:
    """Run a network in evaluation mode on a batch (B, 3, H, W) in 0..1: what its attention did, by place."""
    blocks: dict[str, AttentionBlock] = {
        place: getattr(model, f"{place}_att") for place in ATTENTION_PLACES if hasattr(model, f"{place}_att")
    }
    with kept_inputs(blocks) as features:
        model(pixels)
    gains = gains_of(model)
    return {
        place: Attended(features[place], block.gates(features[place]), gains.get(place))
        for place, block in blocks.items()
    }


def gains_of(model: YoloBody) -> dict[str, float]:
    """The learned gain of each place that has one; at 0 its attention is off."""
    return {place: float(gain) for place, gain in model.attention_gain.items()}


def weigh(features: Tensor, gradient: Tensor) -> Tensor:
    """Where features (1, C, H, W) speak for what the gradient, of each or of each channel, is of: (H, W), at most 1.

    With a channel's mean gradient it is Grad-CAM (arXiv 1610.02391), which also finds the like elsewhere; with the
    gradient itself HiResCAM (arXiv 2011.08891), which shows this one alone. What speaks against it is cut off.
    """
    cells = (features.detach() * gradient).sum(dim=1)[0].relu()
    return cells / cells.max().clamp(min=torch.finfo(cells.dtype).tiny)
