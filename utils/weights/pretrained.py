"""Weights to start training from: our own checkpoints, published `.pth` files, and Darknet's `.weights`."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError
from utils.system.files import check_regular_file
from utils.system.text import show
from utils.weights.checkpoint import MAX_BYTES, load_checkpoint
from utils.weights.darknet import read_darknet

GAIN = "attention_gain."
TOLD = 8  # names in a line
MAX_SEARCHED = 1000  # letters of a message of torch.load
COUNTER = "num_batches_tracked"  # of batch norms; nothing depends on it
TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64}  # of parameters
PARALLEL = "module."  # what DataParallel puts before a name
DARKNET = re.compile(r"\.(weights|conv\.\d+)$")  # the ends of names that Darknet gives

# CBAM comes with two namings in the wild; ours is the second of each pair
RENAMED = (
    (".channelattention.fc.0.", ".channelattention.fc1."),
    (".channelattention.fc.2.", ".channelattention.fc2."),
    (".spatialattention.conv.", ".spatialattention.conv1."),
)


def read_weights(path: str | Path, diagnostics: Diagnostics | None = None) -> dict[str, Tensor]:
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
        weights = read_state_dict(path, diagnostics or Diagnostics())
    odd = [name for name, value in weights.items() if not is_plain(value)]
    if odd:
        raise UserError(f"{path} holds tensors that are sparse, quantized or not all there, such as {show(odd[0])}")
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} holds numbers that are not finite, in {show(', '.join(broken[:3]), 200)}")
    return weights


def read_state_dict(path: Path, diagnostics: Diagnostics) -> dict[str, Tensor]:
    if not os.path.isfile(path):
        raise UserError(f"there is no weights file {path}")
    check_regular_file(path, MAX_BYTES)
    check_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"), short_searches():  # of what a damaged file seems to hold
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file leads the unpickler into errors of any type
        raise UserError(
            f"{path} is damaged, or holds more than weights, which could run code; give a file that was written by "
            "torch.save(model.state_dict(), path)"
        ) from None
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise UserError(
            f"{path} does not hold a state dict, that is tensors by name; give a file that was written by "
            "torch.save(model.state_dict(), path)"
        )
    if any(name.startswith(PARALLEL) for name in loaded):
        diagnostics.record_repair(path, f"has names that begin with {PARALLEL}, from DataParallel; they count without")
    return {standard_name(name): value for name, value in loaded.items()}


@contextmanager
def short_searches() -> Iterator[None]:
    """Let torch.load look for its reasons in the beginning of a message alone.

    A refused file can make the message as long as itself, and the search takes the square of its length.
    """
    search = {"search": lambda pattern, message: re.search(pattern, message[:MAX_SEARCHED])}
    torch.serialization.re = SimpleNamespace(**vars(re) | search)
    try:
        yield
    finally:
        torch.serialization.re = re


def check_archive(path: Path) -> None:
    """Raise UserError for a zip file whose entries are larger than itself, as torch.save never writes them."""
    try:
        with ZipFile(path) as archive:
            whole = sum(entry.file_size for entry in archive.infolist())
    except (BadZipFile, OSError, ValueError, NotImplementedError):  # no zip file, as before torch 1.6, or a damaged one
        return
    if whole > path.stat().st_size:
        raise UserError(f"{path} would unpack to {whole / 1e6:,.0f} MB, more than it has; it is no file of torch.save")


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is dense, of an ordinary type, and has as many values in memory as its shape says."""
    dense = value.layout == torch.strided and value.dtype in TYPES and value.device.type == "cpu"
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def standard_name(name: str) -> str:
    """A parameter's name without the prefix of DataParallel and in our naming."""
    name = name.removeprefix(PARALLEL)
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
