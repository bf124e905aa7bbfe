"""What the processes do that test_distributed starts with torchrun: python tests/training/worker.py TASK ARGUMENTS"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
import utils.data.cache
from utils.system.cli import run_script
from utils.system.distributed import ProcessGroup, join_process_group
from utils.system.errors import UserError
from utils.system.signals import Stopped, StopSignals
from utils.training.batch_size import TRIAL_STEPS
from utils.training.trainer import TrainingState
from utils.weights.checkpoint import LAST


def evaluating(module: nn.Module, _: bool = True) -> nn.Module:
    """In place of `train`: stay in eval mode, in which no image of a batch depends on the others."""
    return nn.Module.train(module, False)


def train_recorded(config: train.Config, group: ProcessGroup) -> Tensor:
    """A run without batch statistics; returns what each batch gave, (epochs, batches, columns)."""
    rows = []
    real = train.mean_losses

    def record(trainer: train.Trainer) -> dict[str, float]:
        rows.append(trainer.state.losses.clone())
        return real(trainer)

    def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """With which small differences stay small, unlike with Muon, which works in bf16."""
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)

    with (
        patch.object(train, "build_optimizer", sgd),
        patch.object(nn.BatchNorm2d, "train", evaluating),
        patch.object(train, "mean_losses", record),
        StopSignals() as stop,
    ):
        train.train(config, stop, group)
    return torch.stack(rows)


def mistake(config: train.Config, group: ProcessGroup) -> str:
    """The sentence that a run ends with."""
    try:
        train.train(config, StopSignals(), group)
    except UserError as error:
        return str(error)
    return ""


def stop_in_validation(config: train.Config, group: ProcessGroup) -> bool:
    """Whether a signal that only the last process gets while it validates stops this one."""
    real = train.validate
    stop = StopSignals()

    def validate(*arguments: object) -> object:
        if group.rank == group.size - 1:
            stop.receive(signal.SIGTERM, None)
        return real(*arguments)

    with patch.object(train, "validate", validate):
        try:
            train.train(config, stop, group)
        except Stopped:
            return True
    return False


def compare(plan: str, out: str) -> None:
    """A whole run, runs to compare with those of one process, and ends of runs; writes what all processes found."""
    parts = json.loads(Path(plan).read_text())
    decoded = []
    real = utils.data.cache.load_sample

    def load_sample(sample: utils.data.cache.Sample, **others: object) -> object:
        decoded.append(sample.name)
        return real(sample, **others)

    with patch.object(utils.data.cache, "load_sample", load_sample), join_process_group(torch.device("cpu")) as group:
        train.train(train.Config(**parts["whole"]), StopSignals(), group)
        losses = {name: train_recorded(train.Config(**own), group) for name, own in parts["runs"].items()}
        count = len(decoded)
        mistakes = [mistake(train.Config(**own), group) for own in parts["mistakes"]]
        stopped = stop_in_validation(train.Config(**parts["stopped"]), group)
        found = group.all_gather({"decoded": count, "mistakes": mistakes, "stopped": stopped})
    if group.is_main:
        torch.save({"losses": losses, "found": found}, out)


def act_after_steps(act: Callable[[int], None]) -> None:
    """Train as the command line says, and call `act` after each step with its number, from 1."""
    real = TrainingState.step
    number = -TRIAL_STEPS

    def step(state: TrainingState) -> None:
        nonlocal number
        real(state)
        number += 1
        if number > 0:
            act(number)

    with patch.object(TrainingState, "step", step):
        run_script(train.main, train.Config)


def last_checkpoint() -> Path:
    return Path(sys.argv[sys.argv.index("--run-dir") + 1]) / LAST


def synchronize(path: Path) -> None:
    """Until it is written, which the first process does in a thread."""
    while not path.exists():
        time.sleep(0.01)


def die() -> None:
    """Lose the last process before the first checkpoint, the first one after it, and then none."""
    attempt, rank, size = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE"))
    last = last_checkpoint()

    def act(number: int) -> None:
        if attempt == 0 and rank == size - 1 and number == 1:
            assert not last.exists()
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 1 and rank == 0 and number == 2:
            synchronize(last)
            os.kill(os.getpid(), signal.SIGKILL)

    act_after_steps(act)


def dawdle() -> None:
    """Take long for each step after the first checkpoint, so that a signal comes in one."""
    last = last_checkpoint()

    def act(number: int) -> None:
        if number > 1:
            synchronize(last)
            time.sleep(1)

    act_after_steps(act)


if __name__ == "__main__":
    task = {"compare": compare, "die": die, "dawdle": dawdle}[sys.argv.pop(1)]
    task(*sys.argv[1:]) if task is compare else task()
