"""What changes while a network trains, and a step of it that can be taken back."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nets.spec import ModelSpec
from nets.yolo import YoloBody
from utils.data.loader import Batches
from utils.detection.loss import TERMS, YoloLoss
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.system.device import autocast
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.training.optim import WeightAverage, freeze_backbone
from utils.weights.checkpoint import LAST, Checkpoint

MAX_SKIPPED = 3  # batches that a run may leave out since they gave no finite loss or gradient
COLUMNS = (*TERMS, "gradient_norm")  # of what is remembered of each batch


@dataclass
class Progress:
    """Where a run stands."""

    end: int  # epochs that the schedule goes to
    start: int = 0  # the epoch that it began at, which is where the run ended before if it was extended
    epoch: int = 0  # epochs finished, with their validation
    batch: int = 0  # batches done of the next one
    best: float = -1.0  # AP of the best validation
    stale: int = 0  # validations since that one
    thresholds: list[float] = field(default_factory=list)  # confidence of each class that the last validation suggests
    skipped: list[tuple[int, int]] = field(default_factory=list)  # epoch and batch that gave no finite loss

    def is_finished(self, patience: int) -> bool:
        """Whether all epochs are done, or so many validations (0: any) brought nothing better."""
        return self.epoch >= self.end or 0 < patience <= self.stale

    def skips(self, epoch: int) -> set[int]:
        """The batches of an epoch to leave out."""
        return {batch for at, batch in self.skipped if at == epoch}


@dataclass
class TrainingState:
    """Everything that changes while a network trains."""

    model: YoloBody
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    ema: WeightAverage
    progress: Progress
    losses: Tensor  # (batches, columns) of the epoch under way

    def step(self) -> None:
        """One step of the optimizer with the gradients gathered, and of all that follows it."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.ema.update(self.model)


def pack_training(state: TrainingState, spec: ModelSpec) -> Checkpoint:
    """A checkpoint of the averaged weights with all that continuing needs; copies, on the device of the training."""
    training = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        training |= {f"optimizer/{index}/{name}": value for name, value in values.items() if value is not None}
    training["losses"] = state.losses
    info = asdict(state.progress) | {"averaged": state.ema.updates}
    info |= {"scheduler": state.scheduler.state_dict(), "scaler": state.scaler.state_dict()}
    copy = partial(torch.clone, memory_format=torch.contiguous_format)  # as files have it
    weights = {name: copy(value.detach()) for name, value in state.ema.module.state_dict().items()}
    return Checkpoint(spec, weights, info, {name: copy(value.detach()) for name, value in training.items()})


