"""A failed write says which version of the file is left."""

import os

import pytest

from utils.system.errors import FileError, UserError
from utils.system.files import atomic_write, check_regular_file


@pytest.mark.parametrize(
    ("failing", "message", "left"),
    [
        ("fsync", "any earlier version is unchanged", {"a": "old"}),
        ("replace", "the earlier version is now .*previous", {"previous": "old"}),
        ("fsync_folder", "the file is replaced, but may not be on disk yet", {"a": "new", "previous": "old"}),
    ],
)
def test_failed_write_says_what_is_left(tmp_path, monkeypatch, failing, message, left):
    path, previous = tmp_path / "a", tmp_path / "previous"
    path.write_text("old")
    replace, fsync = os.replace, os.fsync

    def fail_to_replace(source, target):
        if failing == "replace" and target == path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    def fail_to_flush(descriptor):
        if failing == ("fsync_folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync"):
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", fail_to_replace)
    monkeypatch.setattr(os, "fsync", fail_to_flush)
    with pytest.raises(UserError, match=message), atomic_write(path, previous) as file:
        file.write(b"new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == left


def test_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(FileError, match="is a pipe"):
        check_regular_file(tmp_path / "a.jpg", 100)
