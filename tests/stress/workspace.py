"""Start small training runs with faults, and compare what they leave with an undisturbed run."""

import io
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import pytest

import train
from tests.conftest import ROOT, small_run
from tests.stress.fault_injection import TIMEOUT, Fault, run_with_fault
from tools import make_demo_data
from utils.system.files import TEMPORARY
from utils.weights.checkpoint import BEST, LAST, digest, is_resumable, load_checkpoint

SUCCESS, USER_ERROR, INTERRUPTED, TERMINATED, KILLED = 0, 2, 130, 143, -9  # exit codes


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int  # exit code, or minus the signal that killed the process
    out: str
    err: str
    points: list[str]  # that were reached
    stopping_seconds: float  # from the signal to the end

    def expect(self, code: int, *words: str) -> "Outcome":
        """Raise AssertionError for another exit code, missing words, a traceback or not exactly one error message."""
        output = f"{self.out}\n{self.err}"
        assert self.code == code, f"exit code {self.code} instead of {code}\n{output}"
        assert "Traceback" not in self.err, output
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == USER_ERROR), output
        for word in words:
            assert word in output, f"{word!r} is missing in\n{output}"
        return self


class RunProcess:
    """A training run in a process forked from one that has imported everything and computed nothing."""

    numbers = itertools.count()

    def __init__(self, config: train.Config, fault: Fault, folder: Path) -> None:
        name = f"run{next(self.numbers)}"
        self.files = [folder / f"{name}.{suffix}" for suffix in ("out", "err", "points")]
        self.process = get_context("forkserver").Process(target=run_with_fault, args=(config, fault, folder, name))
        self.process.start()

    def points(self) -> list[str]:
        return self.files[-1].read_text().splitlines() if self.files[-1].exists() else []

    def wait_for(self, point: str) -> None:
        end = time.monotonic() + TIMEOUT
        while point not in self.points():
            assert time.monotonic() < end, f"{point} was not reached"
            assert self.process.is_alive(), f"the run ended before {point}"
            time.sleep(0.02)

    def finish(self, timeout: float = TIMEOUT) -> Outcome:
        """Wait for the end; kill the process after the timeout in seconds."""
        self.process.join(timeout)
        self.process.kill()  # does nothing if it has ended
        self.process.join()
        ended, points = time.monotonic(), self.points()
        out, err, _ = (path.read_text() if path.exists() else "" for path in self.files)
        for path in self.files:
            path.unlink(missing_ok=True)
        signals = [float(point.split()[1]) for point in points if point.startswith("signal ")]
        return Outcome(self.process.exitcode, out, err, points, ended - signals[0] if signals else 0.0)


def read_result(folder: Path) -> dict[str, Any]:
    """Digests, metrics and information left by a run, without times: equal for equal runs."""
    last, best = load_checkpoint(folder / LAST), load_checkpoint(folder / BEST)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tensors = {"weights": last.weights, "training state": last.training, "best weights": best.weights}
    for name, values in tensors.items():
        assert all(value.isfinite().all() for value in values.values()), f"the {name} are not finite"
    assert [record["epoch"] for record in records] == list(range(1, last.info["epoch"] + 1)), records
    assert temporary_files(folder) == []
    metrics = [{name: value for name, value in record.items() if "second" not in name} for record in records]
    return {name: digest(values) for name, values in tensors.items()} | {"info": last.info, "metrics": metrics}


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.glob(f"*{TEMPORARY}"))


def assert_equal(result: dict[str, Any], expected: dict[str, Any]) -> None:
    different = [name for name in expected if result[name] != expected[name]]
    assert different == [], f"{', '.join(different)} differ from those of an undisturbed run"


class Workspace:
    """A folder with a generated dataset and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.devkit = folder, folder / "devkit"
        self.numbers = itertools.count()
        self.expected: dict[str, dict[str, Any]] = {}  # results of undisturbed runs
        with redirect_stdout(io.StringIO()):
            make_demo_data.main(make_demo_data.Config(str(self.devkit / "Demo"), train=25, val=4, test=1))
        splits = self.devkit / "Demo" / "ImageSets" / "Main"
        names = (splits / "train.txt").read_text().splitlines()[:12]
        (splits / "few.txt").write_text("\n".join(names) + "\n")

    def short_config(self, **changes: Any) -> train.Config:
        """A run of 3 epochs of 3 batches in a new folder."""
        settings = {"train_sets": ("Demo/few",), "epochs": 3, "batch_size": 4, "nominal_batch": 4, "eval_every": 2}
        settings |= {"input_size": (32, 32), "cache": "ram", "run_dir": str(self.folder / f"logs{next(self.numbers)}")}
        return small_run(Path(changes.pop("devkit", self.devkit)), **settings | changes)

    def long_config(self, **changes: Any) -> train.Config:
        """A run of 2 epochs of 25 batches, so that the losses are checked within an epoch too, after 20."""
        settings = {"train_sets": ("Demo/train",), "batch_size": 1, "nominal_batch": 1, "epochs": 2}
        settings |= {"input_size": (64, 64)}  # batch norm needs more than one value per channel
        return self.short_config(**settings | changes)

    def start(self, config: train.Config, **fault: Any) -> RunProcess:
        return RunProcess(config, Fault(**fault), self.folder)

    def run(self, config: train.Config, **fault: Any) -> Outcome:
        return self.start(config, **fault).finish()

    def resume(self, config: train.Config, *words: str, **fault: Any) -> None:
        """Complete a run, from the start if it has not written a checkpoint yet."""
        resumed = replace(config, resume=is_resumable(Path(config.run_dir)))
        self.run(resumed, **fault).expect(SUCCESS, *words)

    def undisturbed(self, config: train.Config, **fault: Any) -> dict[str, Any]:
        """Result of an undisturbed run, computed once for equal settings."""
        key = str((replace(config, run_dir=""), fault))
        if key not in self.expected:
            own = replace(config, run_dir=self.short_config().run_dir)
            self.run(own, **fault).expect(SUCCESS)
            self.expected[key] = read_result(Path(own.run_dir))
            shutil.rmtree(own.run_dir)
        return self.expected[key]

    def compare(self, config: train.Config, expected: dict[str, Any] | None = None) -> None:
        """Raise AssertionError unless the finished run equals an undisturbed one; deletes its folder."""
        assert_equal(read_result(Path(config.run_dir)), expected or self.undisturbed(config))
        shutil.rmtree(config.run_dir)

    @cached_property
    def points(self) -> list[str]:
        """The points of a short run, in their order."""
        config = self.short_config()
        outcome = self.run(config).expect(SUCCESS)
        shutil.rmtree(config.run_dir)
        return outcome.points

    @property
    def saving_points(self) -> dict[str, int]:
        """Points of saving files, and the occurrence to test: the second, which replaces a file, if there is one."""
        return {point: min(count, 2) for point, count in Counter(self.points).items() if ": " in point}


@contextmanager
def open_workspace() -> Iterator[Workspace]:
    """A workspace in shared memory if there is room, so that the speed of the disk does not matter."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 4e9
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        get_context("forkserver").set_forkserver_preload(["tests.stress.fault_injection"])
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory(prefix="stress", dir=memory if has_room else None) as folder:
        os.chmod(folder, 0o755)  # readable by the user without rights
        yield Workspace(Path(folder))
