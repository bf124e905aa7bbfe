"""Parameter groups, learning-rate schedule, weight average and freezing."""

import copy
from collections.abc import Callable
from itertools import compress
from math import ceil, cos, pi
from operator import not_

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nets.yolo import YoloBody
from utils.errors import UserError

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step")
FINAL_LR_SHARE = 0.01  # of the peak learning rate, at the end of the cosine
STEPS_AT = (0.8, 0.9)  # of the run, where the step schedule multiplies by 0.1, as in Darknet's cfg
ADAM_BETAS = (0.9, 0.999)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for weights of two or more dimensions; none for biases, norms and attention gains."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """AdamW (arXiv 1711.05101) or SGD with Nesterov momentum."""
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=ADAM_BETAS, fused=True)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    raise UserError(f"optimizer is {name!r}, but must be one of {', '.join(OPTIMIZERS)}")


def lr_factor(schedule: str, total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Step -> learning rate as a share of its peak: a linear warm-up, then cosine or steps."""
    if schedule not in SCHEDULES:
        raise UserError(f"schedule is {schedule!r}, but must be one of {', '.join(SCHEDULES)}")

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / max(1, warmup_steps))
        progress = min(1.0, step / max(1, total_steps))
        if schedule == "step":
            return warmup * 0.1 ** sum(progress >= at for at in STEPS_AT)
        return warmup * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + cos(pi * progress)) / 2)

    return factor


class WeightAverage:
    """An exponential moving average of weights and buffers, held by a copy of the network, `module`.

    The arithmetic is torch.optim.swa_utils', whose AveragedModel has the host wait for a GPU at every update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.updates = 0
        self.average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take a step towards the model's weights; the first time, and counters always, are copied."""
        own, new = ([*module.parameters(), *module.buffers()] for module in (self.module, model))
        floats = [value.is_floating_point() and self.updates > 0 for value in own]
        if self.updates:
            self.average(list(compress(own, floats)), list(compress(new, floats)), None)
        for value, other in compress(zip(own, new, strict=True), map(not_, floats)):
            value.copy_(other)
        self.updates += 1


def build_ema(model: nn.Module, total_steps: int, share: float) -> WeightAverage:
    """An average whose horizon is a share of the run's steps."""
    return WeightAverage(model, decay=1 - 1 / max(2, ceil(total_steps * share)))


def freeze_backbone(model: YoloBody, frozen: bool) -> None:
    """Freeze or free the backbone; a frozen one keeps its batch-norm statistics too. Call after `model.train()`."""
    model.backbone.requires_grad_(not frozen)
    if frozen:
        model.backbone.eval()


def accumulation_steps(batch_size: int, nominal_batch: int) -> int:
    """How many batches make one step of the optimizer, so that it sees about `nominal_batch` images."""
    return max(1, round(nominal_batch / batch_size))
