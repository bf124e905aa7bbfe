"""Tasks for two processes, which launcher.py starts."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import eval as eval_script
import train
import utils.data.cache
import utils.training.trainer
from tests.narrow_network import use_narrow_network
from utils.system.cli import run_script
from utils.system.distributed import ProcessGroup, join_process_group
from utils.system.errors import UserError
from utils.system.signals import Stopped, StopSignals
from utils.training import engine
from utils.training.batch_size import TRIAL_STEPS
from utils.training.run_folder import RunFolder
from utils.training.trainer import Trainer
from utils.training.training_state import TrainingState
from utils.weights.checkpoint import LAST


def train_directly(config: train.Config, group: ProcessGroup, stop: StopSignals | None = None) -> Path:
    """Train in a process group that exists already."""
    return train.train(config, train.changed_settings(config), stop or StopSignals(), group)


def evaluating(module: nn.Module, _: bool = True) -> nn.Module:
    """Replaces `train`: stay in eval mode, in which the images of a batch do not depend on each other."""
    return nn.Module.train(module, False)


def train_recorded(config: train.Config, group: ProcessGroup) -> Tensor:
    """Train without batch statistics; returns the losses of each batch, (epochs, batches, COLUMNS)."""
    rows = []
    real = engine.mean_losses

    def record(trainer: Trainer) -> dict[str, float]:
        rows.append(trainer.state.losses.clone())
        return real(trainer)

    def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """With SGD small differences stay small, unlike with Muon, which computes in bf16."""
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)

    with (
        patch.object(utils.training.trainer, "build_optimizer", sgd),
        patch.object(nn.BatchNorm2d, "train", evaluating),
        patch.object(engine, "mean_losses", record),
        StopSignals() as stop,
    ):
        train_directly(config, group, stop)
    return torch.stack(rows)


def find_error(config: train.Config, group: ProcessGroup) -> str:
    """The message of the error that a run ends with."""
    try:
        train_directly(config, group)
    except UserError as error:
        return str(error)
    return ""


def stop_in_validation(config: train.Config, group: ProcessGroup) -> bool:
    """Whether a signal to the last process during validation stops this process."""
    real = engine.validate
    stop = StopSignals()

    def validate(*arguments: object) -> object:
        if group.rank == group.size - 1:
            stop.receive(signal.SIGTERM, None)
        return real(*arguments)

    with patch.object(engine, "validate", validate):
        try:
            train_directly(config, group, stop)
        except Stopped:
            return True
    return False


def with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Restore the tuples that JSON stores as lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def compare(plan: str, out: str) -> None:
    """Train, evaluate, train the runs to compare and those that fail; writes what all processes found."""
    parts = json.loads(Path(plan).read_text(), object_hook=with_tuples)
    decoded = []
    real = utils.data.cache.load_sample

    def load_sample(sample: utils.data.cache.Sample, **others: object) -> object:
        decoded.append(sample.name)
        return real(sample, **others)

    with patch.object(utils.data.cache, "load_sample", load_sample), join_process_group("cpu") as group:
        train_directly(train.Config(**parts["whole"]), group)
        losses = {name: train_recorded(train.Config(**own), group) for name, own in parts["runs"].items()}
        count = len(decoded)
        with patch.object(eval_script, "join_process_group", lambda _: nullcontext(group)):
            eval_script.main(eval_script.Config(**parts["evaluation"]))
        errors = [find_error(train.Config(**own), group) for own in parts["invalid"]]
        stopped = stop_in_validation(train.Config(**parts["stopped"]), group)
        found = group.all_gather({"decoded": count, "errors": errors, "stopped": stopped})
    if group.is_main:
        torch.save({"losses": losses, "found": found}, out)


save_checkpoints = RunFolder.save_checkpoints


def save_and_wait(run: RunFolder, *checkpoints: object) -> None:
    """Replaces `RunFolder.save_checkpoints`: save before training continues."""
    save_checkpoints(run, *checkpoints)
    run.finish_saving()


def act_after_steps(act: Callable[[int], None]) -> None:
    """Train with the settings of the command line, and call `act` after each step with its number, from 1."""
    real = TrainingState.step
    number = -TRIAL_STEPS

    def step(state: TrainingState) -> None:
        nonlocal number
        real(state)
        number += 1
        if number > 0:
            act(number)

    with patch.object(TrainingState, "step", step), patch.object(RunFolder, "save_checkpoints", save_and_wait):
        run_script(train.main, train.Config)


def last_checkpoint() -> Path:
    return Path(sys.argv[sys.argv.index("--run-dir") + 1]) / LAST


def die() -> None:
    """Kill the last process before the first checkpoint, on the second attempt the first one after it."""
    attempt, rank, size = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE"))
    last = last_checkpoint()

    def act(number: int) -> None:
        if attempt == 0 and rank == size - 1 and number == 1:
            assert not last.exists()
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 1 and rank == 0 and number == 2:
            assert last.exists()
            os.kill(os.getpid(), signal.SIGKILL)

    act_after_steps(act)


def terminate() -> None:
    """Send SIGTERM to torchrun after the second step, and write the time; each process waits until the signal came."""
    received = threading.Event()
    receive = StopSignals.receive

    def receive_and_tell(stop: StopSignals, *arguments: object) -> None:
        receive(stop, *arguments)
        received.set()

    def act(number: int) -> None:
        if number == 2:
            if int(os.environ["RANK"]) == 0:
                last_checkpoint().with_name("signalled").write_text(str(time.monotonic()))
                os.kill(int(os.environ["AGENT_PID"]), signal.SIGTERM)
            assert received.wait(60)

    with patch.object(StopSignals, "receive", receive_and_tell):
        act_after_steps(act)


TASKS: dict[str, Callable[..., None]] = {"compare": compare, "die": die, "terminate": terminate}
TASKS["train"] = lambda: run_script(train.main, train.Config)


def run_task(task: str, *arguments: str) -> None:
    """Run a task with its command-line arguments and a narrow network."""
    sys.argv = [__file__, *arguments]
    patch = pytest.MonkeyPatch()
    use_narrow_network(patch)
    if task != "compare":
        patch.setattr(train, "write_report", lambda run, *_: run.path)  # which takes long
    TASKS[task](*(arguments if task == "compare" else ()))
