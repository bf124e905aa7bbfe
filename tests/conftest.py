"""Paths and small data sets that the tests share."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import train
from tools import make_demo_data
from utils.system.cli import run_script

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REFERENCE = SHARED / "reference"
ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0), (135.0, 169.0), (344.0, 319.0))
MASKS = [[3, 4, 5], [1, 2, 3]]

needs_shared = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the reference values are not at {REFERENCE}")


def reference_value(name: str, shape: list[int], index: int) -> torch.Tensor:
    """The filling rule of the reference's README."""
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


@pytest.fixture(scope="session")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A devkit with a small drawn set, Demo, of 24 training, 6 validation and 6 test images."""
    folder = tmp_path_factory.mktemp("devkit")
    make_demo_data.main(make_demo_data.Config(str(folder / "Demo"), train=24, val=6, test=6))
    return folder


def small_run(devkit: Path, **changes: Any) -> train.Config:
    """Settings for a run of seconds on the drawn set of a devkit, on the CPU."""
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


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script of the project as a user does."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def expect_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """A call of a script that must end with exit code 2 and one sentence on stderr that has all the words."""

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
