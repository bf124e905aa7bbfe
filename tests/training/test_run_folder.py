"""A resumed run keeps its settings, except for those that are given now and may change."""

import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import train
from tests.conftest import ROOT, small_run
from utils.system.errors import UserError
from utils.training.run_folder import load_settings, save_settings

HINTS = {"epochs": "use --extend"}


@dataclass(frozen=True)
class Settings:
    epochs: int = 100
    patience: int = 0
    cache: str = "auto"
    sets: tuple[str, ...] = ("a",)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_settings(tmp_path, Settings(epochs=4, patience=5, cache="disk", sets=("b", "c")))
    return tmp_path


def resume(folder: Path, given: set[str] | None, **values: object) -> Settings:
    return load_settings(folder, Settings(**values), ("patience", "cache"), given, HINTS)


def test_keeps_settings_that_are_not_given(folder):
    assert resume(folder, set()) == Settings(4, 5, "disk", ("b", "c"))


def test_takes_given_values_even_if_they_equal_the_defaults(folder):
    assert resume(folder, {"patience", "cache"}) == Settings(4, 0, "auto", ("b", "c"))


def test_rejects_given_value_that_cannot_change_even_if_it_equals_the_default(folder):
    with pytest.raises(UserError, match=r"epochs is 4 in .*config\.json and cannot be changed to 100.*use --extend"):
        resume(folder, {"epochs"})
    with pytest.raises(UserError, match=r"sets is \('b', 'c'\) .*leave it out"):
        resume(folder, {"sets"})


def test_accepts_given_value_that_equals_that_of_the_run(folder):
    assert resume(folder, {"epochs", "sets"}, epochs=4, sets=("b", "c")).epochs == 4


def test_values_that_differ_from_the_defaults_count_as_given_by_default(folder):
    assert resume(folder, None, patience=3).patience == 3
    assert resume(folder, None).patience == 5
    with pytest.raises(UserError, match="epochs is 4"):
        resume(folder, None, epochs=5)


def test_reports_settings_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot read the settings of the run"):
        resume(tmp_path, None)
    (tmp_path / "config.json").write_text('{"unknown": 1}')
    with pytest.raises(UserError, match="cannot read the settings of the run"):
        resume(tmp_path, None)


def test_command_line_of_a_resumed_run_overrides_with_defaults(devkit, tmp_path, monkeypatch, capsys):
    """A run with patience 5 and a disk cache is stopped, and resumed with defaults on the command line."""
    monkeypatch.chdir(tmp_path)
    config = small_run(devkit, epochs=1, val_sets=(), run_dir="run", patience=5, cache="disk")
    train.main(config)
    capsys.readouterr()
    flags = ["--resume", "--run-dir", "run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--epochs", "100"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "epochs is 1" in (message := capsys.readouterr().err)
    assert "--extend" in message
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--extend", "1", "--cache=auto", "--patience", "0"])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert "images in RAM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extend": 3}, "needs --resume"),
        ({"cache": "tape"}, "cache is 'tape'"),
        ({"compile": "maybe"}, "compile is 'maybe'"),
        ({"patience": -1}, "patience is -1"),
    ],
)
def test_rejects_invalid_settings(devkit, change, words):
    with pytest.raises(UserError, match=words):
        replace(small_run(devkit), **change)
