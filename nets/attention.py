"""Attention blocks. Each takes `channels` first and multiplies a feature (B, C, H, W) by gates.

Class names follow bubbliiiing/yolov4-tiny-pytorch; parameter names follow the published weights.
"""

from abc import ABC, abstractmethod
from inspect import signature
from math import gcd, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ELA_NORM_GROUPS = 16  # groups of ELA's group norm


class AttentionBlock(nn.Module, ABC):
    """Base class: the output is the feature multiplied by its gates, in the feature's dtype."""

    @abstractmethod
    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gates in 0..1 for a feature (B, C, H, W), each broadcastable to its shape."""

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.gates(x):
            x = x * gate.to(x.dtype)  # autocast computes some gates in float32
        return x


class se_block(AttentionBlock):
    """Squeeze-and-Excitation, arXiv 1709.01507: a gate per channel from global average pooling."""

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        hidden = reduced_channels(channels, ratio)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.fc(x.mean(dim=(2, 3)))[:, :, None, None],)  # (B, C, 1, 1)


class ChannelAttention(nn.Module):
    """First half of CBAM: a shared two-layer network on the global average and the global maximum."""

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
    """Second half of CBAM: one convolution over the mean and the maximum across channels."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)  # (B, 2, H, W)
        return self.conv1(maps).sigmoid()  # (B, 1, H, W)


