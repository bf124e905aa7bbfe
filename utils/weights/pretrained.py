"""Initial weights from our checkpoints, published `.pth` files and Darknet's `.weights`."""

import os
import pickletools
import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError
from utils.system.files import check_regular_file
from utils.system.text import printable
from utils.weights.checkpoint import MAX_BYTES, load_checkpoint
from utils.weights.darknet import read_darknet

GAIN = "attention_gain."  # prefix of the gains that `identity_start` adds
MAX_NAMES = 8  # maximum number of names in a message
MAX_TEXT = 1000  # maximum length of a text in a pickle; parameter names have fewer than 100 characters
LEGACY_PICKLES = 5  # pickles in a file from torch before 1.6: magic number, version, system, object, storage keys
COUNTER = "num_batches_tracked"  # counter of batch norms, which is not used
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64}
DATA_PARALLEL = "module."  # prefix of parameter names from DataParallel
DARKNET = re.compile(r"\.(weights|conv\.\d+)$")  # file names used by Darknet
RENAMED = (  # two naming schemes of published CBAM weights; the second is that of `YoloBody`
    (".channelattention.fc.0.", ".channelattention.fc1."),
    (".channelattention.fc.2.", ".channelattention.fc2."),
    (".spatialattention.conv.", ".spatialattention.conv1."),
)


def read_weights(path: str | Path, diagnostics: Diagnostics | None = None) -> dict[str, Tensor]:
    """Read parameters from a `.safetensors`, `.pth`, `.weights` or `.conv.29` file; raises UserError if invalid."""
    path = Path(path)
    if path.suffix == ".safetensors":
        weights = load_checkpoint(path).weights
    elif DARKNET.search(path.name):
        weights = read_darknet(path)
    else:
        weights = read_state_dict(path, diagnostics or Diagnostics())
    unusual = [name for name, value in weights.items() if not is_plain(value)]
    if unusual:
        raise UserError(f"{path} contains sparse, quantized or incomplete tensors, such as {printable(unusual[0])}")
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} contains non-finite weights, in {printable(', '.join(broken[:3]), 200)}")
    return weights


def read_state_dict(path: Path, diagnostics: Diagnostics) -> dict[str, Tensor]:
    """Read a `.pth` file that contains nothing but tensors by name; raises UserError for any other file."""
    if not os.path.isfile(path):
        raise UserError(f"there is no weights file {path}")
    check_regular_file(path, MAX_BYTES)
    try:
        check_pickles(path)
        with warnings.catch_warnings(action="ignore"):  # damaged files cause warnings
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception:  # damaged files cause errors of any type
        raise UserError(
            f"{path} is damaged, or contains more than weights and could run code; use a file written by "
            "torch.save(model.state_dict(), path)"
        ) from None
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise UserError(f"{path} is not a state dict; use a file written by torch.save(model.state_dict(), path)")
    if any(name.startswith(DATA_PARALLEL) for name in loaded):
        diagnostics.record_repair(path, f"has names with the prefix {DATA_PARALLEL} of DataParallel, which is removed")
    return {standard_name(name): value for name, value in loaded.items()}


def check_pickles(path: Path) -> None:
    """Reject zip bombs, and pickles with long texts, which torch.load's error message would search in quadratic time.

    Raises UserError for a zip bomb, and ValueError for a long text.
    """
    with ExitStack() as stack:
        if is_zipfile(path):
            archive = stack.enter_context(ZipFile(path))
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:  # torch.save does not compress
                raise UserError(f"{path} is not from torch.save: it would unpack to {unpacked / 1e6:,.0f} MB")
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            pickles = [stack.enter_context(archive.open(name)) for name in names]
        else:
            pickles = [stack.enter_context(open(path, "rb"))] * LEGACY_PICKLES
        for file in pickles:
            for _, argument, _ in pickletools.genops(file):
                if isinstance(argument, str | bytes) and len(argument) > MAX_TEXT:
                    raise ValueError("the pickle contains a long text")


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is dense, of a common dtype, and backed by as much memory as its shape requires."""
    dense = value.layout == torch.strided and value.dtype in DTYPES and value.device.type == "cpu"
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def standard_name(name: str) -> str:
    """The name in `YoloBody` of a published parameter."""
    name = name.removeprefix(DATA_PARALLEL)
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def fits_plain_attention(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights include all attention blocks of the model, trained without `identity_start`."""
    blocks = {name: value.shape for name, value in model.state_dict().items() if "_att." in name}
    fit = all(name in weights and weights[name].shape == shape for name, shape in blocks.items())
    return bool(blocks) and fit and not any(name.startswith(GAIN) for name in weights)


def start_from(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> str:
    """Copy all parameters whose name and shape match; returns a line that lists those left at their initial values."""
    own = model.state_dict()
    matching = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    for name in [name for name in matching if name.startswith(GAIN)]:  # without its block, a gain is meaningless
        block = f"{name.removeprefix(GAIN)}_att."
        if any(other.startswith(block) and other not in matching for other in own):
            del matching[name]
    if not matching:
        raise UserError(f"{source}: no parameter matches this network; is it YOLOv4-tiny?")
    model.load_state_dict(matching, strict=False)
    new = sorted(name for name in own if name not in matching and not name.endswith(COUNTER))
    line = f"{source}: loaded {len(matching)} of {len(own)} tensors"
    return line + (f"; newly initialized: {', '.join(new)}" if new else "")


def load_all_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> list[str]:
    """Load every parameter of the model; returns a report. Raises UserError if one is missing or differs in shape."""
    own, given = (
        {name: tuple(value.shape) for name, value in tensors.items() if not name.endswith(COUNTER)}
        for tensors in (model.state_dict(), weights)
    )
    missing = [name for name in own if name not in given]
    differing = [name for name in own if given.get(name, own[name]) != own[name]]
    reshaped = [f"{name} {given[name]} instead of {own[name]}" for name in differing]
    unknown = [name for name in given if name not in own]
    lines = [f"loaded {len(own.keys() & given.keys()) - len(reshaped)} of {len(own)} tensors"]
    for reason, names in (
        ("missing in the file", missing),
        ("wrong shape", reshaped),
        ("not loaded because the network has no such parameter", unknown),
    ):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            lines.append(f"{reason}: {', '.join(names[:MAX_NAMES])}{more}")
    if missing or reshaped:
        raise UserError(f"{source} does not contain all parameters of the network: {'; '.join(lines)}")
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)
    return lines
