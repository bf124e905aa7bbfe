"""Runs that are killed, stopped or damaged resume exactly; `make stress` runs more cases."""

import os
import random
import shutil
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nets.spec import ModelSpec
from tests.stress.fault_injection import BACKUP, SAVING
from tests.stress.workspace import (
    INTERRUPTED,
    KILLED,
    SUCCESS,
    TERMINATED,
    USER_ERROR,
    Workspace,
    assert_equal,
    read_result,
    temporary_files,
)
from utils.data.image_io import read_image, write_image
from utils.system.errors import UserError
from utils.system.files import TEMPORARY
from utils.training.run_folder import RunFolder
from utils.weights.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    Checkpoint,
    is_resumable,
    load_checkpoint,
    load_last,
    save_checkpoint,
)

LONG = pytest.mark.long
MAX_STOPPING_SECONDS = 10
ACCUMULATED = {"batch_size": 2, "nominal_batch": 4, "epochs": 2}


@pytest.mark.parametrize(
    ("point", "changes"),
    [
        ("batch 3.1", {"epochs": 4}),
        ("batch 2.2", {}),
        ("batch 2.3", ACCUMULATED),
        pytest.param("batch 1.1", {}, marks=LONG),
        pytest.param("batch 3.3", {}, marks=LONG),
        pytest.param("batch 1.2", ACCUMULATED, marks=LONG),
        pytest.param("batch 1.6", ACCUMULATED, marks=LONG),
        pytest.param("batch 2.2", {"checkpoint_every": 1, "freeze_epochs": 1, "phi": 2}, marks=LONG),
    ],
)
def test_stopped_run_resumes_exactly(workspace: Workspace, point, changes):
    config = workspace.short_config(**changes)
    workspace.run(config, at=point, action="SIGTERM").expect(TERMINATED, "--resume")
    workspace.resume(config, "resuming after epoch")
    workspace.compare(config)


def test_run_killed_between_checkpoints_repeats_the_lost_epochs(workspace):
    config = workspace.short_config(epochs=3, eval_every=4)
    workspace.run(config, at="batch 3.2", action="kill", save_interval=1e9).expect(KILLED)
    workspace.resume(config, "resuming after epoch 1")
    workspace.compare(config)


def test_extended_run_has_its_own_schedule_and_resumes_exactly(workspace):
    whole, stopped = (workspace.short_config(epochs=2, eval_every=4) for _ in range(2))
    for config in (whole, stopped):
        workspace.run(config).expect(SUCCESS)
    workspace.run(replace(whole, resume=True, extend=2)).expect(SUCCESS)
    workspace.run(replace(whole, resume=True)).expect(SUCCESS, "finished after 4 epochs")
    extended = replace(stopped, resume=True, extend=2)
    workspace.run(extended, at="batch 4.2", action="SIGTERM").expect(TERMINATED)
    workspace.run(extended).expect(USER_ERROR, "--extend")
    workspace.resume(stopped, "resuming after epoch 3, batch 2")
    expected = read_result(Path(whole.run_dir))
    assert_equal(read_result(Path(stopped.run_dir)), expected)
    rates = [record["train/lr"] for record in expected["metrics"]]
    assert rates[:2] == rates[2:]
    for config in (whole, stopped):
        shutil.rmtree(config.run_dir)


