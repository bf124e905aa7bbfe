"""Attention blocks. Each takes `channels` first and maps (B, C, H, W) to the same shape.

The class names are the ones that users of YOLOv4-tiny know; parameter names match the published weights.
"""

from inspect import signature
from math import log2
from typing import Any

import torch
from torch import Tensor, nn


class se_block(nn.Module):
    """Squeeze-and-Excitation, arXiv 1709.01507: a gate per channel from the global mean."""

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        hidden = reduced_channels(channels, ratio)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(x.mean(dim=(2, 3)))  # (B, C)
        return x * gate[:, :, None, None]


class ChannelAttention(nn.Module):
    """CBAM's first half: one shared two-layer network over the global mean and the global maximum."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = reduced_channels(channels, ratio)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.fc2(self.fc1(x.mean(dim=(2, 3), keepdim=True)).relu())
        peak = self.fc2(self.fc1(x.amax(dim=(2, 3), keepdim=True)).relu())
        return (mean + peak).sigmoid()  # (B, C, 1, 1)


class SpatialAttention(nn.Module):
    """CBAM's second half: one convolution over the mean and the maximum along the channels."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)  # (B, 2, H, W)
        return self.conv1(maps).sigmoid()  # (B, 1, H, W)


class cbam_block(nn.Module):
    """Convolutional Block Attention Module, arXiv 1807.06521: a gate per channel, then one per position."""

    def __init__(self, channels: int, ratio: int = 8, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size not in (3, 7):
            raise ValueError(f"CBAM's kernel_size is 3 or 7, not {kernel_size}")
        self.channelattention = ChannelAttention(channels, ratio)
        self.spatialattention = SpatialAttention(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.channelattention(x)
        return x * self.spatialattention(x)


class eca_block(nn.Module):
    """Efficient Channel Attention, arXiv 1910.03151: a 1-D convolution over the channels' global means."""

    def __init__(self, channels: int, b: int = 1, gamma: int = 2) -> None:
        super().__init__()
        kernel_size = eca_kernel_size(channels, b, gamma)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean(dim=(2, 3))[:, None]).sigmoid()  # (B, 1, C)
        return x * gate[:, 0, :, None, None]


class CA_Block(nn.Module):
    """Coordinate Attention, arXiv 2103.02907: a gate per channel and row, times one per channel and column."""

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        hidden = reduced_channels(channels, ratio)
        self.conv_1x1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.F_h = nn.Conv2d(hidden, channels, 1, bias=False)
        self.F_w = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = x.mean(dim=3, keepdim=True)  # (B, C, H, 1)
        columns = x.mean(dim=2, keepdim=True).transpose(2, 3)  # (B, C, W, 1)
        joint = self.bn(self.conv_1x1(torch.cat([rows, columns], dim=2))).relu()  # (B, C/r, H + W, 1)
        rows, columns = joint.split([height, width], dim=2)
        return x * self.F_h(rows).sigmoid() * self.F_w(columns.transpose(2, 3)).sigmoid()


def reduced_channels(channels: int, ratio: int) -> int:
    """Width of a bottleneck; raises ValueError when the ratio leaves no channel."""
    if not 1 <= ratio <= channels:
        raise ValueError(
            f"attention ratio is {ratio}, but must lie between 1 and the {channels} channels of the feature"
        )
    return channels // ratio


def eca_kernel_size(channels: int, b: int, gamma: int) -> int:
    """ECA's odd kernel size for a number of channels (equation 12 of the paper)."""
    if gamma < 1:
        raise ValueError(f"ECA's gamma is {gamma}, but must be at least 1")
    size = int(abs((log2(channels) + b) / gamma))
    return size if size % 2 else size + 1


ATTENTION: dict[int, type[nn.Module] | None] = {0: None, 1: se_block, 2: cbam_block, 3: eca_block, 4: CA_Block}


def describe_phi() -> str:
    """The valid values of `phi`, for messages: "0 (none), 1 (se_block), ..."."""
    return ", ".join(f"{phi} ({block.__name__ if block else 'none'})" for phi, block in ATTENTION.items())


def build_attention(phi: int, channels: int, arguments: dict[str, Any]) -> nn.Module | None:
    """The block that `phi` stands for, or None for phi 0.

    Raises ValueError for an unknown phi or for arguments that the block does not take.
    """
    if phi not in ATTENTION:
        raise ValueError(f"phi is {phi}, but must be one of {describe_phi()}")
    block = ATTENTION[phi]
    if block is None:
        if arguments:
            raise ValueError(f"phi 0 has no attention block, so it takes no arguments (got {', '.join(arguments)})")
        return None
    known = list(signature(block).parameters)[1:]  # after `channels`
    for name in arguments:
        if name not in known:
            raise ValueError(f"phi {phi} ({block.__name__}) takes {', '.join(known)}, but no argument {name!r}")
    return block(channels, **arguments)
