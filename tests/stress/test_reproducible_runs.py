"""Equal settings and data give equal results, also with batches that are not finite; changed data is refused."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import train
from tests.conftest import ROOT
from tests.stress.fault_injection import TIMEOUT
from tests.stress.workspace import SUCCESS, TERMINATED, USER_ERROR, Workspace
from utils.data.loader import epoch_order
from utils.weights.checkpoint import LAST, load_checkpoint

LONG = pytest.mark.long
ACCUMULATED = {"batch_size": 2, "nominal_batch": 4, "epochs": 2}


def batch_names(workspace: Workspace, config: train.Config, epoch: int, batch: int) -> str:
    """Names of the images in a batch, as they are reported."""
    split = config.train_sets[0].removeprefix("Demo/")
    names = (workspace.devkit / "Demo" / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    order, _ = epoch_order(config.seed, epoch, len(names))
    return ", ".join(names[i] for i in order[batch * config.batch_size :][: config.batch_size])


def check_non_finite(workspace: Workspace, config: train.Config, kinds: dict[tuple[int, int], str], stop: str) -> None:
    """A run with non-finite batches, stopped at a point and resumed, equals one that skips them from the start."""
    expected = workspace.undisturbed(config, skipped=tuple(sorted(kinds)))
    output = ""
    if stop:
        output = workspace.run(config, non_finite=kinds, at=stop, action="SIGTERM").expect(TERMINATED).out
    output += workspace.run(replace(config, resume=bool(stop)), non_finite=kinds).expect(SUCCESS).out
    lines = [line for line in output.splitlines() if "not finite" in line]
    assert len(lines) == len(kinds), output
    for (epoch, batch), line in zip(sorted(kinds), lines, strict=True):
        assert f"epoch {epoch + 1}, batch {batch + 1}" in line
        assert batch_names(workspace, config, epoch, batch) in line
    workspace.compare(config, expected)


@pytest.mark.parametrize(
    ("changes", "kinds", "stop"),
    [
        ({}, {(0, 0): "gradient nan", (1, 1): "loss inf", (1, 2): "images"}, ""),
        (ACCUMULATED, {(1, 2): "images"}, ""),
        pytest.param({}, {(1, 1): "loss inf"}, "", marks=LONG),
        pytest.param({}, {(1, 1): "gradient nan"}, "", marks=LONG),
        pytest.param({}, {(1, 1): "gradient inf"}, "", marks=LONG),
        pytest.param({}, {(1, 1): "images"}, "", marks=LONG),
        pytest.param({}, {(0, 1): "loss nan"}, "batch 2.1", marks=LONG),
        pytest.param({"checkpoint_every": 1}, {(1, 1): "images"}, "batch 2.3", marks=LONG),
    ],
)
def test_non_finite_batches_are_skipped(workspace, changes, kinds, stop):
    check_non_finite(workspace, workspace.short_config(**changes), kinds, stop)


@pytest.mark.parametrize(
    ("epochs", "kinds", "stop"),
    [
        (1, {(0, 10): "images"}, "batch 1.23"),
        pytest.param(2, {(0, 10): "images"}, "batch 1.15", marks=LONG),
        pytest.param(2, {(1, 22): "gradient nan"}, "", marks=LONG),
        pytest.param(2, {(0, 3): "images", (0, 5): "loss nan", (1, 19): "gradient inf"}, "batch 2.22", marks=LONG),
    ],
)
def test_non_finite_batches_are_skipped_within_long_epochs(workspace, epochs, kinds, stop):
    check_non_finite(workspace, workspace.long_config(epochs=epochs), kinds, stop)


def test_fourth_non_finite_batch_ends_the_run_with_a_good_checkpoint(workspace):
    config = workspace.short_config(epochs=2)
    kinds = {(0, 0): "images", (0, 2): "loss nan", (1, 0): "gradient nan", (1, 1): "images"}
    workspace.run(config, non_finite=kinds).expect(USER_ERROR, "epoch 2, batch 2", "4th time", "ower lr")
    checkpoint = load_checkpoint(Path(config.run_dir) / LAST)
    assert checkpoint.info["epoch"] == 1
    assert all(value.isfinite().all() for value in (checkpoint.weights | checkpoint.training).values())
    shutil.rmtree(config.run_dir)


def test_changed_data_is_not_resumed(workspace, tmp_path):
    """Any change is refused and described; a newer date of an unchanged image is not a change."""
    devkit = tmp_path / "devkit"
    shutil.copytree(workspace.devkit, devkit)
    config = workspace.short_config(devkit=str(devkit))
    workspace.run(config, at="batch 2.2", action="SIGTERM").expect(TERMINATED)
    demo, split = devkit / "Demo", devkit / "Demo" / "ImageSets" / "Main" / "few.txt"
    names = split.read_text().split()
    image, annotation = demo / "JPEGImages" / f"{names[3]}.jpg", demo / "Annotations" / f"{names[4]}.xml"
    difficult = annotation.read_text().replace("<difficult>0", "<difficult>1", 1)
    assert difficult != annotation.read_text()
    cases: list[tuple[Path, bytes, str]] = [
        (image, (demo / "JPEGImages" / f"{names[5]}.jpg").read_bytes(), f"image of {names[3]} changed"),
        (annotation, difficult.encode(), f"annotation of {names[4]} changed"),
        (split, "\n".join(names[1:]).encode(), f"{names[0]} was removed"),
        (split, "\n".join([*names, "test_0000"]).encode(), "test_0000 is new"),
        (split, "\n".join(names[::-1]).encode(), "the order"),
    ]
    for path, content, words in cases:
        before = path.read_bytes()
        path.write_bytes(content)
        workspace.run(replace(config, resume=True)).expect(USER_ERROR, "its data changed", words)
        path.write_bytes(before)
    os.utime(image)
    workspace.resume(config)
    workspace.compare(config, workspace.undisturbed(workspace.short_config()))


@pytest.mark.parametrize(("size", "runs"), [("short", 1), pytest.param("long", 3, marks=LONG)])
def test_separate_processes_give_the_same_result(workspace, size, runs):
    """Runs started as a user does; the long ones have 200 steps."""
    config = workspace.short_config(epochs=1) if size == "short" else workspace.long_config(epochs=8)
    expected = workspace.undisturbed(config, full_size=True)
    given: dict[str, Any] = {
        name: value for name, value in asdict(config).items() if value != getattr(train.Config(), name)
    }
    for _ in range(runs):
        own = workspace.short_config()
        command = [sys.executable, str(ROOT / "train.py")]
        for name, value in (given | {"run_dir": own.run_dir}).items():
            command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        subprocess.run(command, cwd=workspace.folder, capture_output=True, timeout=TIMEOUT, check=True)
        workspace.compare(own, expected)
