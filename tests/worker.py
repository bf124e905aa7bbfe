"""What the processes do that test_distributed starts with torchrun: python tests/worker.py TASK ARGUMENTS"""

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import utils.cache
from utils.capacity import TRIAL_STEPS
from utils.checkpoint import LAST
from utils.distributed import Ranks, join_ranks
from utils.errors import UserError, run_script
from utils.interrupt import Stopped, StopSignals
from utils.training import TrainingState


def evaluating(module: nn.Module, _: bool = True) -> nn.Module:
    """In place of `train`: stay in eval mode, in which no image of a batch depends on the others."""
    return nn.Module.train(module, False)


def train_recorded(config: train.Config, ranks: Ranks) -> Tensor:
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
        train.train(config, stop, ranks)
    return torch.stack(rows)


def mistake(config: train.Config, ranks: Ranks) -> str:
    """The sentence that a run ends with."""
    try:
        train.train(config, StopSignals(), ranks)
    except UserError as error:
        return str(error)
    return ""


def stop_in_validation(config: train.Config, ranks: Ranks) -> bool:
    """Whether a signal that only the last process gets while it validates stops this one."""
    real = train.validate
    stop = StopSignals()

    def validate(*arguments: object) -> object:
        if ranks.rank == ranks.size - 1:
            stop.receive(signal.SIGTERM, None)
        return real(*arguments)

    with patch.object(train, "validate", validate):
        try:
            train.train(config, stop, ranks)
        except Stopped:
            return True
    return False


def compare(plan: str, out: str) -> None:
    """A whole run, runs to compare with those of one process, and ends of runs; writes what all processes found."""
    parts = json.loads(Path(plan).read_text())
    decoded = []
    real = utils.cache.load_sample

    def load_sample(sample: utils.cache.Sample, **others: object) -> object:
        decoded.append(sample.name)
        return real(sample, **others)

    with patch.object(utils.cache, "load_sample", load_sample), join_ranks(torch.device("cpu")) as ranks:
        train.train(train.Config(**parts["whole"]), StopSignals(), ranks)
        losses = {name: train_recorded(train.Config(**own), ranks) for name, own in parts["runs"].items()}
        count = len(decoded)
        mistakes = [mistake(train.Config(**own), ranks) for own in parts["mistakes"]]
        stopped = stop_in_validation(train.Config(**parts["stopped"]), ranks)
        found = ranks.everyone({"decoded": count, "mistakes": mistakes, "stopped": stopped})
    if ranks.first:
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


def wait_for(path: Path) -> None:
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
            wait_for(last)
            os.kill(os.getpid(), signal.SIGKILL)

    act_after_steps(act)


def dawdle() -> None:
    """Take long for each step after the first checkpoint, so that a signal comes in one."""
    last = last_checkpoint()

    def act(number: int) -> None:
        if number > 1:
            wait_for(last)
            time.sleep(1)

    act_after_steps(act)


if __name__ == "__main__":
    task = {"compare": compare, "die": die, "dawdle": dawdle}[sys.argv.pop(1)]
    task(*sys.argv[1:]) if task is compare else task()
