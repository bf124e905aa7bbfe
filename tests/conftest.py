"""Settings, paths and small datasets shared by all tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it

import numpy as np
import pytest
import torch

import train
from tools import make_demo_data
from utils.system.cli import run_script
from utils.system.files import lock

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REFERENCE = SHARED / "reference"
ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0), (135.0, 169.0), (344.0, 319.0))
MASKS = [[3, 4, 5], [1, 2, 3]]
SLOWEST_FILES = (  # run first, so that the workers finish at about the same time
    "test_exporters.py", "test_distributed.py", "test_documentation.py", "test_killed_runs.py", "test_train.py",
    "test_benchmarks.py", "test_compare_attention.py", "test_attention.py", "test_backends.py",
)  # fmt: skip

needs_shared = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the reference values are not in {REFERENCE}")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the long versions of the stress tests")
    parser.addoption("--seconds-per-reader", type=float, default=0, help="how long to read random files; 0: briefly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect long tests unless --long is given, and sort the slowest files to the front."""
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    rank = {name: index for index, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def reference_value(name: str, shape: list[int], index: int) -> torch.Tensor:
    """Parameter values by the rule in the README of the reference values."""
    r = np.random.default_rng(index)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("running_var"):
        values = r.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        values = r.normal(0, 0.1, shape)
    elif name.endswith("bias"):
        values = r.normal(0, 0.05, shape)
    elif len(shape) == 1:
        values = r.uniform(0.5, 1.5, shape)
    else:
        values = r.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker that asks for it fills; the other workers wait and share it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with lock(folder.with_name(f"{name}.lock"), wait=True):
        if not folder.exists():
            unfinished = folder.with_name(f"{name}.unfinished")
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A devkit with a small generated set, Demo, of 24 training, 6 validation and 6 test images; do not change it."""

    def make(folder: Path) -> None:
        make_demo_data.main(make_demo_data.Config(str(folder / "Demo"), train=24, val=6, test=6))

    return make_once(tmp_path_factory, "devkit", make)


def small_run(devkit: Path, **changes: Any) -> train.Config:
    """Settings for a run of a few seconds on the CPU with the generated set of a devkit."""
    settings = {
        "devkit": str(devkit),
        "train_sets": ("Demo/train",),
        "val_sets": ("Demo/val",),
        "classes": str(devkit / "Demo" / "classes.txt"),
        "anchors": str(ROOT / "model_data" / "yolo_anchors.txt"),
        "input_size": (64, 64),
        "device": "cpu",
    }
    return train.Config(**settings | changes)


def trained_config(devkit: Path, run_dir: str = "") -> train.Config:
    """The settings of `trained_run`."""
    changes = {"epochs": 4, "batch_size": 8, "nominal_batch": 16, "freeze_epochs": 1, "eval_every": 2, "phi": 4}
    return small_run(devkit, input_size=(96, 128), run_dir=run_dir, **changes)


@pytest.fixture(scope="session")
def trained_run(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with attention; do not change it."""
    return make_once(tmp_path_factory, "trained_run", lambda folder: train.main(trained_config(devkit, str(folder))))


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script of the project in a process of its own, as a user does."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def expect_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Call a script that must exit with code 2 and one line on stderr that contains all of `words`."""

    def expect(script: ModuleType, arguments: Sequence[object], *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_script(script.main, script.Config)
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        for word in words:
            assert word in errors[0], errors[0]

    return expect


@dataclass(frozen=True)
class NoSettings:
    """The settings of a script without any."""


@dataclass(frozen=True)
class Outcome:
    """How a script ended."""

    code: int
    errors: list[str]
    output: str


@pytest.fixture
def call_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call a script's main function in this process, with the exit code and messages of its command line."""

    def call(main: Callable[..., object], config_type: type = NoSettings, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_script(main, config_type)
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        return Outcome(code, errors, printed.out)

    return call
