"""The training state, and how `last.safetensors` stores it."""

from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nets.spec import ModelSpec
from nets.yolo import YoloBody
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.training.optim import WeightAverage
from utils.weights.checkpoint import LAST, Checkpoint


@dataclass
class Progress:
    """The progress of a run; checkpoints store it under these names."""

    end: int  # epoch at which the schedule ends
    start: int = 0  # epoch at which the schedule started; above 0 if the run was extended
    epoch: int = 0  # finished epochs, including their validation
    batch: int = 0  # finished batches of the next epoch
    best: float = -1.0  # best validation AP
    stale: int = 0  # validations in a row that did not exceed `best`, for early stopping
    thresholds: list[float] = field(default_factory=list)  # confidence per class suggested by the last validation
    skipped: list[tuple[int, int]] = field(default_factory=list)  # (epoch, batch) with a non-finite loss or gradient

    def is_finished(self, patience: int) -> bool:
        """Whether all epochs are done, or the last `patience` validations (0: no limit) brought no improvement."""
        return self.epoch >= self.end or 0 < patience <= self.stale

    def skipped_batches(self, epoch: int) -> set[int]:
        return {batch for skipped_epoch, batch in self.skipped if skipped_epoch == epoch}

    def record_validation(self, ap: float, thresholds: list[float]) -> bool:
        """Update the best AP and the early-stopping counter; returns whether no earlier AP was higher."""
        is_best = ap >= self.best
        self.stale = 0 if ap > self.best else self.stale + 1
        self.best, self.thresholds = max(self.best, ap), thresholds
        return is_best


def read_progress(checkpoint: Checkpoint) -> Progress:
    """The progress in a checkpoint; raises UserError for a checkpoint without training state."""
    if not checkpoint.training:
        raise UserError(f"this checkpoint contains only weights and cannot be resumed; use {LAST}")
    values = {item.name: checkpoint.info[item.name] for item in fields(Progress)}
    return Progress(**values | {"skipped": [tuple(pair) for pair in values["skipped"]]})


def find_progress(checkpoint: Checkpoint, extend: int, patience: int, group: ProcessGroup) -> Progress:
    """The progress to resume from, with `extend` more epochs; raises UserError if an unfinished run is extended."""
    progress = read_progress(checkpoint)
    if progress.is_finished(patience):
        end = progress.epoch + extend
        return replace(progress, start=progress.epoch, end=end, stale=0) if extend else progress
    if extend and not group.restarted:
        raise UserError(
            f"the run has finished {progress.epoch} of {progress.end} epochs; finish it with --resume first, then add "
            "epochs with --resume --extend"
        )
    position = f"epoch {progress.epoch}" + (f", batch {progress.batch} of the next" if progress.batch else "")
    group.print_once(f"resuming after {position}, with the run's settings")
    return progress


@dataclass
class TrainingState:
    """Everything that changes during training."""

    model: YoloBody
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    ema: WeightAverage
    progress: Progress
    losses: Tensor  # (batches, COLUMNS) of the current epoch; this process's share until checked, then the sums

    def step(self) -> None:
        """Take an optimizer step with the accumulated gradients, then update the learning rate and weight average."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.ema.update()

    def take_snapshot(self, spec: ModelSpec) -> Checkpoint:
        """A copy on the training device: the averaged weights and everything needed to resume."""
        training = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            training |= {f"optimizer/{index}/{name}": value for name, value in values.items() if value is not None}
        training["losses"] = self.losses
        info = asdict(self.progress) | {"averaged": self.ema.updates}
        info |= {"scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict()}
        copy = partial(torch.clone, memory_format=torch.contiguous_format)  # the memory layout of checkpoint files
        weights = {name: copy(value.detach()) for name, value in self.ema.module.state_dict().items()}
        return Checkpoint(spec, weights, info, {name: copy(value.detach()) for name, value in training.items()})

    def restore(self, snapshot: Checkpoint) -> None:
        """The inverse of `take_snapshot`; raises UserError for a checkpoint without training state."""
        self.progress, info = read_progress(snapshot), snapshot.info
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, value in snapshot.training.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = value
        self.model.load_state_dict(parts["model"])
        self.ema.module.load_state_dict(snapshot.weights)
        self.ema.updates = info["averaged"]
        self.losses.copy_(snapshot.training["losses"])
        self.scheduler.load_state_dict(info["scheduler"])
        self.restore_optimizer(parts["optimizer"])
        if info["scaler"]:  # empty unless the run trained in fp16
            self.scaler.load_state_dict(info["scaler"])

    def restore_optimizer(self, values: dict[str, Tensor]) -> None:
        """Load the optimizer's state from tensors named "parameter index/name", with the scheduler's learning rate."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for flat_name, value in values.items():
            index, name = flat_name.split("/")
            parameter = parameters[int(index)]
            # fused optimizers expect the parameter's memory layout, and do not check it
            like = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()
            moments.setdefault(int(index), {})[name] = like
        groups = self.optimizer.state_dict()["param_groups"]
        for group, lr in zip(groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
