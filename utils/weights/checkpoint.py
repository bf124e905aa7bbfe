"""Checkpoints: `.safetensors` files with the weights, the `ModelSpec` and, for resuming, the training state.

The tensors of the training state are stored under `training/`. The metadata is JSON and includes a SHA-256 digest.
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
from utils.system.text import printable

FORMAT = "yolov4-tiny/2"
TRAINING = "training/"
MAX_SHOWN = 200  # maximum length of an error in a message
MAX_BYTES = 500_000_000  # size limit of a weights file; a resumable checkpoint for MAX_CLASSES is 440 MB
LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"  # checkpoints of a run folder
DAMAGED = "damaged.safetensors"  # a `last` that could not be read


@dataclass(frozen=True)
class Checkpoint:
    """A network, and in `last.safetensors` and `previous.safetensors` also the state of its training run.

    `weights` are the moving average (`TrainingState.ema`). `best.safetensors` holds those of the validation with the
    best AP, with its metrics and thresholds but without `training`; a run without validation sets stores its last
    epoch. `training` holds the weights being trained, the optimizer's state and the losses of the current epoch; see
    `TrainingState.take_snapshot` in training/training_state.py.
    """

    spec: ModelSpec
    weights: dict[str, Tensor]
    info: dict[str, Any]  # epoch, metrics, thresholds and, with training state, the progress of the run
    training: dict[str, Tensor]  # empty unless the run can be resumed from this checkpoint

    def build_model(self, path: str | Path) -> YoloBody:
        """The network with its weights; raises UserError if they do not match the specification or are not finite."""
        try:
            with torch.device("meta"):  # allocates no memory, whatever sizes the file states
                expected = build_model(self.spec).state_dict()
        except Exception as error:  # invalid arguments of attention blocks fail in many ways
            raise UserError(f"{path} has an invalid model specification: {printable(error, MAX_SHOWN)}") from None
        parts = expected.items(), self.weights.items()
        forms = ({(name, value.shape, value.dtype) for name, value in part} for part in parts)
        wrong = [name for name, *_ in set.symmetric_difference(*forms)]
        if wrong:
            raise UserError(
                f"{path} does not match its model specification: {printable(min(wrong))} is missing or differs"
            )
        broken = [name for name, value in self.weights.items() if not value.isfinite().all()]
        if broken:
            raise UserError(f"{path} contains non-finite weights, in {broken[0]}; use another checkpoint")
        model = build_model(self.spec)
        model.load_state_dict(self.weights)
        return model


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, previous: str | Path | None = None) -> None:
    """Write a checkpoint atomically, renaming an existing file to `previous` if given; raises UserError on failure."""
    tensors = dict(checkpoint.weights) | {TRAINING + name: value for name, value in checkpoint.training.items()}
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    spec, info = json.dumps(checkpoint.spec.to_dict()), json.dumps(checkpoint.info)
    metadata = {"format": FORMAT, "spec": spec, "info": info}
    metadata["sha256"] = digest(tensors, metadata)
    with atomic_write(path, previous) as file:
        file.write(save(tensors, metadata))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint; raises UserError if it is missing, damaged or not from train.py."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; check the path, or create one with train.py")
    check_regular_file(path, MAX_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a mapping
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, AttributeError):  # the latter for dtypes that torch does not have
        raise UserError(f"{path} is not a checkpoint of train.py (.safetensors), or is damaged{remedy(path)}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file, but not a checkpoint of train.py")
    if metadata.pop("sha256", None) != digest(tensors, metadata):
        raise UserError(f"{path} is damaged: its checksum does not match")
    training = {name.removeprefix(TRAINING): value for name, value in tensors.items() if name.startswith(TRAINING)}
    weights = {name: value for name, value in tensors.items() if not name.startswith(TRAINING)}
    try:
        spec, info = ModelSpec.from_dict(json.loads(metadata["spec"])), json.loads(metadata["info"])
        if not all(0 <= value <= 1 for value in info.get("thresholds", ())):
            raise ValueError("thresholds must be between 0 and 1")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has an invalid model specification: {printable(error, MAX_SHOWN)}") from None
    return Checkpoint(spec, weights, info, training)


def remedy(path: Path) -> str:
    """A hint at what to do with a file that is not a checkpoint, based on its name."""
    if ".conv." in path.name:
        return f"; {path.name} contains only initial weights, for train.py --weights"
    if path.suffix in (".pth", ".pt", ".weights"):
        return f"; convert it with tools/convert_weights.py --weights {path}"
    return "; use the checkpoint that it was exported from" if path.suffix in (".onnx", ".xml", ".pt2") else ""


def load_last(folder: Path, say: Callable[[str], None] = print) -> Checkpoint:
    """The newest intact checkpoint of a run; a damaged `last` is reported, and renamed so that `previous` is kept."""
    last, previous = folder / LAST, folder / PREVIOUS
    if not is_resumable(folder):
        raise UserError(f"{folder} has no checkpoint to resume from; leave out --resume to start a new run there")
    if not (last.exists() and previous.exists()):
        return load_checkpoint(last if last.exists() else previous)
    try:
        return load_checkpoint(last)
    except UserError as error:
        say(f"{error}; resuming from {previous}, and keeping the damaged file as {DAMAGED}")
        checkpoint = load_checkpoint(previous)
        with suppress(OSError):  # another process of this run may have renamed it
            last.replace(folder / DAMAGED)
        return checkpoint


def is_resumable(folder: Path) -> bool:
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def newest_run() -> Path:
    """The folder of the newest run under logs/; raises UserError if there is none, or none with a checkpoint."""
    found = list(Path("logs").glob("*/metrics.jsonl"))
    if not found:
        raise UserError("there is no run under logs/; run train.py first, or give --run-dir or --weights")
    folder = max(found, key=lambda path: path.stat().st_mtime).parent
    if not is_resumable(folder):
        raise UserError(
            f"the newest run, {folder}, stopped before its first checkpoint; give another with --run-dir or --weights"
        )
    return folder


def find_checkpoint(name: str = "") -> Path:
    """The path of a checkpoint: `name` itself, or the `best`, else `last`, of that run folder or of the newest run."""
    path = Path(name) if name else newest_run()
    if not path.is_dir():
        return path
    if not ((path / BEST).exists() or is_resumable(path)):
        raise UserError(f"{path} is a folder without a checkpoint; give a .safetensors file or a run folder")
    return path / BEST if (path / BEST).exists() else path / LAST


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of the names, dtypes, shapes and values of the tensors, and of the metadata."""
    sha = hashlib.sha256(json.dumps(metadata or {}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
