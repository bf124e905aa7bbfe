"""Disks that are full, read-only or not writable lead to one message and never to a damaged file."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stress.workspace import SUCCESS, USER_ERROR, Workspace, temporary_files
from utils.weights.checkpoint import BEST, LAST, is_resumable, load_last

LONG = pytest.mark.long
NOBODY = 65534  # a user without rights


def check_full_disk(workspace: Workspace, point: str) -> None:
    config = workspace.short_config()
    fault = {"at": point, "occurrence": workspace.saving_points[point], "action": "disk full"}
    workspace.run(config, **fault).expect(USER_ERROR, "No space left on device", "error: cannot")
    assert temporary_files(Path(config.run_dir)) == []
    if is_resumable(Path(config.run_dir)):
        load_last(Path(config.run_dir))
    workspace.resume(config)
    workspace.compare(config)


@pytest.mark.parametrize("point", [f"{LAST}: half written", f"{LAST}: fsync", f"{BEST}: half written"])
def test_run_resumes_exactly_after_a_full_disk(workspace, point):
    check_full_disk(workspace, point)


@LONG
def test_run_resumes_exactly_after_a_disk_full_at_any_write(workspace):
    points = [point for point in workspace.saving_points if point.endswith((": half written", ": fsync"))]
    for point in [*points, f"{LAST}: rename", f"{LAST}: folder fsync"]:
        check_full_disk(workspace, point)


@contextmanager
def mount(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory; skips the test where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "stress", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_run_resumes_exactly_after_a_small_disk_was_enlarged(workspace):
    """The disk has room for one checkpoint and half of the second."""
    disk = workspace.folder / "disk"
    with mount(disk, "size=125m"):
        config = replace(workspace.short_config(), run_dir=str(disk / "run"))
        outcome = workspace.run(config, pictures=True, full_size=True)
        outcome.expect(USER_ERROR, "No space left on device", "error: cannot write", LAST)
        assert temporary_files(Path(config.run_dir)) == []
        assert load_last(Path(config.run_dir)).info["epoch"] == 1
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        workspace.resume(config, pictures=True, full_size=True)
        workspace.compare(config, workspace.undisturbed(config, full_size=True))


@pytest.mark.parametrize(
    ("name", "user"), [("file", 0), ("file/run", 0), ("guarded/new", NOBODY), ("guarded/run", NOBODY)]
)
def test_folder_that_is_not_writable_is_reported_before_training(workspace, name, user):
    """A file of that name, a folder within a file, or a folder of another user."""
    if user and os.getuid() != 0:
        pytest.skip("only root can run as another user")
    (workspace.folder / "file").touch()
    (workspace.folder / "guarded" / "run").mkdir(parents=True, exist_ok=True)
    (workspace.folder / "guarded").chmod(0o755)
    config = replace(workspace.short_config(), run_dir=str(workspace.folder / name))
    outcome = workspace.run(config, user=user).expect(USER_ERROR, "cannot write to", name)
    assert outcome.points == []


def test_read_only_disk_is_reported_before_training(workspace):
    disk = workspace.folder / "readonly"
    with mount(disk, "ro,size=1m"):
        config = replace(workspace.short_config(), run_dir=str(disk / "run"))
        assert workspace.run(config).expect(USER_ERROR, "cannot write to", "Read-only").points == []


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        ("add_scalar", "TensorBoard events"),
        ("draw_training", "curves"),
        ("write_image", "pictures"),
        ("tensorboard folder", "TensorBoard events"),
    ],
)
def test_failing_tensorboard_or_pictures_only_warn_once(workspace, broken, kind):
    config = workspace.short_config()
    if broken == "tensorboard folder":
        Path(config.run_dir).mkdir()
        (Path(config.run_dir) / "tensorboard").touch()
    outcome = workspace.run(config, broken=broken, pictures=True).expect(SUCCESS)
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"warning: cannot write {kind} (")
    workspace.compare(config)
