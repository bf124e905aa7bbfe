"""Run train.py in a process in which something goes wrong at a named point.

A point is named after what the run is about to do or has just done: "batch 2.1" is reached before the first batch of
the second epoch, "last.safetensors: half written" in the middle of saving that file.
"""

import errno
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import train
import utils.data.cache
import utils.system.files
import utils.training.batch_size
import utils.training.engine
import utils.training.run_folder
from tests.narrow_network import use_narrow_network
from utils.data.loader import EpochBatches
from utils.system.cli import run_script
from utils.system.signals import Stopped
from utils.training.run_folder import RunFolder
from utils.training.trainer import Trainer
from utils.training.training_state import Progress
from utils.weights.checkpoint import PREVIOUS

TIMEOUT = 120  # seconds for a run
# the points of an atomic write, in their order; the backup is made between "fsynced" and "rename"
SAVING = (
    "opened", "half written", "written", "fsync", "fsynced", "rename", "renamed", "folder fsync", "folder fsynced",
)  # fmt: skip
BACKUP = ("back up", "backed up")


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run."""

    at: str = ""  # name of the point
    occurrence: int = 1  # how many times the point is reached until it happens
    action: str = ""  # kill, disk full, wait, SIGTERM or SIGINT
    non_finite: dict[tuple[int, int], str] = field(default_factory=dict)  # what is not finite, by epoch and batch
    skipped: tuple[tuple[int, int], ...] = ()  # epochs and batches that are skipped from the start
    broken: str = ""  # a function or point that raises: add_scalar, draw_training, write_image or decode
    pictures: bool = False  # write TensorBoard events, curves and pictures, which takes time
    full_size: bool = False  # train the whole network, not one with an eighth of the channels, and write the report
    user: int = 0  # user ID of the run
    save_interval: float = 0.0  # seconds; by default all epochs end with a checkpoint, so that more points are reached


class FaultInjector:
    """Patches the current process so that the fault happens, and records the points that are reached."""

    def __init__(self, fault: Fault, record: Path) -> None:
        self.fault = fault
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.counts: Counter[str] = Counter()
        self.disk_full = False
        self.renamed = ""  # the file whose folder is flushed next
        self.batch: tuple[int, int] | None = None  # epoch and batch in training
        self.phase = ""  # the phase that is running
        utils.training.engine.SAVE_INTERVAL = fault.save_interval
        if not fault.pictures:
            RunFolder.attempt = lambda *_: None
        if not fault.full_size:
            train.write_report = lambda run, *_: run.path
            use_narrow_network(pytest.MonkeyPatch())
        self.patch_files()
        self.patch_phases()
        self.patch_batches()
        self.patch_close()
        self.break_function()
        if fault.skipped:
            train.Progress = partial(Progress, skipped=list(fault.skipped))

    def reach(self, point: str) -> None:
        """Record a point, and let the fault happen if it is planned there."""
        os.write(self.record, f"{point}\n".encode())
        self.counts[point] += 1
        if point == self.fault.at and self.counts[point] == self.fault.occurrence:
            match self.fault.action:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "disk full":
                    self.disk_full = True
                case "wait":
                    time.sleep(TIMEOUT)
                case name:
                    os.write(self.record, f"signal {time.monotonic()}\n".encode())
                    os.kill(os.getpid(), signal.Signals[name])
        if self.disk_full and ": " in point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def patch_files(self) -> None:
        fsync, rename = os.fsync, os.replace

        def watched_fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            point = f"{self.renamed}: folder fsync" if path.is_dir() else f"{file_name(path)}: fsync"
            self.reach(point)
            fsync(descriptor)
            self.reach(f"{point}ed")

        def watched_rename(source: Path, target: Path) -> None:
            before, after = BACKUP if Path(target).name == PREVIOUS else ("rename", "renamed")
            self.renamed = file_name(source)
            self.reach(f"{self.renamed}: {before}")
            rename(source, target)
            self.reach(f"{self.renamed}: {after}")

        def watched_open(path: Path, mode: str = "r", **options: Any) -> Any:
            file = open(path, mode, **options)  # noqa: SIM115, the caller closes it
            return file if mode in ("r", "a+b") else WatchedFile(self, file, file_name(path))

        os.fsync, os.replace = watched_fsync, watched_rename
        utils.system.files.open = utils.training.run_folder.open = watched_open

    def patch_phases(self) -> None:
        def watch(owner: object, name: str, point: str) -> None:
            function = getattr(owner, name)

            def watched(*arguments: Any, **keywords: Any) -> Any:
                self.reach(point)
                if self.fault.broken == point:
                    raise RuntimeError(f"{point} does not work")
                self.phase = point
                try:
                    return function(*arguments, **keywords)
                finally:
                    self.phase = ""

            setattr(owner, name, watched)

        watch(utils.data.cache, "load_sample", "decode")
        watch(utils.training.batch_size, "try_steps", "dry run")
        watch(utils.training.engine, "evaluate", "evaluate")
        watch(train, "write_report", "report")

    def patch_batches(self) -> None:
        load, backward = EpochBatches.load, Trainer.backward

        def watched_load(batches: EpochBatches, numbers: Sequence[int], *arguments: Any) -> Iterator:
            with closing(load(batches, iter(numbers), *arguments)) as loaded:
                for number, batch in zip(numbers, loaded, strict=False):
                    if self.phase != "dry run":
                        self.batch = batches.epoch, number
                        self.reach(f"batch {batches.epoch + 1}.{number + 1}")
                    yield batch

        def spoiled_backward(trainer: Trainer, images: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
            kind, self.batch = self.fault.non_finite.get(self.batch, ""), None
            value = math.inf if "inf" in kind else math.nan
            parameter, loss = next(trainer.state.model.parameters()), trainer.loss
            hook = parameter.register_hook(lambda gradient: gradient + value) if "gradient" in kind else None
            if "loss" in kind:
                trainer.loss = lambda *arguments: {name: term * value for name, term in loss(*arguments).items()}
            try:
                return backward(trainer, images + value if kind == "images" else images, *rest, **keywords)
            finally:
                trainer.loss = loss
                if hook is not None:
                    hook.remove()

        EpochBatches.load, Trainer.backward = watched_load, spoiled_backward

    def patch_close(self) -> None:
        """Send a second signal while the run stops because of the first."""
        close = RunFolder.close

        def watched_close(run: RunFolder) -> None:
            if isinstance(sys.exc_info()[1], Stopped):
                os.kill(os.getpid(), signal.Signals[self.fault.action])
            close(run)

        RunFolder.close = watched_close

    def break_function(self) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        if self.fault.broken == "add_scalar":
            SummaryWriter.add_scalar = fail
        elif self.fault.broken in ("draw_training", "write_image"):
            setattr(utils.training.run_folder, self.fault.broken, fail)


class WatchedFile:
    """A file that is written in two halves, with a point between them."""

    def __init__(self, injector: FaultInjector, file: Any, name: str) -> None:
        self.injector, self.file, self.name = injector, file, name
        injector.reach(f"{name}: opened")

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> None:
        data = data if isinstance(data, str) else memoryview(data).cast("B")
        middle = len(data) // 2
        self.file.write(data[:middle])
        self.file.flush()
        self.injector.reach(f"{self.name}: half written")
        self.file.write(data[middle:])
        self.injector.reach(f"{self.name}: written")


def file_name(path: str | Path) -> str:
    """Name of a file without the temporary suffix; "images" for an image cache, whose name is a fingerprint."""
    name = Path(path).name.removesuffix(utils.system.files.TEMPORARY)
    return "images" if name.endswith(".images") else name


@dataclass
class NoFlags:
    """No flags."""


def run_with_fault(config: train.Config, fault: Fault, folder: Path, name: str) -> None:
    """Train in the current process, a fork; writes the files `name`.out, .err and .points to `folder`."""
    for descriptor, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default one is shared by processes, and a killed one never releases it
    FaultInjector(fault, folder / f"{name}.points")
    if fault.user:
        os.setuid(fault.user)
    sys.argv = ["train.py"]
    run_script(lambda _: train.main(config), NoFlags)
