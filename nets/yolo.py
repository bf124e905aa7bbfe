"""YOLOv4-tiny: backbone, optional attention blocks, neck and two heads."""

import copy
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nets.attention import build_attention
from nets.darknet53_tiny import BasicConv, darknet53_tiny
from nets.spec import ATTENTION_PLACES, STRIDES, ModelSpec

OBJECTS_PER_IMAGE = 8  # prior for the initial bias of the objectness outputs, arXiv 1708.02002 section 3.3
CLASS_PRIOR = 0.6  # divided by the number of classes - 0.99: initial bias of the class outputs


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C', 2H, 2W), in the input's dtype."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.Sequential(BasicConv(in_channels, out_channels, 1), nn.Upsample(scale_factor=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(x).to(x.dtype)  # CUDA autocast runs nn.Upsample in float32


def yolo_head(in_channels: int, hidden_channels: int, out_channels: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, out_channels, H, W)."""
    return nn.Sequential(BasicConv(in_channels, hidden_channels, 3), nn.Conv2d(hidden_channels, out_channels, 1))


class YoloBody(nn.Module):
    """Image batch (B, 3, H, W) in 0..1 -> raw heads P5 (B, A*(5+C), H/32, W/32) and P4 (B, A*(5+C), H/16, W/16).

    `phi` selects the attention block (see `nets.attention.ATTENTION`), `attention_args` are its arguments, and `places`
    are the features it is applied to. With `identity_start` the block contributes x + gain * (block(x) - x), with one
    learned gain per place that starts at 0 (zero-init residual, arXiv 1706.02677), so every phi initially equals phi 0.
    Raises ValueError for an unknown phi or place.
    """

    def __init__(
        self,
        anchors_mask: list[list[int]] | tuple[tuple[int, ...], ...],
        num_classes: int,
        phi: int = 0,
        pretrained: bool = False,
        *,
        attention_args: dict[str, Any] | None = None,
        places: tuple[str, ...] = tuple(ATTENTION_PLACES),
        identity_start: bool = False,
    ) -> None:
        super().__init__()
        unknown = [place for place in places if place not in ATTENTION_PLACES]
        if unknown or (phi and not places):
            wrong = ", ".join(unknown) or "empty"
            raise ValueError(f"places is {wrong}, but must be one or more of {', '.join(ATTENTION_PLACES)}")
        self.backbone = darknet53_tiny(pretrained)
        self.conv_for_P5 = BasicConv(512, 256, 1)
        self.yolo_headP5 = yolo_head(256, 512, len(anchors_mask[0]) * (5 + num_classes))
        self.upsample = Upsample(256, 128)
        self.yolo_headP4 = yolo_head(384, 256, len(anchors_mask[1]) * (5 + num_classes))
        self.attention_gain = nn.ParameterDict()
        # created last, so that phi does not change how the other layers are initialized
        for place, channels in ATTENTION_PLACES.items():
            block = build_attention(phi, channels, attention_args or {})
            if block is not None and place in places:
                self.add_module(f"{place}_att", block)
                if identity_start:
                    self.attention_gain[place] = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feat1, feat2 = self.backbone(x)
        feat1 = self.attend("feat1", feat1)
        p5 = self.conv_for_P5(self.attend("feat2", feat2))  # (B, 256, H/32, W/32)
        upsampled = self.attend("upsample", self.upsample(p5))  # (B, 128, H/16, W/16)
        return self.yolo_headP5(p5), self.yolo_headP4(torch.cat([upsampled, feat1], dim=1))

    def attend(self, place: str, x: Tensor) -> Tensor:
        block = getattr(self, f"{place}_att", None)
        if block is None:
            return x
        if place not in self.attention_gain:
            return block(x)
        return x + self.attention_gain[place].to(x.dtype) * (block(x) - x)


def build_model(spec: ModelSpec) -> YoloBody:
    """A network with newly initialized weights; raises ValueError as `YoloBody` does."""
    model = YoloBody(
        spec.anchors_mask,
        spec.num_classes,
        spec.phi,
        attention_args=spec.attention_args,
        places=spec.places,
        identity_start=spec.identity_start and spec.phi > 0,
    )
    set_head_priors(model, spec)
    return model


def set_head_priors(model: YoloBody, spec: ModelSpec) -> None:
    """Start objectness at its expected frequency, so that the first steps are not spent on the background."""
    for head, stride in zip((model.yolo_headP5, model.yolo_headP4), STRIDES, strict=True):
        cells = spec.input_size[0] * spec.input_size[1] / stride**2
        bias = head[1].bias.detach().view(-1, 5 + spec.num_classes)
        bias[:, 4] = log(OBJECTS_PER_IMAGE / cells)
        bias[:, 5:] = log(CLASS_PRIOR / (spec.num_classes - 0.99))


def read_gains(model: YoloBody) -> dict[str, float]:
    """The learned gain of each block with identity start, by place; 0 disables the attention."""
    return {place: float(gain) for place, gain in model.attention_gain.items()}


def count_cost(model: nn.Module, input_size: tuple[int, int]) -> tuple[int, float]:
    """Number of parameters, and GFLOP (two per multiply-add) for one image of (height, width)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, 3, *input_size, device="meta"))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 1e9
