"""The trainer: a network with its optimizer and loss, whose steps can be rolled back."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from nets.spec import ModelSpec
from nets.yolo import build_model
from utils.data.augment import BatchPlan, render_batch
from utils.data.loader import EpochBatches
from utils.detection.loss import TERMS, LossSettings, YoloLoss
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.system.device import autocast, choose_compile, choose_precision
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.training.optim import build_ema, build_optimizer, freeze_backbone, lr_factor
from utils.training.training_state import Progress, TrainingState
from utils.weights.checkpoint import Checkpoint

MAX_SKIPPED = 3  # maximum number of batches skipped for a non-finite loss or gradient
COLUMNS = (*TERMS, "gradient_norm")  # columns of `TrainingState.losses`


class Batching(NamedTuple):
    """How the images of an epoch are divided."""

    batch_size: int  # images per batch, over all processes
    batches: int  # batches per epoch
    accumulate: int  # batches per optimizer step

    @classmethod
    def plan(cls, num_images: int, batch_size: int, nominal_batch: int) -> "Batching":
        """Accumulate batches until an optimizer step sees about `nominal_batch` images."""
        batches = num_images // batch_size
        return cls(batch_size, batches, min(max(1, round(nominal_batch / batch_size)), batches))


@dataclass
class Trainer:
    """A network in training, in a single process or in one of several."""

    spec: ModelSpec
    state: TrainingState
    loss: YoloLoss
    batching: Batching
    device: torch.device
    dtype: torch.dtype  # dtype of mixed precision
    group: ProcessGroup
    compiled: bool
    render: Callable[[BatchPlan], Tensor]  # `render_batch`; on a GPU, compiled if the network is
    network: nn.Module  # the model, wrapped in DistributedDataParallel if there are several processes
    snapshot: Checkpoint  # the last state with finite losses and weights, which checkpoints contain
    frozen: bool | None = None  # whether the backbone is frozen; None before the first `set_mode`
    started: float = field(default_factory=time.perf_counter)

    def build_detector(self) -> Detector:
        """A detector with the averaged weights."""
        network = TorchNetwork(self.state.ema.module, self.spec, self.device)
        return Detector(network, self.spec, EVALUATION_THRESHOLDS)

    def set_mode(self, frozen: bool) -> None:
        freeze_backbone(self.state.model.train(), frozen)
        if self.group.size > 1 and frozen != self.frozen:  # DDP reads `requires_grad` only when created
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.state.model, devices, gradient_as_bucket_view=True)
            self.network.broadcast_buffers = False  # the name of the argument depends on torch's version
        self.frozen = frozen

    def backward(self, images: Tensor, boxes: Tensor, labels: Tensor, sync: bool = True) -> Tensor:
        """Accumulate the gradients of a batch; returns its loss terms and the gradient norm (COLUMNS,), on the device.

        The norm is that of the gradients accumulated since the last step; in fp16 it is 0. With `sync`, as for the last
        batch of a step, the gradients are averaged over the processes.
        """
        local = self.group.size > 1 and not sync
        with self.network.no_sync() if local else nullcontext():
            with autocast(self.device, self.dtype):
                heads = self.network(images)
            terms = self.loss(heads, boxes, labels)
            # each process computes its share of the loss, but DistributedDataParallel averages instead of adding
            scale = self.group.size / self.batching.accumulate
            self.state.scaler.scale(terms["loss"] * scale).backward()
        parameters = (value for values in self.state.optimizer.param_groups for value in values["params"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(gradients) / self.group.size  # the rows of all processes are added up later
        if self.dtype == torch.float16:  # the scaler skips steps with non-finite gradients itself
            norm = torch.zeros_like(norm)
        return torch.stack([*(terms[name].detach() for name in TERMS), norm])

    def is_finite(self) -> bool:
        """Whether all weights and their averages are finite."""
        modules = self.state.model, self.state.ema.module
        values = [value for module in modules for value in module.state_dict().values() if value.is_floating_point()]
        return bool(get_total_norm(values).isfinite())

    def take_snapshot(self) -> None:
        """Keep the current state, to save it or to roll back to it."""
        self.snapshot = self.state.take_snapshot(self.spec)

    def update_snapshot(self, **info: object) -> None:
        """Store the current progress, and further metadata, in the snapshot."""
        self.snapshot = replace(self.snapshot, info=self.snapshot.info | asdict(self.state.progress) | info)

    def roll_back(self) -> None:
        self.state.restore(self.snapshot)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue the run of a checkpoint; a run that is being extended gets a new schedule."""
        progress = self.state.progress
        if progress.start != checkpoint.info["start"]:
            schedule = {"scheduler": self.state.scheduler.state_dict()}
            checkpoint = replace(checkpoint, info=checkpoint.info | asdict(progress) | schedule)
        self.state.restore(checkpoint)
        self.take_snapshot()

    def commit_or_roll_back(self, batches: EpochBatches, done: int) -> bool:
        """Take a snapshot after `done` batches and return True, or roll back to the last one and return False.

        Rolls back if a loss or gradient is not finite; the first bad batch will be skipped. Raises UserError for too
        many of them, or for non-finite weights.
        """
        first, skipped = self.state.progress.batch, self.state.progress.skipped_batches(batches.epoch)
        losses = self.group.all_reduce(self.state.losses[first:done].clone())  # also waits for the device
        bad = [first + int(row) for row in (~losses.isfinite().all(dim=1)).nonzero()]
        bad = [number for number in bad if number not in skipped]
        position = f"epoch {batches.epoch + 1}, batch {bad[0] + 1 if bad else done}"
        if self.group.any_rank(not bad and not self.is_finite()):
            raise UserError(
                f"the weights are no longer finite after {position}; the last checkpoint is still good: lower lr"
            )
        if not bad:
            self.state.losses[first:done] = losses
            self.state.progress.batch = done
            self.take_snapshot()
            return True
        names = ", ".join(batches.names(bad[0]))
        if len(self.state.progress.skipped) == MAX_SKIPPED:
            raise UserError(
                f"the loss or gradient is not finite in {position}, for the {MAX_SKIPPED + 1}th time in this run; the "
                f"last checkpoint is still good. Lower lr, or check the annotations of its images: {names}"
            )
        self.roll_back()
        self.state.progress.skipped.append((batches.epoch, bad[0]))
        self.update_snapshot()
        self.group.print_once(
            f"the loss or gradient is not finite in {position}: rolling back and skipping its images: {names}"
        )
        return False


def build_trainer(
    settings: Any, spec: ModelSpec, batching: Batching, progress: Progress, device: torch.device, group: ProcessGroup
) -> Trainer:
    """A newly initialized network with its optimizer, schedule, weight average and loss."""
    steps = math.ceil(batching.batches / batching.accumulate) * (progress.end - progress.start)
    dtype = choose_precision(settings.precision, device)
    compiled = choose_compile(settings.compile, device) and not settings.sync_bn  # SyncBatchNorm would split the graph
    torch.manual_seed(settings.seed)
    model = build_model(spec)
    if settings.sync_bn and group.size > 1:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, settings.lr, settings.weight_decay)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, lr_factor(steps, round(settings.warmup * steps))),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ema=build_ema(model, steps, settings.ema),
        progress=progress,
        losses=torch.zeros(batching.batches, len(COLUMNS), device=device),
    )
    loss = YoloLoss(spec, LossSettings(), device, group, compiled)
    render = torch.compile(render_batch) if compiled and device.type == "cuda" else render_batch
    if compiled:
        model.compile(dynamic=False)
    snapshot = state.take_snapshot(spec)
    return Trainer(spec, state, loss, batching, device, dtype, group, compiled, render, model, snapshot)
