"""The backbone of YOLOv4-tiny: CSPDarknet53-tiny (arXiv 2011.08036, AlexeyAB/darknet `yolov4-tiny.cfg`)."""

from pathlib import Path

import torch
from torch import Tensor, nn

LEAKY_SLOPE = 0.1  # Darknet's `activation=leaky`
BACKBONE_WEIGHTS = Path("model_data/CSPdarknet53_tiny_backbone_weights.pth")


class BasicConv(nn.Module):
    """Convolution without bias, batch norm and leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels)
        self.activation = nn.LeakyReLU(LEAKY_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class ResblockBody(nn.Module):
    """Cross-stage partial block: half the channels pass through two convolutions; then all are concatenated and pooled.

    (B, C, H, W) -> the pooled output (B, 2C, H/2, W/2) and the feature before pooling (B, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = BasicConv(channels, channels, 3)
        self.conv2 = BasicConv(channels // 2, channels // 2, 3)
        self.conv3 = BasicConv(channels // 2, channels // 2, 3)
        self.conv4 = BasicConv(channels, channels, 1)
        self.maxpool = nn.MaxPool2d(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.conv1(x)
        inner = self.conv2(whole.chunk(2, dim=1)[1])  # (B, C/2, H, W): Darknet's `groups=2 group_id=1`
        feature = self.conv4(torch.cat([self.conv3(inner), inner], dim=1))  # (B, C, H, W)
        return self.maxpool(torch.cat([whole, feature], dim=1)), feature


class CSPDarkNet(nn.Module):
    """Image (B, 3, H, W) -> feat1 (B, 256, H/16, W/16) and feat2 (B, 512, H/32, W/32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = BasicConv(3, 32, 3, stride=2)
        self.conv2 = BasicConv(32, 64, 3, stride=2)
        self.resblock_body1 = ResblockBody(64)
        self.resblock_body2 = ResblockBody(128)
        self.resblock_body3 = ResblockBody(256)
        self.conv3 = BasicConv(512, 512, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv2(self.conv1(x))  # /4
        x, _ = self.resblock_body1(x)  # /8
        x, _ = self.resblock_body2(x)  # /16
        x, feat1 = self.resblock_body3(x)  # /32, and the feature before pooling at /16
        return feat1, self.conv3(x)


def darknet53_tiny(pretrained: bool = False) -> CSPDarkNet:
    """The backbone, with the published ImageNet weights if `pretrained`; raises FileNotFoundError if missing."""
    model = CSPDarkNet()
    if pretrained:
        if not BACKBONE_WEIGHTS.is_file():
            raise FileNotFoundError(f"{BACKBONE_WEIGHTS} does not exist; copy the published backbone weights there")
        model.load_state_dict(torch.load(BACKBONE_WEIGHTS, map_location="cpu", weights_only=True))
    return model
