"""YOLOv4-tiny: the network, and the specification that rebuilds it exactly."""

import copy
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nets.attention import build_attention
from nets.darknet53_tiny import BasicConv, darknet53_tiny

STRIDES = (32, 16)  # of the heads, P5 first
MOST_CLASSES, MOST_SIDE = 10_000, 8192  # of a network; more would only be a mistake
PLACES = {"feat1": 256, "feat2": 512, "upsample": 128}  # where attention can stand, with its channels
OBJECTS_PER_IMAGE = 8  # the prior that the heads' biases start from, arXiv 1708.02002 section 3.3


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C', 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.Sequential(BasicConv(in_channels, out_channels, 1), nn.Upsample(scale_factor=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(x)


def yolo_head(in_channels: int, hidden_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(BasicConv(in_channels, hidden_channels, 3), nn.Conv2d(hidden_channels, out_channels, 1))


class YoloBody(nn.Module):
    """Image batch (B, 3, H, W) in 0..1 -> raw heads P5 (B, A*(5+C), H/32, W/32) and P4 (B, A*(5+C), H/16, W/16).

    `phi` chooses the attention block (`nets.attention.ATTENTION`), `attention_args` are its arguments, `places` says
    where it stands. With `identity_start` a block enters as x + gain * (block(x) - x) with one learned gain per place
    that begins at 0 (zero-init residual, arXiv 1706.02677), so that every phi equals phi 0 at step 0.
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
        places: tuple[str, ...] = tuple(PLACES),
        identity_start: bool = False,
    ) -> None:
        super().__init__()
        unknown = [place for place in places if place not in PLACES]
        if unknown:
            raise ValueError(f"attention places are {', '.join(PLACES)}, not {', '.join(unknown)}")
        self.backbone = darknet53_tiny(pretrained)
        self.conv_for_P5 = BasicConv(512, 256, 1)
        self.yolo_headP5 = yolo_head(256, 512, len(anchors_mask[0]) * (5 + num_classes))
        self.upsample = Upsample(256, 128)
        self.yolo_headP4 = yolo_head(384, 256, len(anchors_mask[1]) * (5 + num_classes))
        self.attention_gain = nn.ParameterDict()
        for place, channels in PLACES.items():
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


@dataclass(frozen=True)
class ModelSpec:
    """Everything that turns weights into a detector again; stored in each checkpoint."""

    class_names: tuple[str, ...]
    anchors: tuple[tuple[float, float], ...]  # (6, 2) width, height in pixels of the network's input
    anchors_mask: tuple[tuple[int, ...], ...] = ((3, 4, 5), (1, 2, 3))  # per head, P5 first
    phi: int = 0
    attention_args: dict[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = tuple(PLACES)
    identity_start: bool = True
    input_size: tuple[int, int] = (416, 416)  # height, width
    scale_xy: float = 2.0  # centre = sigmoid(t) * scale_xy - (scale_xy - 1) / 2 + cell
    letterbox: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def build(self) -> YoloBody:
        """A network of this specification with fresh weights; raises ValueError as `YoloBody` does."""
        model = YoloBody(
            self.anchors_mask,
            self.num_classes,
            self.phi,
            attention_args=self.attention_args,
            places=self.places,
            identity_start=self.identity_start and self.phi > 0,
        )
        self._set_head_priors(model)
        return model

    def _set_head_priors(self, model: YoloBody) -> None:
        """Start objectness at its expected frequency, so that the first steps are not spent on the background."""
        for head, stride in zip((model.yolo_headP5, model.yolo_headP4), STRIDES, strict=True):
            cells = self.input_size[0] * self.input_size[1] / stride**2
            bias = head[1].bias.detach().view(-1, 5 + self.num_classes)
            bias[:, 4] = log(OBJECTS_PER_IMAGE / cells)
            bias[:, 5:] = log(0.6 / (self.num_classes - 0.99))

    def check(self) -> None:
        """Raise ValueError for what no network can have; TypeError where a value is of another kind."""
        names, sides = self.class_names, [side for anchor in self.anchors for side in anchor]
        if not 0 < len(names) <= MOST_CLASSES or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"class_names must be 1 to {MOST_CLASSES:,} names")
        if (
            not sides
            or {len(anchor) for anchor in self.anchors} != {2}
            or not all(0.1 <= side <= 1e5 for side in sides)
        ):
            raise ValueError("anchors must be pairs of width and height, of 0.1 to 100,000 pixels")
        indices = [index for mask in self.anchors_mask for index in mask]
        if len(self.anchors_mask) != len(STRIDES) or not all(map(len, self.anchors_mask)):
            raise ValueError(f"anchors_mask must have {len(STRIDES)} lists of anchors, one for each head")
        if not all(isinstance(index, int) and 0 <= index < len(self.anchors) for index in indices):
            raise ValueError(f"anchors_mask is {self.anchors_mask}, but there are anchors 0 to {len(self.anchors) - 1}")
        if len(self.input_size) != 2 or not all(side in range(32, MOST_SIDE + 1, 32) for side in self.input_size):
            raise ValueError(
                f"input_size is {self.input_size}, but both sides must be multiples of 32, at most {MOST_SIDE}"
            )
        if not 1 <= self.scale_xy <= 10:
            raise ValueError(f"scale_xy is {self.scale_xy}, but must be between 1 and 10")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelSpec":
        """The inverse of `to_dict`, also after a trip through JSON, checked; raises ValueError or TypeError."""

        def freeze(value: Any) -> Any:
            return tuple(freeze(item) for item in value) if isinstance(value, list) else value

        spec = cls(**{name: freeze(value) for name, value in values.items()})
        spec.check()
        return spec


def summary(model: nn.Module, input_size: tuple[int, int]) -> str:
    """One line: parameters, and GFLOP (two per multiply-add) for one image of (height, width)."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, 3, *input_size, device="meta"))
    gflop = counter.get_total_flops() / 1e9
    return f"{parameters:,} parameters, {gflop:.2f} GFLOP at {input_size[0]}x{input_size[1]}"
