"""Checkpoints: one `.safetensors` file with the weights, the `ModelSpec` and, to resume from, the training state.

The weights stand under their plain names, the training state's tensors under `training/`. The metadata is JSON, with a
SHA-256 over all tensors. A file is written under a temporary name and renamed, so that it is whole or not there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from nets.yolo import ModelSpec, YoloBody
from utils.errors import UserError

FORMAT = "yolov4-tiny/1"
TRAINING = "training/"


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


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a temporary file beside it, flushed to the disk, then renamed."""
    path = Path(path)
    tensors = dict(checkpoint.weights) | {TRAINING + name: value for name, value in checkpoint.training.items()}
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    metadata = {
        "format": FORMAT,
        "spec": json.dumps(checkpoint.spec.to_dict()),
        "info": json.dumps(checkpoint.info),
        "sha256": digest(tensors),
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check; raises UserError for a file that is missing, damaged or no checkpoint of ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; correct the path, or run train.py, which writes checkpoints")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError:
        hint = "; a .pth can only start a training, with train.py --weights" if path.suffix in (".pth", ".pt") else ""
        raise UserError(f"{path} is no checkpoint of train.py (.safetensors), or it is damaged{hint}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file, but no checkpoint of train.py")
    if metadata["sha256"] != digest(tensors):
        raise UserError(f"{path} is damaged: its checksum does not match")
    training = {name.removeprefix(TRAINING): value for name, value in tensors.items() if name.startswith(TRAINING)}
    weights = {name: value for name, value in tensors.items() if not name.startswith(TRAINING)}
    spec = ModelSpec.from_dict(json.loads(metadata["spec"]))
    return Checkpoint(spec, weights, json.loads(metadata["info"]), training)


def newest_checkpoint(name: str) -> Path:
    """`last` or `best` of the newest run under logs/; `last` when it has no `best` yet."""
    found = list(Path("logs").glob("*/metrics.jsonl"))
    if not found:
        raise UserError("there is no run under logs/; run train.py first, or name the place of another")
    folder = max(found, key=lambda path: path.stat().st_mtime).parent
    best, last = folder / "best.safetensors", folder / "last.safetensors"
    if not last.exists():
        raise UserError(
            f"the newest run, {folder}, stopped before its first checkpoint; train again, or name the place of another"
        )
    return best if name == "best" and best.exists() else last


def load_model(path: str | Path) -> tuple[YoloBody, ModelSpec]:
    """The network of a checkpoint and its specification."""
    checkpoint = load_checkpoint(path)
    return checkpoint.build_model(path), checkpoint.spec


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes while a network trains."""

    model: YoloBody
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    ema: AveragedModel

    def step(self) -> None:
        """One step of the optimizer with the gradients gathered, and of all that follows it."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.ema.update_parameters(self.model)


def pack_training(state: TrainingState, spec: ModelSpec, info: dict[str, Any]) -> Checkpoint:
    """A checkpoint of the averaged weights with all that continuing needs."""
    training = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        training |= {f"optimizer/{index}/{name}": value for name, value in values.items() if value is not None}
    training["ema/n_averaged"] = state.ema.n_averaged
    info = info | {"scheduler": state.scheduler.state_dict(), "scaler": state.scaler.state_dict()}
    return Checkpoint(spec, state.ema.module.state_dict(), info, training)


def restore_training(state: TrainingState, checkpoint: Checkpoint) -> None:
    """The inverse of `pack_training`; raises UserError for a checkpoint without a training state."""
    if not checkpoint.training:
        raise UserError("this checkpoint cannot be resumed from, it holds weights alone; use last.safetensors")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "ema": {}}
    for name, value in checkpoint.training.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    state.model.load_state_dict(parts["model"])
    state.ema.module.load_state_dict(checkpoint.weights)
    state.ema.n_averaged.copy_(parts["ema"]["n_averaged"])
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for flat, value in parts["optimizer"].items():
        index, name = flat.split("/")
        parameter = parameters[int(index)]
        # fused optimizers expect the parameter's memory layout, and do not check
        like = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        moments.setdefault(int(index), {})[name] = like
    state.scheduler.load_state_dict(checkpoint.info["scheduler"])
    groups = state.optimizer.state_dict()["param_groups"]
    for group, lr in zip(groups, state.scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if checkpoint.info["scaler"]:  # empty unless the run was in fp16
        state.scaler.load_state_dict(checkpoint.info["scaler"])
