"""Checkpoints: one `.safetensors` file with the weights, the `ModelSpec` and, to resume from, the training state.

The weights stand under their plain names, the training state's tensors under `training/`. The metadata is JSON, with a
SHA-256 over all tensors. A file is written under a temporary name and renamed, so that it is whole or not there; of the
resumable ones the one before stays, as `previous`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nets.spec import ModelSpec
from nets.yolo import YoloBody, build_model
from utils.system.errors import UserError
from utils.system.files import atomic_write, check_regular_file
from utils.system.text import show

FORMAT = "yolov4-tiny/2"
TRAINING = "training/"
SHOWN = 200  # letters of an error in a message
MAX_BYTES = 500_000_000  # of a checkpoint, or of weights; with MAX_CLASSES and a training state it has 440 million
LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"  # of a run
DAMAGED = "damaged.safetensors"  # what was `last` and cannot be read


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    spec: ModelSpec
    weights: dict[str, Tensor]
    info: dict[str, Any]  # about the run: epoch, metrics, and with a training state its progress
    training: dict[str, Tensor]  # empty when there is nothing to resume

    def build_model(self, path: str | Path) -> YoloBody:
        """The network with its weights; raises UserError where these are not its own, or are not finite."""
        try:
            with torch.device("meta"):  # which takes no memory, whatever the file says
                expected = build_model(self.spec).state_dict()
        except Exception as error:  # arguments of attention that make no sense fail in many ways
            raise UserError(f"{path} describes a network that cannot be built: {show(error, SHOWN)}") from None
        wrong = [name for name in expected.keys() | self.weights.keys() if not same_form(name, expected, self.weights)]
        if wrong:
            raise UserError(
                f"{path} does not hold the network that it describes: {show(min(wrong))} is missing or differs"
            )
        broken = [name for name, value in self.weights.items() if not value.isfinite().all()]
        if broken:
            raise UserError(f"{path} holds numbers that are not finite, in {broken[0]}; take another checkpoint")
        model = build_model(self.spec)
        model.load_state_dict(self.weights)
        return model


def same_form(name: str, *groups: Mapping[str, Tensor]) -> bool:
    """Whether all groups have the tensor, in the same shape and type."""
    return len({(group[name].shape, group[name].dtype) if name in group else None for group in groups}) == 1


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, previous: str | Path | None = None) -> None:
    """Write atomically; what was there stays under the name `previous`, if one is given.

    Raises UserError when it cannot be written.
    """
    tensors = dict(checkpoint.weights) | {TRAINING + name: value for name, value in checkpoint.training.items()}
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    metadata = {
        "format": FORMAT,
        "spec": json.dumps(checkpoint.spec.to_dict()),
        "info": json.dumps(checkpoint.info),
    }
    metadata["sha256"] = digest(tensors, metadata)
    with atomic_write(path, previous) as file:
        file.write(save(tensors, metadata))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check; raises UserError for a file that is missing, damaged or no checkpoint of ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; correct the path, or run train.py, which writes checkpoints")
    check_regular_file(path, MAX_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no mapping
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, AttributeError):  # the latter for types that torch does not have
        raise UserError(f"{path} is no checkpoint of train.py (.safetensors), or it is damaged{remedy(path)}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file, but no checkpoint of train.py")
    if metadata.pop("sha256", None) != digest(tensors, metadata):
        raise UserError(f"{path} is damaged: its checksum does not match")
    training = {name.removeprefix(TRAINING): value for name, value in tensors.items() if name.startswith(TRAINING)}
    weights = {name: value for name, value in tensors.items() if not name.startswith(TRAINING)}
    try:
        spec, info = ModelSpec.from_dict(json.loads(metadata["spec"])), json.loads(metadata["info"])
        if not all(0 <= value <= 1 for value in info.get("thresholds", ())):
            raise ValueError("thresholds must be between 0 and 1")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} describes no network that can be: {show(error, SHOWN)}") from None
    return Checkpoint(spec, weights, info, training)


def remedy(path: Path) -> str:
    """What to do about a file that is no checkpoint, as far as its name tells what it is."""
    if ".conv." in path.name:
        return f"; {path.name} can only start a training, with train.py --weights"
    if path.suffix in (".pth", ".pt", ".weights"):
        return f"; make one with tools/convert_weights.py --weights {path}"
    if path.suffix in (".onnx", ".xml", ".pt2"):
        return "; give the checkpoint that it was made of"
    return ""


def load_last(folder: Path, say: Callable[[str], None] = print) -> Checkpoint:
    """The newest whole checkpoint to resume the run in `folder` from.

    When `last` is damaged, says so, and puts it aside, so that it does not replace `previous`.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not is_resumable(folder):
        raise UserError(f"{folder} has no checkpoint to resume from; without --resume the run begins there")
    if last.exists() or not previous.exists():
        try:
            return load_checkpoint(last)
        except UserError as error:
            if not previous.exists():
                raise
            say(f"{error}; going on from {previous}, the one before, and keeping it as {DAMAGED}")
            checkpoint = load_checkpoint(previous)
            with suppress(OSError):  # when another process of this run did
                last.replace(folder / DAMAGED)
            return checkpoint
    return load_checkpoint(previous)


def is_resumable(folder: Path) -> bool:
    """Whether a run has left a checkpoint in `folder`."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def newest_run() -> Path:
    """The folder of the newest run under logs/."""
    found = list(Path("logs").glob("*/metrics.jsonl"))
    if not found:
        raise UserError(
            "there is no run under logs/; run train.py first, or say where one is, with --run-dir or --weights"
        )
    folder = max(found, key=lambda path: path.stat().st_mtime).parent
    if not is_resumable(folder):
        raise UserError(
            f"the newest run, {folder}, stopped before its first checkpoint; train again, or name the place of another"
        )
    return folder


def find_checkpoint(name: str = "") -> Path:
    """A checkpoint's own path; of a run's folder, or without a name of the newest run, its `best`, else its `last`."""
    path = Path(name) if name else newest_run()
    if not path.is_dir():
        return path
    if not ((path / BEST).exists() or is_resumable(path)):
        raise UserError(f"{path} is a folder without a checkpoint; name a .safetensors file, or the folder of a run")
    return path / BEST if (path / BEST).exists() else path / LAST


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 over names, types, shapes and values, and over metadata."""
    sha = hashlib.sha256(json.dumps(metadata or {}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