class cbam_block(AttentionBlock):
    """Convolutional Block Attention Module, arXiv 1807.06521: a gate per channel, then one per position."""

    def __init__(self, channels: int, ratio: int = 8, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size not in (3, 7):
            raise ValueError(f"kernel_size of CBAM is {kernel_size}, but must be 3 or 7")
        self.channelattention = ChannelAttention(channels, ratio)
        self.spatialattention = SpatialAttention(kernel_size)

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        channel = self.channelattention(x)
        return channel, self.spatialattention(x * channel)


class eca_block(AttentionBlock):
    """Efficient Channel Attention, arXiv 1910.03151: a 1-D convolution across the channels' global means."""

    def __init__(self, channels: int, b: int = 1, gamma: int = 2) -> None:
        super().__init__()
        kernel_size = eca_kernel_size(channels, b, gamma)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        gate = self.conv(x.mean(dim=(2, 3))[:, None]).sigmoid()  # (B, 1, C)
        return (gate[:, 0, :, None, None],)


class CA_Block(AttentionBlock):
    """Coordinate Attention, arXiv 2103.02907: a gate per channel and row, and one per channel and column."""

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        hidden = reduced_channels(channels, ratio)
        self.conv_1x1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.F_h = nn.Conv2d(hidden, channels, 1, bias=False)
        self.F_w = nn.Conv2d(hidden, channels, 1, bias=False)

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape[2:]
        rows = x.mean(dim=3, keepdim=True)  # (B, C, H, 1)
        columns = x.mean(dim=2, keepdim=True).transpose(2, 3)  # (B, C, W, 1)
        joint = self.bn(self.conv_1x1(torch.cat([rows, columns], dim=2))).relu()  # (B, C/r, H + W, 1)
        rows, columns = joint.split([height, width], dim=2)
        return self.F_h(rows).sigmoid(), self.F_w(columns.transpose(2, 3)).sigmoid()


class SimAM(AttentionBlock):
    """SimAM, PMLR v139 yang21o: a gate per value from its distance to its channel's mean; has no parameters."""

    def __init__(self, channels: int, regularisation: float = 1e-4) -> None:
        super().__init__()
        self.regularisation = regularisation  # lambda of the paper; the name is stored in checkpoints

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        count = x.shape[2] * x.shape[3]
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in float16
        distance = (x - x.mean(dim=(2, 3), keepdim=True)).square()
        # (B, C, 1, 1); a mean, since a sum over a large feature overflows when an exported network runs in float16
        variance = distance.mean(dim=(2, 3), keepdim=True) * (count / max(1, count - 1))
        return ((distance / (4 * (variance + self.regularisation)) + 0.5).sigmoid(),)


class EMAAttention(AttentionBlock):
    """Efficient Multi-Scale Attention, doi 10.1109/ICASSP49357.2023.10096516: a spatial gate for each channel group."""

    def __init__(self, channels: int, factor: int = 32) -> None:
        super().__init__()
        if not 1 <= factor <= channels or channels % factor:
            raise ValueError(f"factor of EMA is {factor}, but must divide the feature's {channels} channels")
        self.factor, width = factor, channels // factor
        self.gn = nn.GroupNorm(width, width)
        self.conv1x1 = nn.Conv2d(width, width, 1)
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1)

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, channels, height, width = x.shape
        groups = x.reshape(batch * self.factor, -1, height, width)  # (B*G, C/G, H, W)
        rows = groups.mean(dim=3, keepdim=True)  # (B*G, C/G, H, 1)
        columns = groups.mean(dim=2, keepdim=True).transpose(2, 3)  # (B*G, C/G, W, 1)
        rows, columns = self.conv1x1(torch.cat([rows, columns], dim=2)).sigmoid().split([height, width], dim=2)
        along = self.gn(groups * rows * columns.transpose(2, 3))
        around = self.conv3x3(groups)
        maps = sum_channels(along, around) + sum_channels(around, along)  # (B*G, 1, H, W)
        gate = maps.sigmoid().view(batch, self.factor, 1, height, width)
        return (gate.expand(-1, -1, channels // self.factor, -1, -1).reshape(x.shape),)


def sum_channels(x: Tensor, other: Tensor) -> Tensor:
    """Sum of x (B, C, H, W) over its channels, weighted by the softmax of the other's global means: (B, 1, H, W)."""
    return (x * other.mean(dim=(2, 3), keepdim=True).softmax(dim=1)).sum(dim=1, keepdim=True)


class ELA(AttentionBlock):
    """Efficient Local Attention, arXiv 2403.01123: a depthwise 1-D convolution along each spatial axis."""

    def __init__(self, channels: int, kernel_size: int = 7) -> None:
        super().__init__()
        check_odd("ELA", kernel_size)
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.gn = nn.GroupNorm(gcd(ELA_NORM_GROUPS, channels), channels)

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, columns = (self.gn(self.conv(x.mean(dim=axis))).sigmoid() for axis in (3, 2))  # (B, C, H), (B, C, W)
        return rows[:, :, :, None], columns[:, :, None]


class MLCA(AttentionBlock):
    """Mixed Local Channel Attention, doi 10.1016/j.engappai.2023.106442: the mean of a global and a 5x5 local ECA."""

    def __init__(self, channels: int, parts: int = 5, b: int = 1, gamma: int = 2) -> None:
        super().__init__()
        if parts < 1:
            raise ValueError(f"parts of MLCA is {parts}, but must be at least 1")
        self.parts = parts
        kernel_size = eca_kernel_size(channels, b, gamma)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.conv_local = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        local = pool_evenly(x, (self.parts, self.parts))  # (B, C, P, P)
        whole = self.conv(local.mean(dim=(2, 3))[:, None]).sigmoid()  # (B, 1, C)
        positions = local.flatten(2).transpose(1, 2)  # (B, P*P, C)
        mixed = self.conv_local(positions.flatten(1)[:, None]).sigmoid()  # (B, 1, P*P*C), across positions too
        local = mixed.view_as(positions).transpose(1, 2).reshape(local.shape)
        gate = (local + whole[:, 0, :, None, None]) / 2
        return (pool_evenly(gate, x.shape[2:]),)


def pool_evenly(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of (B, C, H, W) to `size`, as matrix products: ONNX supports only integer ratios."""
    rows, columns = (pooling_matrix(old, new, x) for old, new in zip(x.shape[2:], size, strict=True))
    return rows @ x @ columns.T


def pooling_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old): row i averages elements floor(i * old / new) up to ceil((i + 1) * old / new)."""
    part, element = (torch.arange(count, device=like.device) for count in (new, old))
    first, end = part * old // new, ((part + 1) * old + new - 1) // new
    inside = ((element >= first[:, None]) & (element < end[:, None])).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


class TripletGate(nn.Module):
    """One convolution over the maximum and the mean along `axis`; the gate has size 1 there."""

    def __init__(self, axis: int, kernel_size: int) -> None:
        super().__init__()
        self.axis = axis
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, self.axis)
        maps = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)
        return self.bn(self.conv(maps)).sigmoid().transpose(1, self.axis)


class TripletAttention(AttentionBlock):
    """Triplet Attention, arXiv 2010.03045: the mean of the gates across height, width and channels."""

    def __init__(self, channels: int, kernel_size: int = 7) -> None:
        super().__init__()
        check_odd("Triplet Attention", kernel_size)
        self.along = nn.ModuleList(TripletGate(axis, kernel_size) for axis in (2, 3, 1))

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width, channels = (gate(x) for gate in self.along)  # (B, C, 1, W), (B, C, H, 1), (B, 1, H, W)
        return ((height + width + channels) / 3,)


def check_odd(name: str, kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size of {name} is {kernel_size}, but must be odd")


def reduced_channels(channels: int, ratio: int) -> int:
    """Channels of a bottleneck; raises ValueError if the ratio leaves none."""
    if not 1 <= ratio <= channels:
        raise ValueError(f"attention ratio is {ratio}, but must be between 1 and the feature's {channels} channels")
    return channels // ratio


def eca_kernel_size(channels: int, b: int, gamma: int) -> int:
    """The odd kernel size of ECA for a number of channels (equation 12 of the paper)."""
    if gamma < 1:
        raise ValueError(f"gamma of ECA is {gamma}, but must be at least 1")
    return int(abs((log2(channels) + b) / gamma)) | 1  # the next odd number if it is even


class AttentionOption(NamedTuple):
    """What a value of `phi` stands for."""

    name: str  # `--phi` accepts this name or the number
    block: type[AttentionBlock] | None


ATTENTION: dict[int, AttentionOption] = {
    0: AttentionOption("none", None),
    1: AttentionOption("se", se_block),
    2: AttentionOption("cbam", cbam_block),
    3: AttentionOption("eca", eca_block),
    4: AttentionOption("ca", CA_Block),
    5: AttentionOption("simam", SimAM),
    6: AttentionOption("ema", EMAAttention),
    7: AttentionOption("ela", ELA),
    8: AttentionOption("mlca", MLCA),
    9: AttentionOption("triplet", TripletAttention),
}


def describe_phi() -> str:
    return ", ".join(f"{phi} ({option.name})" for phi, option in ATTENTION.items())


def parse_phi(text: str) -> int:
    """The phi given by its number or its name; raises ValueError for any other text."""
    for phi, option in ATTENTION.items():
        if text.strip().lower() in (str(phi), option.name):
            return phi
    raise ValueError(f"phi is {text}, but must be one of {describe_phi()}")


def build_attention(phi: int, channels: int, arguments: dict[str, Any]) -> nn.Module | None:
    """The attention block for `phi`, or None for phi 0; raises ValueError for an invalid phi or argument."""
    if phi not in ATTENTION:
        raise ValueError(f"phi is {phi}, but must be one of {describe_phi()}")
    name, block = ATTENTION[phi]
    if block is None:
        if arguments:
            raise ValueError(f"phi 0 has no attention block and takes no arguments, but got {', '.join(arguments)}")
        return None
    known = dict(list(signature(block).parameters.items())[1:])  # after `channels`
    for argument, value in arguments.items():
        if argument not in known:
            raise ValueError(f"phi {phi} ({name}) takes the arguments {', '.join(known)}, not {argument!r}")
        if known[argument].annotation is int and not isinstance(value, int):
            raise ValueError(f"{argument} of phi {phi} ({name}) is {value}, but must be an integer")
    return block(channels, **arguments)
