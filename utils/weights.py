"""Weights to start training from: our own checkpoints, published `.pth` files, and Darknet's `.weights`."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.checkpoint import load_checkpoint
from utils.darknet import read_darknet
from utils.errors import UserError

GAIN = "attention_gain."
TOLD = 8  # names in a line
COUNTER = "num_batches_tracked"  # of batch norms; nothing depends on it
DARKNET = re.compile(r"\.(weights|conv\.\d+)$")  # the ends of names that Darknet gives

# CBAM comes with two namings in the wild; ours is the second of each pair
RENAMED = (
    (".channelattention.fc.0.", ".channelattention.fc1."),
    (".channelattention.fc.2.", ".channelattention.fc2."),
    (".spatialattention.conv.", ".spatialattention.conv1."),
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Parameters by name from a checkpoint, a `.pth`, `.weights` or `.conv.29` file, by the end of its name.

    A `.pth` is read without running anything that it may contain. Raises UserError when the file is not what its name
    says, or has NaN or Inf.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        weights = load_checkpoint(path).weights
    elif DARKNET.search(path.name):
        weights = read_darknet(path)
    else:
        weights = read_state_dict(path)
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} holds numbers that are not finite, in {', '.join(broken[:3])}")
    return weights


def read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no weights file {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file leads the unpickler into errors of any type
        raise UserError(
            f"{path} is damaged, or holds more than weights, which could run code; give a file that was written by "
            "torch.save(model.state_dict(), path)"
        ) from None
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} does not hold a state dict, that is tensors by name")
    return {standard_name(name): value for name, value in loaded.items()}


def standard_name(name: str) -> str:
    """A parameter's name without the prefix of DataParallel and in our naming."""
    name = name.removeprefix("module.")
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def fits_plain_attention(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights fill the model's attention blocks and were trained with their plain gate, without gains."""
    blocks = {name: value.shape for name, value in model.state_dict().items() if "_att." in name}
    fit = all(name in weights and weights[name].shape == shape for name, shape in blocks.items())
    return bool(blocks) and fit and not any(name.startswith(GAIN) for name in weights)


def start_from(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> str:
    """Copy every parameter whose name and shape fit, and say in one line what did not.

    The gain of an attention block is taken only with its block. Raises UserError when nothing fits.
    """
    own = model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    for name in [name for name in fitting if name.startswith(GAIN)]:
        block = f"{name.removeprefix(GAIN)}_att."
        if any(other.startswith(block) and other not in fitting for other in own):
            del fitting[name]
    if not fitting:
        raise UserError(f"{source}: no parameter fits this network; is it YOLOv4-tiny?")
    model.load_state_dict(fitting, strict=False)
    left = sorted(name for name in own if name not in fitting and not name.endswith(COUNTER))
    line = f"{source}: {len(fitting)} of {len(own)} tensors taken"
    return line + (f"; fresh: {', '.join(left)}" if left else "")


def fill(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> list[str]:
    """Give a network all its parameters; returns lines that say what was loaded, and what not and why.

    Raises UserError, after which the network is useless, unless every parameter is there in its shape.
    """
    own, given = (
        {name: tuple(value.shape) for name, value in tensors.items() if not name.endswith(COUNTER)}
        for tensors in (model.state_dict(), weights)
    )
    missing = [name for name in own if name not in given]
    differing = [name for name in own if given.get(name, own[name]) != own[name]]
    misshapen = [f"{name} {given[name]} instead of {own[name]}" for name in differing]
    unknown = [name for name in given if name not in own]
    lines = [f"{len(own.keys() & given.keys()) - len(misshapen)} of {len(own)} tensors loaded"]
    for reason, names in (
        ("missing in the file", missing),
        ("of another shape", misshapen),
        ("not loaded, since this network has none of that name", unknown),
    ):
        if names:
            more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
            lines.append(f"{reason}: {', '.join(names[:TOLD])}{more}")
    if missing or misshapen:
        raise UserError(f"{source} does not fill the network: {'; '.join(lines)}")
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)
    return lines