def test_files_are_flushed_before_and_after_renaming(workspace):
    def points_of(name: str) -> list[str]:
        return [point.removeprefix(f"{name}: ") for point in workspace.points if point.startswith(f"{name}: ")]

    for name in ("config.json", "data.json", BEST, LAST):
        first, later = points_of(name)[: len(SAVING)], points_of(name)[len(SAVING) :]
        repeated = [*SAVING[:5], *(BACKUP if name == LAST else ()), *SAVING[5:]]
        assert first == [*SAVING], name
        assert later == repeated * (len(later) // len(repeated)), name
        assert later or name != LAST
    assert points_of("metrics.jsonl") == [*SAVING, *SAVING[:5] * 3]


def check_kill(workspace: Workspace, point: str) -> None:
    config = workspace.short_config()
    fault = {"at": point, "occurrence": workspace.saving_points[point], "action": "kill"}
    workspace.run(config, **fault).expect(KILLED)
    Path(config.run_dir, f"batch_1.jpg{TEMPORARY}").touch()  # drawn in the first epoch only, so never written again
    workspace.resume(config)
    workspace.compare(config)


@pytest.mark.parametrize(
    "point",
    [
        f"{LAST}: half written",
        f"{LAST}: fsync",
        f"{LAST}: backed up",
        f"{BEST}: renamed",
        "metrics.jsonl: half written",
    ],
)
def test_run_killed_while_saving_resumes_exactly(workspace, point):
    check_kill(workspace, point)


@LONG
def test_run_killed_at_any_point_of_saving_resumes_exactly(workspace):
    for point in workspace.saving_points:
        check_kill(workspace, point)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=LONG)])
def test_run_killed_at_random_moments_resumes_exactly(workspace, kills):
    rng = random.Random(0)
    started = time.monotonic()
    expected = workspace.undisturbed(workspace.short_config(cache="disk"), pictures=True)
    seconds = max(time.monotonic() - started, 1)
    while kills > 0:
        config = workspace.short_config(cache="disk")
        for _ in range(2):  # the first run, and the one that resumes it
            resumed = replace(config, resume=is_resumable(Path(config.run_dir)))
            outcome = workspace.start(resumed, pictures=True).finish(timeout=rng.uniform(0, seconds))
            kills -= outcome.code == KILLED
        workspace.resume(config, pictures=True)
        workspace.compare(config, expected)


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ("decode", "SIGTERM"),
        ("dry run", "SIGINT"),
        ("batch 2.2", "SIGTERM"),
        ("evaluate", "SIGINT"),
        ("report", "SIGTERM"),
        (f"{LAST}: half written", "SIGTERM"),
        pytest.param("decode", "SIGINT", marks=LONG),
        pytest.param("dry run", "SIGTERM", marks=LONG),
        pytest.param("batch 2.2", "SIGINT", marks=LONG),
        pytest.param("evaluate", "SIGTERM", marks=LONG),
        pytest.param("report", "SIGINT", marks=LONG),
        pytest.param(f"{LAST}: half written", "SIGINT", marks=LONG),
    ],
)
def test_two_signals_stop_a_run_that_resumes_exactly(workspace, point, name):
    config = workspace.short_config()
    code = {"SIGINT": INTERRUPTED, "SIGTERM": TERMINATED}[name]
    outcome = workspace.run(config, at=point, action=name).expect(code, f"stopped by {name}")
    assert outcome.stopping_seconds < MAX_STOPPING_SECONDS
    assert is_resumable(Path(config.run_dir)) == (point not in ("decode", "dry run"))
    assert temporary_files(Path(config.run_dir)) == []
    workspace.resume(config)
    workspace.compare(config)


def damaged_copies(content: bytes) -> list[bytes]:
    """50 truncated copies and 50 with a flipped bit, in every part of a safetensors file."""
    rng = random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    metadata = content.index(b"__metadata__"), content.index(b"sha256") + 70
    regions = [(0, 8), (8, header), metadata, (header, len(content)), (0, len(content))]
    copies = [content[: rng.randrange(len(content))] for _ in range(48)] + [b"", content[:-1]]
    for i in range(50):
        copy = bytearray(content)
        copy[rng.randrange(*regions[i % len(regions)])] ^= 1 << rng.randrange(8)
        copies.append(bytes(copy))
    return copies