def restore_training(state: TrainingState, checkpoint: Checkpoint) -> None:
    """The inverse of `pack_training`; raises UserError for a checkpoint without a training state."""
    if not checkpoint.training:
        raise UserError(f"this checkpoint cannot be resumed from, it holds weights alone; use {LAST}")
    info = checkpoint.info
    vars(state.progress).update(vars(read_progress(checkpoint)))
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, value in checkpoint.training.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = value
    state.model.load_state_dict(parts["model"])
    state.ema.module.load_state_dict(checkpoint.weights)
    state.ema.updates = info["averaged"]
    state.losses.copy_(checkpoint.training["losses"])
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for flat, value in parts["optimizer"].items():
        index, name = flat.split("/")
        parameter = parameters[int(index)]
        # fused optimizers expect the parameter's memory layout, and do not check
        like = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()
        moments.setdefault(int(index), {})[name] = like
    state.scheduler.load_state_dict(info["scheduler"])
    groups = state.optimizer.state_dict()["param_groups"]
    for group, lr in zip(groups, state.scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if info["scaler"]:  # empty unless the run was in fp16
        state.scaler.load_state_dict(info["scaler"])


def read_progress(checkpoint: Checkpoint) -> Progress:
    """Where the run of a resumable checkpoint stood."""
    values = {item.name: checkpoint.info[item.name] for item in fields(Progress) if item.name in checkpoint.info}
    return Progress(**values | {"skipped": [tuple(pair) for pair in values["skipped"]]})


@dataclass
class Trainer:
    """A network in training, alone or as one of several processes."""

    state: TrainingState
    spec: ModelSpec
    loss: YoloLoss
    device: torch.device
    dtype: torch.dtype  # of mixed precision
    accumulate: int  # batches that make a step of the optimizer

    def __post_init__(self) -> None:
        self.group: ProcessGroup = self.loss.group
        self.network: Callable[[Tensor], tuple[Tensor, Tensor]] = self.state.model  # within what joins the gradients
        self.frozen: bool | None = None
        self.kept = pack_training(self.state, self.spec)  # the last state known to be good
        self.started = time.perf_counter()

    def detector(self) -> Detector:
        """The averaged weights, as validation and prediction use them."""
        network = TorchNetwork(self.state.ema.module, self.spec, self.device)
        return Detector(network, self.spec, EVALUATION_THRESHOLDS)

    def set_mode(self, frozen: bool) -> None:
        """Training mode, with the backbone frozen or not."""
        freeze_backbone(self.state.model.train(), frozen)
        if self.group.size > 1 and frozen != self.frozen:  # it looks only once at which parameters learn
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.state.model, devices, gradient_as_bucket_view=True)
            self.network.broadcast_buffers = False  # of each step; the argument's name depends on torch's version
        self.frozen = frozen

    def backward(self, images: Tensor, boxes: Tensor, labels: Tensor, joins: bool = True) -> Tensor:
        """Gather the gradients of a batch; returns its loss terms and the norm of the gradient gathered so far.

        The gradients of all processes are averaged when the batch `joins` them, at the latest with the last of a step.
        """
        alone = self.group.size > 1 and not joins
        with self.network.no_sync() if alone else nullcontext():
            with autocast(self.device, self.dtype):
                heads = self.network(images)
            terms = self.loss(heads, boxes, labels)
            scale = self.group.size / self.accumulate  # averaging the shares of the loss would divide by the size
            self.state.scaler.scale(terms["loss"] * scale).backward()
        gradients = [value.grad for value in self.state.model.parameters() if value.grad is not None]
        norm = get_total_norm(gradients) / self.group.size  # the shares of all processes are added up, as the terms'
        if self.dtype == torch.float16:  # the scaler looks after these: it leaves out the step
            norm = torch.zeros_like(norm)
        return torch.stack([*(terms[name].detach() for name in TERMS), norm])

    def is_finite(self) -> bool:
        """Whether all weights, and their averages, are."""
        modules = self.state.model, self.state.ema.module
        values = [value for module in modules for value in module.state_dict().values() if value.is_floating_point()]
        return bool(get_total_norm(values).isfinite())

    def keep(self, batch: int) -> None:
        """Remember the state after a batch, to go back to and to save."""
        self.state.progress.batch = batch
        self.kept = pack_training(self.state, self.spec)

    def goes_well(self, batches: Batches, done: int) -> bool:
        """Look at what the batches since the last look gave: keep the state, or go back and leave out the bad one.

        Raises UserError when too many were left out.
        """
        first, skips = self.state.progress.batch, self.state.progress.skips(batches.epoch)
        found = self.group.all_reduce(self.state.losses[first:done].clone())  # also waits for the device
        bad = [first + int(row) for row in (~found.isfinite().all(dim=1)).nonzero()]
        bad = [number for number in bad if number not in skips]
        what = f"epoch {batches.epoch + 1}, batch {bad[0] + 1 if bad else done}"
        if self.group.any_rank(not bad and not self.is_finite()):
            raise UserError(f"the weights are not finite after {what}; the last checkpoint is still good, lower lr")
        if not bad:
            self.state.losses[first:done] = found
            self.keep(done)
            return True
        names = ", ".join(batches.names(bad[0]))
        if len(self.state.progress.skipped) == MAX_SKIPPED:
            raise UserError(
                f"the loss or gradient of {what} is not finite, the {MAX_SKIPPED + 1}th time in this run; the last "
                f"checkpoint is still good. A lower lr helps, or a look at the annotations of its images: {names}"
            )
        restore_training(self.state, self.kept)
        self.state.progress.skipped.append((batches.epoch, bad[0]))
        self.kept = replace(self.kept, info=self.kept.info | asdict(self.state.progress))
        self.group.print_once(
            f"the loss or gradient of {what} is not finite: going back, and on without its images: {names}"
        )
        return False

    def try_batch(self, images: int, objects: int) -> None:
        """A step on an empty batch of this process, with so many objects on each image."""
        shape = images, 3, *self.spec.input_size
        empty = torch.zeros(shape, device=self.device).contiguous(memory_format=torch.channels_last)
        boxes = torch.tensor([0.0, 0.0, 32.0, 32.0], device=self.device).repeat(images, objects, 1)
        self.backward(empty, boxes, torch.zeros(images, objects, dtype=torch.long, device=self.device))
        self.state.step()
