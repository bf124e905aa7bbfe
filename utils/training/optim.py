"""The optimizer, the learning-rate schedule, the weight average and freezing of the backbone."""

import copy
from collections.abc import Callable, Sequence
from itertools import compress
from math import ceil, cos, pi
from operator import not_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nets.darknet53_tiny import BasicConv
from nets.yolo import YoloBody
from utils.system.device import choose_precision

FINAL_LR_SHARE = 0.01  # learning rate at the end of the cosine, relative to the peak
ADAM_BETAS = (0.9, 0.999)
ADAM_LR, ADAM_DECAY = 0.15, 0.5  # learning rate and weight decay of AdamW, relative to those of Muon
MUON_MOMENTUM = 0.95
MIN_STACK_HEIGHT = 128  # on a GPU, matrices with up to this many rows are orthogonalized together
POLAR_EXPRESS = (  # a, b, c of odd polynomials ax + bx^3 + cx^5; applied in turn, they map 0.0075..1 to 0.93..1.03
    (7.9561, -21.9821, 15.3236),  # all but the last are divided by 1.03, to allow for rounding in bf16
    (3.6592, -2.5781, 0.4722),
    (2.7921, -1.9672, 0.407),
    (2.0285, -1.4117, 0.3915),
)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Hidden convolutions for Muon; for AdamW, the other weights, and without decay, biases, norms and gains."""
    convolutions = [module.conv for module in model.modules() if isinstance(module, BasicConv)]
    hidden = [conv.weight for conv in convolutions if conv.in_channels > 3]  # all but the first
    hidden_ids = set(map(id, hidden))
    weights = [value for value in model.parameters() if value.ndim > 1 and id(value) not in hidden_ids]
    plain = [value for value in model.parameters() if value.ndim <= 1]
    return [
        {"params": hidden, "lr": lr, "weight_decay": weight_decay, "orthogonal": True},
        {"params": weights, "lr": ADAM_LR * lr, "weight_decay": ADAM_DECAY * weight_decay, "orthogonal": False},
        {"params": plain, "lr": ADAM_LR * lr, "weight_decay": 0.0, "orthogonal": False},
    ]


class Muon(AdamW):
    """Muon (kellerjordan.github.io/posts/muon) for `orthogonal` groups, AdamW (arXiv 1711.05101) for the others.

    Muon orthogonalizes the momentum of a weight's gradient, so that the weight learns equally in all directions.
    torch.optim.Muon accepts only matrices, and would need a separate AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, betas=ADAM_BETAS, fused=True)
        self._step_supports_amp_scaling = False  # GradScaler unscales and checks the gradients itself

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["orthogonal"] and weights:
                self.step_orthogonal(weights, group["lr"], group["weight_decay"])
        super().step(closure)

    def step_orthogonal(self, weights: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        """Update the weights (O, I, H, W) of convolutions as matrices (O, H * W * I), and remove their gradients.

        All weights are updated at once, since the number of kernel launches limits the speed of small batches on a GPU.
        """
        for weight in weights:
            if not self.state[weight]:
                step = torch.zeros((), device=weight.device)  # AdamW requires it
                self.state[weight] |= {"step": step, "momentum": torch.zeros_like(weight)}
        gradients = [weight.grad for weight in weights]
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_add_([self.state[weight]["step"] for weight in weights], 1)
        torch._foreach_lerp_(momenta, gradients, 1 - MUON_MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, MUON_MOMENTUM)  # Nesterov momentum
        by_pixel = [update.permute(0, 2, 3, 1) for update in updates]  # contiguous if the weights are channels-last
        matrices = [update.flatten(1) for update in by_pixel]
        directions = [
            matrix.reshape(update.shape).permute(0, 3, 1, 2)
            for matrix, update in zip(orthogonalize(matrices), by_pixel, strict=True)
        ]
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_mul_(directions, [-lr * max(1.0, len(m) / m.shape[1]) ** 0.5 for m in matrices])
        torch._foreach_add_(weights, directions)
        for weight in weights:
            weight.grad = None  # so that AdamW skips it


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Bring the singular values of matrices (R, C) near 1, by the polynomials of Polar Express (arXiv 2505.16932).

    Computed in bf16 if the hardware supports it, in stacks of matrices: on a CPU, those of equal shape; on a GPU,
    those of similar height, since padding with zeros costs less than additional kernel launches.
    """
    wide = [matrix if len(matrix) <= matrix.shape[1] else matrix.T for matrix in matrices]
    stacks: dict[Any, list[int]] = {}
    for index, matrix in enumerate(wide):
        key = max(len(matrix), MIN_STACK_HEIGHT) if matrix.is_cuda else matrix.shape
        stacks.setdefault(key, []).append(index)
    for indices in stacks.values():
        members = [wide[index] for index in indices]
        sides = (max(matrix.shape[axis] for matrix in members) for axis in (0, 1))
        stack = members[0].new_zeros(len(members), *sides)
        parts = [padded[: len(matrix), : matrix.shape[1]] for padded, matrix in zip(stack, members, strict=True)]
        torch._foreach_copy_(parts, members)
        for index, matrix, padded in zip(indices, members, orthogonalize_stack(stack), strict=True):
            wide[index] = padded[: len(matrix), : matrix.shape[1]]
    return [new if new.shape == old.shape else new.T for new, old in zip(wide, matrices, strict=True)]


def orthogonalize_stack(matrices: Tensor) -> Tensor:
    """Orthogonalize matrices (N, R, C) with R <= C.

    After the first polynomial has raised the small singular values, the others can be applied to the Gram matrices
    (N, R, R), which is faster.
    """
    wide = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + 1e-7)
    wide = wide.to(choose_precision("auto", matrices.device))
    gram = wide @ wide.mT
    bound = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True) + 1e-7  # upper bounds on squared singular values
    wide, gram = wide * bound.rsqrt(), gram / bound
    (a, b, c), second, *others = POLAR_EXPRESS
    wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    gram = wide @ wide.mT
    a, b, c = second
    rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # bG + cG^2
    product = rest + a * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for next_a, b, c in others:
        gram = torch.baddbmm(gram, rest, gram, beta=a)  # (aI + rest) G (aI + rest), in two steps
        gram = torch.baddbmm(gram, gram, rest, beta=a)
        a, rest = next_a, torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, rest, product, beta=a)
    return (product @ wide).to(matrices.dtype)


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Muon:
    return Muon(parameter_groups(model, lr, weight_decay))


def lr_factor(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """The learning-rate schedule, step -> factor of the peak: linear warm-up times a cosine."""

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / max(1, warmup_steps))
        progress = min(1.0, step / max(1, total_steps))
        return warmup * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + cos(pi * progress)) / 2)

    return factor


class WeightAverage:
    """An exponential moving average of a model's weights and buffers, in `module`.

    Computed by torch.optim.swa_utils, whose AveragedModel would synchronize with the GPU at every update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.updates = 0
        self.average = get_ema_multi_avg_fn(decay)
        # collected once, since walking through the modules takes about as long as the update
        own, new = ([*module.parameters(), *module.buffers()] for module in (self.module, model))
        floats = [value.is_floating_point() for value in own]
        self.floats = list(compress(own, floats)), list(compress(new, floats))
        self.integers = list(compress(own, map(not_, floats))), list(compress(new, map(not_, floats)))

    @torch.no_grad()
    def update(self) -> None:
        """Move toward the weights of the model; integers, and at the first update all values, are copied."""
        if self.updates:
            self.average(*self.floats, None)
        else:
            torch._foreach_copy_(*self.floats)
        if self.integers[0]:
            torch._foreach_copy_(*self.integers)
        self.updates += 1


def build_ema(model: nn.Module, total_steps: int, fraction: float) -> WeightAverage:
    """A weight average whose horizon is a fraction of the total steps."""
    return WeightAverage(model, decay=1 - 1 / max(2, ceil(total_steps * fraction)))


def freeze_backbone(model: YoloBody, frozen: bool) -> None:
    """Freeze or unfreeze the backbone, including its batch-norm statistics; call it after `model.train()`."""
    model.backbone.requires_grad_(not frozen)
    if frozen:
        model.backbone.eval()