def test_damaged_checkpoint_is_detected_and_replaced_by_the_previous_one(tmp_path, capsys):
    spec = ModelSpec(("cat", "dog"), ((10.0, 14.0),) * 6)
    weights = {f"layer{i}.weight": torch.full((i, 7), float(i)) for i in range(9)} | {"count": torch.tensor(3)}
    training = {f"model/{name}": value.clone() for name, value in weights.items()}
    for epoch in (1, 2):
        save_checkpoint(tmp_path / LAST, Checkpoint(spec, weights, {"epoch": epoch}, training), tmp_path / PREVIOUS)
    for content in damaged_copies((tmp_path / LAST).read_bytes()):
        (tmp_path / LAST).write_bytes(content)
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / LAST)
        assert load_last(tmp_path).info["epoch"] == 1
        assert str(tmp_path / PREVIOUS) in capsys.readouterr().out


@pytest.mark.parametrize("point", [f"{LAST}: backed up", pytest.param(f"{LAST}: half written", marks=LONG)])
def test_damaged_run_resumes_from_the_previous_checkpoint(workspace, point):
    """The previous checkpoint is kept until the next one is complete, so a second kill does no harm."""
    config = workspace.short_config()
    last = Path(config.run_dir) / LAST
    workspace.run(config, at="batch 3.2", action="SIGTERM").expect(TERMINATED)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    outcome = workspace.run(replace(config, resume=True), at=point, action="kill")
    outcome.expect(outcome.code, "damaged", PREVIOUS)
    assert outcome.code in (KILLED, SUCCESS)
    workspace.resume(config)
    workspace.compare(config)


def test_second_run_in_a_folder_is_refused(workspace):
    """While the first one trains, also while it is resumed; after it was killed, the folder is free."""
    config = workspace.short_config()
    resumed = replace(config, resume=True)
    for first, point in ((config, "batch 3.1"), (resumed, "batch 3.2")):
        running = workspace.start(first, at=point, action="wait")
        try:
            running.wait_for(point)
            for other in (config, resumed):
                outcome = workspace.run(other).expect(USER_ERROR, "another process is training in", config.run_dir)
                assert outcome.points == []
        finally:
            running.finish(timeout=0)
    with closing(RunFolder(Path(config.run_dir))):
        workspace.run(resumed).expect(USER_ERROR, "another process is training in")
    workspace.resume(config)
    workspace.compare(config)


def check_cached_run(workspace: Workspace, devkit: Path, decoded: int, expected: dict, **fault: str) -> None:
    """A run with a disk cache decodes so many images, and equals one with the images in RAM."""
    config = workspace.short_config(devkit=str(devkit), cache="disk")
    outcome = workspace.run(config, **fault).expect(SUCCESS, "images in logs/cache")
    assert outcome.points.count("decode") == decoded
    workspace.compare(config, expected)


@pytest.mark.parametrize(
    "points", [("decode",), pytest.param(("decode", "images: half written", "images: fsync"), marks=LONG)]
)
def test_image_cache_is_rebuilt_when_it_is_incomplete_or_outdated(workspace, tmp_path, points):
    devkit = tmp_path / "devkit"
    shutil.copytree(workspace.devkit, devkit)
    caches = workspace.folder / "logs" / "cache"
    expected = workspace.undisturbed(workspace.short_config())
    for point, action, code in [*((point, "kill", KILLED) for point in points), ("decode", "SIGTERM", TERMINATED)]:
        config = workspace.short_config(devkit=str(devkit), cache="disk")
        workspace.run(config, at=point, action=action).expect(code)
    assert temporary_files(caches) == []
    check_cached_run(workspace, devkit, 12 + 4, expected)
    check_cached_run(workspace, devkit, 0, expected, broken="decode")
    for path in caches.glob("*.images"):
        os.truncate(path, path.stat().st_size - 1)
    check_cached_run(workspace, devkit, 12 + 4, expected)
    name = (devkit / "Demo" / "ImageSets" / "Main" / "few.txt").read_text().split()[0]
    first = devkit / "Demo" / "JPEGImages" / f"{name}.jpg"
    write_image(first, np.ascontiguousarray(read_image(first)[::-1]))
    changed = workspace.undisturbed(workspace.short_config(devkit=str(devkit)))
    assert changed["weights"] != expected["weights"]
    check_cached_run(workspace, devkit, 12, changed)
