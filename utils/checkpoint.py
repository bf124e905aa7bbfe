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

from nets.yolo import ModelSpec, YoloBody
from utils.errors import UserError
from utils.files import replacing

FORMAT = "yolov4-tiny/2"
TRAINING = "training/"
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
        model = self.spec.build()
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise UserError(f"{path} does not hold the network that it describes: {error}") from None
        return model


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
    with replacing(path, previous) as file:
        file.write(save(tensors, metadata))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check; raises UserError for a file that is missing, damaged or no checkpoint of ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; correct the path, or run train.py, which writes checkpoints")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError:
        foreign = path.suffix in (".pth", ".pt", ".weights") or ".conv." in path.name
        hint = f"; make one with tools/convert_weights.py --weights {path}" if foreign else ""
        raise UserError(f"{path} is no checkpoint of train.py (.safetensors), or it is damaged{hint}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file, but no checkpoint of train.py")
    if metadata.pop("sha256", None) != digest(tensors, metadata):
        raise UserError(f"{path} is damaged: its checksum does not match")
    training = {name.removeprefix(TRAINING): value for name, value in tensors.items() if name.startswith(TRAINING)}
    weights = {name: value for name, value in tensors.items() if not name.startswith(TRAINING)}
    spec = ModelSpec.from_dict(json.loads(metadata["spec"]))
    return Checkpoint(spec, weights, json.loads(metadata["info"]), training)


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
